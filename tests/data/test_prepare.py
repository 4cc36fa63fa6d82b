import io
import json
import random
import shutil
from pathlib import Path

import awkward as ak
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcore_sft.base.terminal import Console
from mcore_sft.config import DataConfig
from mcore_sft.data.encode.job import Job
from mcore_sft.data.errors import DataError
from mcore_sft.data.export import export_json_lines
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.prepare import merge, prepare, prepare_shard
from mcore_sft.data.report.preview import preview
from mcore_sft.data.report.report import show_manifest
from mcore_sft.data.text.fit import check_fit
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer
from tests.prompts import MathPrompt

FIXTURES = Path(__file__).parent.parent / "fixtures"


def config(root: Path = FIXTURES, **settings) -> DataConfig:
    tree = {"train": [{"path": "rows.jsonl"}], "sequence_length": 256, "workers": 1, **settings}
    return DataConfig.model_validate({"root": root, **tree})


def job(data: DataConfig, *, tokenizer=None) -> Job:
    console = Console(file=io.StringIO(), width=200)
    tokenizer = tokenizer or load_tokenizer(FIXTURES / "tokenizer")
    prompt = Prompt.load(MathPrompt(), tokenizer)
    return Job(config=data, prompt=prompt, tokenizer=tokenizer, console=console)


def run(data: DataConfig, folder: Path, *, overwrite: bool = False, tokenizer=None) -> tuple:
    work = job(data, tokenizer=tokenizer)
    made = prepare(work, folder, overwrite=overwrite)
    return made, work.console.file.getvalue()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "packed"
    run(config(), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_dataset_holds_what_the_prompt_makes_of_the_rows(packed):
    dataset = PackedDataset(packed)
    tokenizer = load_tokenizer(FIXTURES / "tokenizer")
    prompt = Prompt.load(MathPrompt(), tokenizer)
    rows = map(json.loads, (FIXTURES / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    distinct = dict.fromkeys((row["problem"], row["generated_solution"]) for row in rows)
    expected = [
        (tokenizer.encode(prompt.text(problem)), tokenizer.encode(solution + "<|eot_id|>"))
        for problem, solution in distinct
    ]
    expected = [(asked, said) for asked, said in expected if len(asked) + len(said) <= 256]
    assert 0 < dataset.num_examples == len(expected) < 200, "some are too long, most are not"
    for index, (asked, said) in enumerate(expected):
        got = dataset.example(index)
        assert got.tokens.tolist() == asked + said
        assert got.spans.tolist() == [[len(asked), len(asked) + len(said)]]


def test_counts_add_up(packed):
    dataset = PackedDataset(packed)
    counts = dataset.counts
    assert counts["rows"] == 200 == counts["examples"] + sum(counts["dropped"].values())
    assert counts["dropped"].keys() == {"duplicate", "longer than the sequence"}
    assert counts["source_rows"] == [200]
    packs = [dataset.pack(p) for p in range(len(dataset))]
    assert counts["packs"] == len(packs)
    assert sum(len(pack.examples) for pack in packs) == counts["examples"]
    assert counts["tokens"] == sum(pack.tokens for pack in packs)
    assert max(pack.tokens for pack in packs) <= 256
    assert counts["packing_efficiency"] == pytest.approx(counts["tokens"] / len(packs) / 256, 1e-5)
    trained = [sum(int((e.spans[:, 1] - e.spans[:, 0]).sum()) for e in p.examples) for p in packs]
    assert dataset.supervised.tolist() == trained
    assert counts["supervised_tokens"] == sum(trained)


def test_megatron_reads_the_tokens(packed):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    theirs = indexed_dataset.IndexedDataset(str(packed / "train"))
    ours = PackedDataset(packed)
    assert len(theirs) == ours.num_examples
    assert theirs.document_indices.tolist() == list(range(len(theirs) + 1))
    for index in (0, 1, len(theirs) - 1):
        assert theirs[index].tolist() == ours.example(index).tokens.tolist()


def test_bytes_do_not_depend_on_the_workers(packed, tmp_path):
    lines = (FIXTURES / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines * 12), encoding="utf-8")  # three chunks
    for workers in (1, 2):
        run(config(tmp_path, workers=workers), tmp_path / str(workers))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_dataset_in_place_is_reused_replaced_or_refused(tmp_path):
    folder = tmp_path / "packed"
    first, _ = run(config(train=[{"path": "rows.jsonl", "limit": 20}]), folder)
    before = contents(folder)
    again, said = run(config(train=[{"path": "rows.jsonl", "limit": 20}], workers=2), folder)
    assert again == first
    assert "reused" in said
    short = [{"path": "rows.jsonl", "limit": 20}]
    for other in (config(), config(train=short, sequence_length=255), config(train=short, seed=1)):
        with pytest.raises(
            DataError, match=r"other inputs.*\(data\.\S+: .* there, .* here.*--overwrite"
        ):
            run(other, folder)
    assert contents(folder) == before
    replaced, _ = run(config(), folder, overwrite=True)
    assert replaced["fingerprint"] != first["fingerprint"]
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="not empty and holds no packed dataset"):
            run(config(), tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_changed_source_is_other_input(tmp_path):
    shutil.copy(FIXTURES / "rows.jsonl", tmp_path)
    run(config(tmp_path), tmp_path / "packed")
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"problem": "a", "generated_solution": "b"}\n')
    with pytest.raises(
        DataError, match=r"\(sources\.train\.0\.files\.0\.sha256: .* there, .* here"
    ):
        run(config(tmp_path), tmp_path / "packed")


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_row_leaves_nothing_behind(workers, tmp_path):
    lines = (FIXTURES / "rows.jsonl").read_text(encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(lines + "{broken\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:201: broken JSON"):
        run(config(tmp_path, workers=workers), tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_no_source_and_no_example_left(tmp_path):
    with pytest.raises(DataError, match=r"data\.train names no source"):
        run(config(train=[]), tmp_path / "packed")
    with pytest.raises(DataError, match=r"no example is left of 200 rows \(.*199 longer than"):
        run(config(sequence_length=16), tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_splits_and_drops(tmp_path):
    rows = [
        {"problem": "1 + 1?", "generated_solution": "2"},
        {"problem": "1 + 1?<|eot_id|>", "generated_solution": "2"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    data = config(tmp_path, validation=[{"path": "rows.jsonl", "limit": 1}])
    made, _ = run(data, tmp_path / "packed")
    assert made["splits"]["train"]["dropped"] == {"special token in text": 1}
    assert made["splits"]["validation"]["dropped"] == {}
    assert len(PackedDataset(tmp_path / "packed", "validation")) == 1
    console = Console(file=io.StringIO(), width=120)
    show_manifest(made, tmp_path / "packed", console=console)
    shown = console.file.getvalue()
    assert "dropped: special token in text" in shown
    assert str(tmp_path / "packed") in shown
    with pytest.raises(DataError, match="no split 'test', only train, validation"):
        PackedDataset(tmp_path / "packed", "test")


def test_gigatoken_that_differs_is_given_up_for_the_whole_dataset(packed, tmp_path, monkeypatch):
    class Wrong:
        def encode_batch(self, texts, *, parallel):
            return ak.values_astype(ak.Array([[7]] * len(texts)), "uint32")

    monkeypatch.setattr("mcore_sft.data.text.tokenizer._load_gigatoken", lambda file: Wrong())
    _, said = run(config(), tmp_path / "packed")
    assert "starting again with `tokenizers`" in said
    assert contents(tmp_path / "packed") == contents(packed)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "train.spans.npy", "train.packs.npy"])
def test_corrupt_file_is_named(name, packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "packed"))
    raw = bytearray((folder / name).read_bytes())
    raw[-1] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(DataError, match=rf"{name}: corrupt: SHA-256 .*run preprocess again"):
        PackedDataset(folder)
    (folder / name).write_bytes(raw[:-4])
    with pytest.raises(DataError, match=rf"{name}: \d+ bytes, expected \d+.*run preprocess again"):
        PackedDataset(folder, verify=False)
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: missing"):
        PackedDataset(folder, verify=False)


def test_index_that_is_none_is_named(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "packed"))
    raw = (folder / "train.idx").read_bytes()
    (folder / "train.idx").write_bytes(b"X" + raw[1:])
    with pytest.raises(DataError, match=r"train\.idx: not the index of a token file"):
        PackedDataset(folder, verify=False)


def test_folder_without_a_manifest_that_can_be_read(packed, tmp_path):
    with pytest.raises(DataError, match=r"no packed dataset here.*tools/preprocess\.py"):
        PackedDataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"manifest\.json: broken"):
        PackedDataset(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}', encoding="utf-8")
    with pytest.raises(DataError, match="format 99, expected 3"):
        PackedDataset(tmp_path)


def test_tokenizer_must_fit_the_model(tmp_path):
    tokenizer = load_tokenizer(FIXTURES / "tokenizer")
    check_fit(tokenizer, tmp_path)  # no model there: nothing to compare with
    (tmp_path / "config.json").write_text('{"vocab_size": 701}', encoding="utf-8")
    check_fit(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 700}', encoding="utf-8")
    with pytest.raises(DataError, match=r"has 701 tokens, but the model .* a vocabulary of 700"):
        check_fit(tokenizer, tmp_path)


def test_examples_are_shown_with_trained_tokens_in_green():
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    preview(job(config()), 1, console=console)
    shown = console.file.getvalue()
    untrained, _, trained = shown.partition("\x1b[32m")
    assert "<|begin_of_text|>" in untrained
    assert "\\boxed" in trained
    assert "<|eot_id|>" in trained


# --- filters, duplicates, sampling, contamination ---


def solved(problem: str, solution: str, **columns) -> dict:
    return {"problem": problem, "generated_solution": solution, **columns}


def write_rows(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file.name


def texts(folder: Path, split: str = "train") -> list[str]:
    """The examples of a split in the order in which they are written."""
    dataset, tokenizer = PackedDataset(folder, split), load_tokenizer(FIXTURES / "tokenizer")
    examples = (dataset.example(i) for i in range(dataset.num_distinct))
    return [tokenizer.decode(e.tokens[e.spans[0, 0] : -1].tolist()) for e in examples]


ROWS = [solved(f"What is {i // 4} + 1?", f"It is {i // 4 + 1} ({i}).") for i in range(3000)]
"""Four solutions of each problem, in three chunks."""


def test_filters_drop_and_trim_and_are_counted(tmp_path):
    rows = [
        solved("a?", "My solution:\nThe answer is \\boxed{1}.\nSo there."),
        solved("b?", "\\boxed{1} and \\boxed{2}"),
        solved("c?", "few agree: \\boxed{3}", majority_votes=1, total_votes=8),
        solved("d?", "most agree: \\boxed{4}", majority_votes=7, total_votes=8),
    ]
    filters = {
        "drop_multi_boxed": True,
        "trim_prefix": True,
        "trim_solutions": True,
        "majority_filter": True,
        "min_majority_percentage": 0.5,
    }
    write_rows(tmp_path / "rows.jsonl", rows)
    made, _ = run(config(tmp_path, filters=filters), tmp_path / "packed")
    assert texts(tmp_path / "packed") == [
        "The answer is \\boxed{1}.",
        "most agree: \\boxed{4}",
    ]
    assert made["splits"]["train"]["dropped"] == {"drop_multi_boxed": 1, "majority_filter": 1}


def test_token_lengths_are_those_of_the_tokenizer(tmp_path):
    rows = [solved("a?", "one"), solved("b?", "one two three four five six seven eight")]
    filters = {"remove_len_outlier_solutions": True, "max_solution_length": 4}
    write_rows(tmp_path / "rows.jsonl", rows)
    made, _ = run(config(tmp_path, filters=filters), tmp_path / "packed")
    assert texts(tmp_path / "packed") == ["one"]
    assert made["splits"]["train"]["dropped"] == {"remove_len_outlier_solutions": 1}


@pytest.mark.parametrize("workers", [1, 2])
def test_duplicates_are_dropped_wherever_they_stand(tmp_path, workers):
    rows = [*ROWS, ROWS[5], solved("What is 1 + 1?", "My solution:\nIt is 2 (5).")]
    write_rows(tmp_path / "rows.jsonl", rows)
    settings = {"workers": workers, "filters": {"trim_prefix": True}}
    made, _ = run(config(tmp_path, **settings), tmp_path / "packed")
    assert texts(tmp_path / "packed") == [row["generated_solution"] for row in ROWS]
    assert made["splits"]["train"]["dropped"] == {"duplicate": 2}
    kept, _ = run(config(tmp_path, filters={"deduplicate": False}), tmp_path / "kept")
    assert kept["splits"]["train"]["examples"] == 3002


@pytest.mark.parametrize("order", ["source", "nemo_skills"])
@pytest.mark.parametrize("method", ["random", "fair"])
def test_downsampling_keeps_whole_examples(tmp_path, method, order):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    filters = {"downsampling_method": method, "num_output_samples": 1000, "order": order}
    sources = {"validation": [{"path": "rows.jsonl"}], "filters": filters}
    made, _ = run(config(tmp_path, **sources), tmp_path / "packed")
    counts = made["splits"]["train"]
    assert counts["rows"] == 3000 == counts["examples"] + counts["dropped"]["not sampled"]
    assert made["splits"]["validation"]["examples"] == 3000
    found = texts(tmp_path / "packed")
    places = [[row["generated_solution"] for row in ROWS].index(text) for text in found]
    assert len(set(places)) == 1000
    assert (places == sorted(places)) == (order == "source")
    if method == "fair":  # of 750 problems all have one, and 250 a second one
        turns = [place % 4 for place in places]
        assert [turns.count(turn) for turn in range(4)] == [750, 250, 0, 0]
    dataset = PackedDataset(tmp_path / "packed")
    packed = [example for p in range(len(dataset)) for example in dataset.pack(p).examples]
    assert sum(len(example) for example in packed) == counts["tokens"]


def test_what_a_benchmark_asks_is_dropped_and_listed(tmp_path):
    problem = "Find the number of ways to seat eight people around a round table with no rotation."
    rows = [
        solved(problem.upper(), "5040"),
        solved(problem + " Explain your answer.", "5040"),
        solved("Find the number of cats.", "3"),
    ]
    write_rows(tmp_path / "rows.jsonl", rows * 2)
    write_rows(tmp_path / "test.jsonl", [{"problem": problem}])
    settings = {
        "contamination": {"against": [{"path": "test.jsonl"}]},
        "validation": [{"path": "rows.jsonl"}],
    }
    made, _ = run(config(tmp_path, **settings), tmp_path / "packed")
    assert texts(tmp_path / "packed") == ["3"]
    counts = made["splits"]["train"]
    assert counts["dropped"] == {"in a benchmark": 4, "duplicate": 1}
    assert counts["contaminated_problems"] == 2
    assert made["splits"]["validation"]["examples"] == 3
    listed = (tmp_path / "packed" / "train.contamination.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in listed]
    assert [each["kind"] for each in found] == ["normalized", "8-gram"]
    assert all(each["benchmark_problem"] == problem for each in found)

    told = {"against": [{"path": "test.jsonl"}], "remove": False}
    made, _ = run(config(tmp_path, contamination=told), tmp_path / "told")
    assert made["splits"]["train"]["examples"] == 3
    assert made["splits"]["train"]["contaminated_problems"] == 2


def test_sampled_and_compared_bytes_do_not_depend_on_workers(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    write_rows(tmp_path / "test.jsonl", [{"problem": f"what is {i} + 1?"} for i in range(0, 90, 7)])
    settings = {
        "contamination": {"against": [{"path": "test.jsonl"}]},
        "filters": {"downsampling_method": "fair", "num_output_samples": 999},
    }
    for workers in (1, 3):
        run(config(tmp_path, workers=workers, **settings), tmp_path / f"packed-{workers}")
    assert contents(tmp_path / "packed-1") == contents(tmp_path / "packed-3")


# --- held out rows, weights, shards, plain JSON lines, bad rows ---


def test_validation_by_row_is_the_cut_of_train_test_split(tmp_path):
    import datasets

    write_rows(tmp_path / "rows.jsonl", ROWS)
    made, _ = run(config(tmp_path, holdout={"fraction": 0.05}), tmp_path / "packed")
    test = datasets.Dataset.from_list(ROWS).train_test_split(test_size=0.05, seed=42)["test"]
    expected = set(test["generated_solution"])
    assert set(texts(tmp_path / "packed", "validation")) == expected
    assert texts(tmp_path / "packed") == [
        row["generated_solution"] for row in ROWS if row["generated_solution"] not in expected
    ]
    train, validation = made["splits"]["train"], made["splits"]["validation"]
    assert train["rows"] == 3000 == train["examples"] + train["held_out"]
    assert validation["rows"] == validation["examples"] == 150
    assert validation["shared_problems"] > 100


def test_validation_by_problem_shares_none(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    holdout = {"fraction": 0.1, "by": "problem"}
    made, _ = run(config(tmp_path, holdout=holdout), tmp_path / "packed")
    assert made["splits"]["validation"]["shared_problems"] == 0
    assert 200 < made["splits"]["validation"]["examples"] < 400
    assert made["splits"]["validation"]["examples"] % 4 == 0


def test_weights_show_examples_more_or_less_often(tmp_path):
    write_rows(tmp_path / "a.jsonl", ROWS[:400])
    write_rows(tmp_path / "b.jsonl", ROWS[400:])
    sources = [{"path": "a.jsonl", "weight": 2.5}, {"path": "b.jsonl", "weight": 0.1}]
    made, _ = run(config(tmp_path, train=sources), tmp_path / "packed")
    counts = made["splits"]["train"]
    assert (counts["examples"], counts["visits"]) == (400 + 260, 1000 + 260)
    assert counts["dropped"] == {"left out by its source's weight": 2340}
    dataset = PackedDataset(tmp_path / "packed")
    shown = [example for p in range(len(dataset)) for example in dataset.pack(p).examples]
    assert len(shown) == 1260 == dataset.num_examples
    assert sum(len(example) for example in shown) == counts["tokens"]
    assert int(dataset.supervised.sum()) == counts["supervised_tokens"]


MIXED = {
    "train": [{"path": "a.jsonl", "weight": 1.5}, {"path": "b.jsonl"}],
    "holdout": {"fraction": 0.1},
    "filters": {"downsampling_method": "fair", "num_output_samples": 2500, "order": "nemo_skills"},
    "contamination": {"against": [{"path": "test.jsonl"}]},
    "on_bad_row": "skip",
}


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_merged_shards_are_what_one_machine_writes(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("mcore_sft.data.sources.text_blocks.BLOCK_BYTES", 9000)
    rows = [*ROWS[:1500], {"problem": 3}, *ROWS[:20]]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "b.jsonl", [*ROWS[1500:], *ROWS[7:9]])
    write_rows(tmp_path / "test.jsonl", [{"problem": f"what is {i} + 1?"} for i in range(0, 90, 7)])
    data = config(tmp_path, **MIXED)
    alone, _ = run(data, tmp_path / "alone")
    assert alone["splits"]["train"]["dropped"]["duplicate"] > 10
    assert alone["splits"]["train"]["dropped"]["bad row"] == 1
    folder = tmp_path / "packed"
    for index in reversed(range(shards)):
        prepare_shard(job(data), folder, index=index, count=shards)
    made = merge(job(data), folder, count=shards)
    assert made == alone
    assert contents(folder) == contents(tmp_path / "alone")


def test_shards_made_by_the_slow_tokenizer_are_merged_all_the_same(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS[:200])
    data, slow = config(tmp_path), load_tokenizer(FIXTURES / "tokenizer", gigatoken=False)
    alone, _ = run(data, tmp_path / "alone")
    for index in range(2):
        prepare_shard(job(data, tokenizer=slow), tmp_path / "packed", index=index, count=2)
    assert merge(job(data), tmp_path / "packed", count=2) == alone
    prepare_shard(job(data), tmp_path / "packed", index=1, count=2, overwrite=True)
    with pytest.raises(
        DataError, match=r"make packed\.shard-1-of-2 again with data\.gigatoken=false"
    ):
        merge(job(data), tmp_path / "packed", count=2, overwrite=True)


def test_shards_that_do_not_belong_together(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS[:50])
    data, folder = config(tmp_path), tmp_path / "packed"
    prepare_shard(job(data), folder, index=0, count=2)
    with pytest.raises(DataError, match=r"shard 1 of 2 is not there; run .* --shard 1/2"):
        merge(job(data), folder, count=2)
    other = config(tmp_path, filters={"trim_prefix": True})
    prepare_shard(job(other), folder, index=1, count=2)
    with pytest.raises(DataError, match=r"packed\.shard-1-of-2: a shard of other inputs .*data"):
        merge(job(data), folder, count=2)
    with pytest.raises(DataError, match=r"shard-1-of-2: a shard of other inputs lies here"):
        prepare_shard(job(data), folder, index=1, count=2)
    prepare_shard(job(data), folder, index=1, count=2, overwrite=True)
    work = job(data)
    prepare_shard(work, folder, index=1, count=2)
    assert "reused" in work.console.file.getvalue()
    (block,) = (tmp_path / "packed.shard-0-of-2").glob("train.*.block")
    raw = bytearray(block.read_bytes())
    for at, said in (
        (100, "its tokens are not"),
        (-20, "does not end"),
        (-60, "its header is not"),
    ):
        damaged = raw.copy()
        damaged[at] ^= 1
        block.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"block: damaged \(.*{said}.*--shard 0/2 again"):
            merge(job(data), folder, count=2)
    assert not folder.exists()


def test_json_lines_are_those_of_nemo_skills(tmp_path):
    rows = [
        solved("What is 1 + 1?", "It is \\boxed{2}.", expected_answer="2", problem_source="x"),
        solved("Größe?", "\\boxed{3}", expected_answer="3"),
        solved("What is 1 + 1?", "It is \\boxed{2}.", expected_answer="2"),
        solved("no answer?", "none"),
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    file = tmp_path / "out" / "sft.jsonl"
    assert export_json_lines(job(config(tmp_path)), file) == 3
    lines = file.read_bytes().splitlines()
    head = "<|start_header_id|>{}<|end_header_id|>\\n\\n"
    said = r"Solve the following math problem. Make sure to put the answer (and only answer) "
    assert lines[0].decode() == (
        '{"expected_answer": "2", "input": "<|begin_of_text|>'
        + head.format("system")
        + "<|eot_id|>"
        + head.format("user")
        + said
        + r"inside \\boxed{}.\n\nWhat is 1 + 1?<|eot_id|>"
        + head.format("assistant")
        + r'", "output": "It is \\boxed{2}.<|eot_id|>"}'
    )
    assert b"Gr\\u00f6\\u00dfe?" in lines[1]
    assert list(json.loads(lines[2])) == ["input", "output"]
    shuffled = config(tmp_path, filters={"order": "nemo_skills"}, workers=2)
    with pytest.raises(DataError, match="there already; replace it with --overwrite"):
        export_json_lines(job(shuffled), file)
    export_json_lines(job(shuffled), file, overwrite=True)
    with pytest.raises(DataError, match="a source of this run"):
        export_json_lines(job(shuffled), tmp_path / "rows.jsonl", overwrite=True)
    order = [0, 1, 2]
    random.Random(42).shuffle(order)
    assert file.read_bytes().splitlines() == [lines[i] for i in order]


@pytest.mark.parametrize("by", ["row", "problem"])
@pytest.mark.parametrize("order", ["source", "nemo_skills"])
def test_plain_json_lines_are_the_rows_that_are_trained(by, order, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [*ROWS[:400], ROWS[7]])
    settings = {"holdout": {"fraction": 0.1, "by": by}, "filters": {"order": order}}
    made, _ = run(config(tmp_path, **settings), tmp_path / "packed")
    held = made["splits"]["train"]["held_out"]
    assert 0 < held < 100
    exporting, file = job(config(tmp_path, **settings)), tmp_path / "sft.jsonl"
    assert export_json_lines(exporting, file) == 400 - held
    assert f"{held} more rows are held out" in exporting.console.file.getvalue()
    written = [json.loads(line)["output"] for line in file.read_text().splitlines()]
    assert written == [f"{text}<|eot_id|>" for text in texts(tmp_path / "packed")]
    assert not list(tmp_path.glob(".*"))


def test_bad_rows_are_skipped_counted_and_capped(tmp_path):
    rows = [solved(f"{i}?", "yes") if i % 3 else {"problem": f"{i}?"} for i in range(30)]
    rows[0] = solved("0?", "yes")
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:4: .*generated_solution"):
        run(config(tmp_path), tmp_path / "packed")
    skipping = config(tmp_path, on_bad_row="skip", max_bad_rows=9)
    made, _ = run(skipping, tmp_path / "packed")
    assert made["splits"]["train"]["dropped"] == {"bad row": 9}
    assert made["splits"]["train"]["rows"] == 30
    capped = skipping.model_copy(update={"max_bad_rows": 8})
    with pytest.raises(DataError, match=r"rows\.jsonl:4: .*more than 8 rows of data\.train"):
        run(capped, tmp_path / "capped")
    assert not (tmp_path / "capped").exists()


def test_rows_that_the_template_cannot_write_are_skipped_counted_and_capped(tmp_path):
    talk = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]
    unfit = [talk[0], {**talk[1], "reasoning_content": "Hm."}]
    rows = [{"messages": talk}, {"messages": unfit}, {"messages": [{}]}, {"messages": unfit}]
    source = {"path": write_rows(tmp_path / "talks.jsonl", rows), "messages": "messages"}
    only = {"train": [source], "filters": {"deduplicate": False}}
    with pytest.raises(DataError, match=r"talks\.jsonl:3: .*role None"):
        run(config(tmp_path, **only), tmp_path / "packed")
    skipping = config(tmp_path, **only, on_bad_row="skip", max_bad_rows=3)
    made, _ = run(skipping, tmp_path / "packed")
    assert made["splits"]["train"]["dropped"] == {"bad row": 1, "does not fit the template": 2}
    assert made["splits"]["train"]["rows"] == 4
    capped = skipping.model_copy(update={"max_bad_rows": 2})
    with pytest.raises(DataError, match=r"talks\.jsonl:3: .*more than 2 rows of data\.train"):
        run(capped, tmp_path / "capped")


def test_tokens_of_others_are_packed_anew(tmp_path, packed):
    for ending in (".bin", ".idx"):
        shutil.copy(packed / f"train{ending}", tmp_path / f"theirs{ending}")
    ids, mask = [[5, 6, 7, 8], [9, 10]], [0, 0, 1, 1, 0, 0]
    table = {"input_ids": [ids[0] + ids[1]], "loss_mask": [mask], "seq_start_id": [[0, 4]]}
    pq.write_table(pa.table(table), tmp_path / "bridge.parquet")
    sources = [{"path": "theirs.idx", "mask": "all"}, {"path": "bridge.parquet"}]
    made, _ = run(config(tmp_path, train=sources), tmp_path / "packed")
    ours, theirs = PackedDataset(tmp_path / "packed"), PackedDataset(packed)
    counts = made["splits"]["train"]
    assert counts["examples"] == theirs.num_examples + 1 == ours.num_examples
    assert counts["dropped"] == {"nothing to learn": 1}
    for index in range(theirs.num_examples):
        expected = theirs.example(index)
        assert ours.example(index).tokens.tolist() == expected.tokens.tolist()
        assert ours.example(index).spans.tolist() == [[1, len(expected)]]
    assert ours.example(theirs.num_examples).tokens.tolist() == ids[0]
    assert ours.example(theirs.num_examples).spans.tolist() == [[3, 4]]  # masks belong to labels
    page = (tmp_path / "packed" / "report.html").read_text(encoding="utf-8")
    assert "tokenized elsewhere" in page
    with pytest.raises(DataError, match=r"theirs\.idx: .*trained.*mask"):
        run(config(tmp_path, train=[{"path": "theirs.idx"}]), tmp_path / "unmasked")
    write_rows(tmp_path / "test.jsonl", [{"problem": "1 + 1?"}])
    against = {"against": [{"path": "test.jsonl"}]}
    with pytest.raises(DataError, match=r"tokens cannot be compared with benchmarks"):
        run(config(tmp_path, train=sources, contamination=against), tmp_path / "compared")


def test_conversations_train_what_assistants_say(tmp_path):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 + 2?"},
        {"role": "assistant", "content": "4"},
    ]
    rows = [{"messages": talk}, {"messages": talk[:2]}, {"messages": talk}]
    write_rows(tmp_path / "rows.jsonl", rows)
    source = {"path": "rows.jsonl", "messages": "messages"}
    made, _ = run(config(tmp_path, train=[source]), tmp_path / "packed")
    counts = made["splits"]["train"]
    assert counts["examples"] == 1 == counts["dropped"].pop("duplicate")
    assert list(counts["dropped"].values()) == [1]
    tokenizer = load_tokenizer(FIXTURES / "tokenizer")
    example = PackedDataset(tmp_path / "packed").example(0)
    said = [tokenizer.decode(example.tokens[a:b].tolist()) for a, b in example.spans.tolist()]
    assert said == ["2<|eot_id|>", "4<|eot_id|>"]
    filters = {"trim_prefix": True}
    with pytest.raises(DataError, match="the filters read problems and solutions"):
        run(config(tmp_path, train=[source], filters=filters), tmp_path / "filtered")


def test_prompts_that_evaluation_would_send_otherwise_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Prompt, "prompt_ids", lambda self, problem: [1, 2, 3])
    write_rows(tmp_path / "rows.jsonl", ROWS[:5])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*evaluation would send"):
        run(config(tmp_path), tmp_path / "packed")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_worker_cannot_read_is_said_by_its_name(workers, tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS[:5])
    (tmp_path / "c.jsonl").write_text('{"problem": "x"}\n')
    filters = {"remove_contaminated": True, "contamination_file": "c.jsonl"}
    with pytest.raises(DataError, match=r"c\.jsonl:1: expected an object with `problem`"):
        run(config(tmp_path, filters=filters, workers=workers), tmp_path / "packed")
    missing = {**filters, "contamination_file": "nope.jsonl"}
    with pytest.raises(DataError, match=r"nope\.jsonl: .*cannot be read"):
        run(config(tmp_path, filters=missing, workers=workers), tmp_path / "packed")


def test_place_that_cannot_be_made_is_one_sentence(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS[:5])
    inside = tmp_path / "rows.jsonl" / "packed"  # within a file
    for write in (run, lambda data, place: export_json_lines(job(data), place)):
        with pytest.raises(DataError, match=r"rows\.jsonl/packed: cannot be written"):
            write(config(tmp_path), inside)


def test_shards_in_the_place_of_others_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mcore_sft.data.sources.text_blocks.BLOCK_BYTES", 5000)
    write_rows(tmp_path / "rows.jsonl", ROWS[:400])
    data, folder = config(tmp_path), tmp_path / "packed"
    zero, one = (prepare_shard(job(data), folder, index=i, count=2) for i in range(2))
    third = prepare_shard(job(data), folder, index=1, count=3)
    aside = one.rename(tmp_path / "aside")
    for other in (zero, third):
        shutil.copytree(other, one)
        with pytest.raises(
            DataError, match=r"shard-1-of-2: holds shard \d of \d, .*expected shard 1"
        ):
            merge(job(data), folder, count=2)
        with pytest.raises(DataError, match=r"shard-1-of-2: holds shard"):
            prepare_shard(job(data), folder, index=1, count=2)
        shutil.rmtree(one)
    aside.rename(one)
    with monkeypatch.context() as changed:
        changed.setattr("mcore_sft.data.sources.text_blocks.BLOCK_BYTES", 9000)
        with pytest.raises(DataError, match=r"cut into blocks of \[5000, .*expected .*\[9000, "):
            merge(job(data), folder, count=2)
    assert merge(job(data), folder, count=2)["splits"]["train"]["rows"] == 400


def test_benchmark_needs_no_solutions_in_any_form(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [solved("1 + 1?", "2"), solved("2 + 2?", "4")])
    pq.write_table(pa.table({"problem": ["1 + 1?"]}), tmp_path / "test.parquet")
    against = {"against": [{"path": "test.parquet"}]}
    made, _ = run(config(tmp_path, contamination=against), tmp_path / "packed")
    assert made["splits"]["train"]["dropped"] == {"in a benchmark": 1}


def test_padding_of_megatron_bridge_is_the_end_of_the_tokenizer(tmp_path):
    eos = load_tokenizer(FIXTURES / "tokenizer").eos_id
    table = {"input_ids": [[5, 6, 6, eos, eos, eos]], "loss_mask": [[1] * 6], "seq_start_id": [[0]]}
    pq.write_table(pa.table(table), tmp_path / "bridge.parquet")
    run(config(tmp_path, train=[{"path": "bridge.parquet"}]), tmp_path / "packed")
    assert PackedDataset(tmp_path / "packed").example(0).tokens.tolist() == [5, 6, 6, eos]


def test_missing_mask_is_named(tmp_path, packed):
    for ending in (".bin", ".idx"):
        shutil.copy(packed / f"train{ending}", tmp_path / f"theirs{ending}")
    source = {"path": "theirs.idx", "mask": "mask.idx"}
    with pytest.raises(DataError, match=r"mask\.idx: cannot be read \(No such file"):
        run(config(tmp_path, train=[source]), tmp_path / "packed")
