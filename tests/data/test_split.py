"""What is decided over all rows of a run: repeats, places, weights, what was held out."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcore_sft.data.encode import store
from mcore_sft.data.encode.block import BAD
from mcore_sft.data.encode.collect import CONTAMINATED, DUPLICATE
from mcore_sft.data.encode.store import Bench
from mcore_sft.data.errors import DataError
from mcore_sft.data.export import export_json_lines
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.packs.split import NOT_SAMPLED, TOO_LONG, by_rule
from mcore_sft.data.prepare import merge, prepare_shard
from mcore_sft.data.selection.contamination import Contamination
from tests.data.test_prepare import ROWS, config, contents, job, run, solved, texts, write_rows


def dropped(folder, split="train"):
    """The samples of what was dropped, from the report."""
    return json.loads((folder / "report.json").read_bytes())["splits"][split]["dropped"]


# --- repeats ---


def drawn(count: int) -> list[dict]:
    """Rows of few problems and few solutions, some of which differ only behind their box."""
    draw = random.Random(3)
    return [
        solved(
            f"Problem {draw.randint(0, 40)}?",
            f"Work {draw.randint(0, 4)}.\nSo \\boxed{{1}}." + draw.choice(["", "\nBye.", "\nEnd."]),
            majority_votes=draw.choice([2, 9]),
            total_votes=10,
        )
        for _ in range(count)
    ]


def nemo_skills(rows, *, min_votes=0, trim=False, count=None):
    """By the book: compared when read, filtered, grouped, shuffled, cut, compared when written."""

    def key(row):
        return row["problem"], row["generated_solution"]

    read: dict[tuple, dict] = {}
    for row in rows:
        read.setdefault(key(row), row)
    kept = [row for row in read.values() if row["majority_votes"] >= min_votes]
    if trim:
        kept = [solved(row["problem"], cut(row["generated_solution"])) for row in kept]
    groups: dict[str, list] = {}
    for row in kept:
        groups.setdefault(row["problem"], []).append(row)
    order = [row for group in groups.values() for row in group]
    random.seed(42)
    random.shuffle(order)
    return list(dict.fromkeys(map(key, order[:count])))


def cut(solution: str) -> str:
    return "\n".join(solution.split("\n")[:2])


NEMO = {
    "none": ({}, {}),
    "trim": ({"trim_solutions": True}, {"trim": True}),
    "majority": ({"majority_filter": True, "min_majority_votes": 5}, {"min_votes": 5}),
    "both, sampled": (
        {
            "trim_solutions": True,
            "majority_filter": True,
            "min_majority_votes": 5,
            "downsampling_method": "random",
            "num_output_samples": 90,
        },
        {"trim": True, "min_votes": 5, "count": 90},
    ),
}


@pytest.mark.parametrize("case", NEMO)
def test_rows_are_compared_where_nemo_skills_compares_them(case, tmp_path):
    rows, (filters, book) = drawn(400), NEMO[case]
    write_rows(tmp_path / "rows.jsonl", rows)
    data = config(tmp_path, filters={"order": "nemo_skills", **filters})
    made, _ = run(data, tmp_path / "packed")
    expected = nemo_skills(rows, **book)
    assert texts(tmp_path / "packed") == [solution for _, solution in expected]
    export_json_lines(job(data), tmp_path / "sft.jsonl")
    said = map(json.loads, (tmp_path / "sft.jsonl").read_text().splitlines())
    assert [row["output"] for row in said] == [f"{s}<|eot_id|>" for _, s in expected]
    counts = made["splits"]["train"]
    assert counts["rows"] == 400 == counts["examples"] + sum(counts["dropped"].values())


def test_comparing_twice_gives_the_same_bytes_from_workers_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("mcore_sft.data.sources.text_blocks.BLOCK_BYTES", 9000)
    write_rows(tmp_path / "rows.jsonl", drawn(400))
    filters = {"order": "nemo_skills", **NEMO["both, sampled"][0]}
    alone, _ = run(config(tmp_path, filters=filters), tmp_path / "alone")
    run(config(tmp_path, filters=filters, workers=2), tmp_path / "two")
    data, folder = config(tmp_path, filters=filters), tmp_path / "packed"
    for index in (2, 0, 1):
        prepare_shard(job(data), folder, index=index, count=3)
    assert merge(job(data), folder, count=3) == alone
    assert contents(folder) == contents(tmp_path / "alone") == contents(tmp_path / "two")


@pytest.mark.parametrize("filters", [{}, {"order": "nemo_skills", "trim_solutions": True}])
def test_repeat_is_shown_with_its_text_and_its_original(filters, tmp_path):
    rows = [solved("a?", "1"), *(solved("b?", said) for said in "12"), solved("b?", "2")]
    text = "\n\n".join(map(json.dumps, rows)) + "\n"  # with blank lines
    (tmp_path / "rows.jsonl").write_text(text)
    run(config(tmp_path, filters=filters), tmp_path / "packed")
    (sample,) = dropped(tmp_path / "packed")["duplicate"]
    assert sample["where"].endswith("rows.jsonl:7")
    assert sample["same_as"].endswith("rows.jsonl:5")
    assert "b?" in sample["text"]
    assert sample["text"].endswith("2<|eot_id|>")


def test_repeat_that_the_filters_make_is_shown_with_its_original(tmp_path):
    rows = [solved("a?", "\\boxed{1}\nBye."), solved("b?", "two"), solved("a?", "\\boxed{1}\nEnd.")]
    write_rows(tmp_path / "rows.jsonl", rows)
    filters = {"order": "nemo_skills", "trim_solutions": True}
    run(config(tmp_path, filters=filters), tmp_path / "packed")
    (sample,) = dropped(tmp_path / "packed")["duplicate"]
    places = {sample[key].rpartition("rows.jsonl")[2] for key in ("where", "same_as")}
    assert places == {":1", ":3"}
    assert sample["text"].endswith("\\boxed{1}<|eot_id|>")


def test_same_tokens_with_another_mask_are_another_example(tmp_path):
    ids, masks = [5, 6, 7, 8], ([0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0])
    columns = {"input_ids": [ids] * 3, "loss_mask": list(masks), "seq_start_id": [[0]] * 3}
    pq.write_table(pa.table(columns), tmp_path / "packs.parquet")
    data = config(tmp_path, train=[{"path": "packs.parquet"}])
    made, _ = run(data, tmp_path / "packed")
    assert made["splits"]["train"]["dropped"] == {"duplicate": 1}
    dataset = PackedDataset(tmp_path / "packed")
    assert [dataset.example(i).spans.tolist() for i in range(2)] == [[[3, 4]], [[2, 4]]]
    (sample,) = dropped(tmp_path / "packed")["duplicate"]
    assert sample["same_as"].endswith("packs.parquet:1")


# --- weights, sources, what was held out ---


@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_weight_that_leaves_none_of_a_source_is_an_error(holdout, tmp_path):
    write_rows(tmp_path / "a.jsonl", ROWS[:100])
    write_rows(tmp_path / "b.jsonl", [*ROWS[100:120], *ROWS[:5]])
    sources = [{"path": "a.jsonl"}, {"path": "b.jsonl", "weight": 0.001}]
    settings = {"train": sources, "holdout": {"fraction": holdout}}
    said = r"b\.jsonl: source 1 of data\.train has \d+ examples of 25 rows, .* weight 0\.001 leaves"
    with pytest.raises(DataError, match=said):
        run(config(tmp_path, **settings), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_source_that_makes_no_example_is_an_error(split, tmp_path):
    """Empty, or with no row that is left: here the rows of b repeat those of a."""
    write_rows(tmp_path / "a.jsonl", ROWS[:100])
    sources = {"train": [{"path": "a.jsonl"}], split: [{"path": "a.jsonl"}, {"path": "b.jsonl"}]}
    for rows, said in (
        ([], r"'b\.jsonl': it holds no row"),
        (ROWS[:30], r"b\.jsonl: source 1 of .*"),
    ):
        write_rows(tmp_path / "b.jsonl", rows)
        with pytest.raises(DataError, match=said):
            run(config(tmp_path, **sources), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_held_out_is_not_dropped_and_knows_its_sources(tmp_path):
    write_rows(tmp_path / "a.jsonl", ROWS[:100])
    write_rows(tmp_path / "b.jsonl", ROWS[100:400])
    sources = [{"path": "a.jsonl"}, {"path": "b.jsonl"}]
    data = config(tmp_path, train=sources, holdout={"fraction": 0.1})
    made, _ = run(data, tmp_path / "packed")
    train, validation = made["splits"]["train"], made["splits"]["validation"]
    assert (train["held_out"], train["dropped"]) == (40, {})
    assert train["source_rows"] == [100, 300]
    assert validation["source_rows"] == validation["source_examples"]
    both = zip(train["source_examples"], validation["source_examples"], strict=True)
    assert [sum(one) for one in both] == [100, 300]
    report = json.loads((tmp_path / "packed" / "report.json").read_bytes())["splits"]
    assert [one["source"] for one in report["validation"]["sources"]] == ["a.jsonl", "b.jsonl"]


def test_bad_rows_are_among_the_rows_of_their_source(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [*ROWS[:4], {"problem": 3}])
    made, _ = run(config(tmp_path, on_bad_row="skip"), tmp_path / "packed")
    assert made["splits"]["train"]["source_rows"] == [5]


def test_reasons_stand_in_the_order_of_the_rules(tmp_path):
    told = [NOT_SAMPLED, "trim_prefix", DUPLICATE, "a prompt's own", TOO_LONG, CONTAMINATED, BAD]
    expected = [
        BAD,
        "trim_prefix",
        "a prompt's own",
        CONTAMINATED,
        DUPLICATE,
        NOT_SAMPLED,
        TOO_LONG,
    ]
    assert by_rule(told) == expected
    rows = [solved("a?", "1"), solved("a?", "1"), solved("b?", "\\boxed{1} \\boxed{2}")]
    write_rows(tmp_path / "rows.jsonl", rows)
    made, _ = run(config(tmp_path, filters={"drop_multi_boxed": True}), tmp_path / "packed")
    assert list(made["splits"]["train"]["dropped"]) == ["drop_multi_boxed", "duplicate"]


# --- what is compared with benchmarks ---

LONG = "Find the number of ways to seat eight people around a round table with no rotation."
SHORT = "What is $2+2?$"


def talk(*said: object) -> dict:
    answer = {"role": "assistant", "content": "ok"}
    asked = ({"role": "user", "content": content} for content in said)
    return {"messages": [message for one in asked for message in (one, answer)]}


TALKS = {
    "first": talk(LONG),
    "second": talk("Hello.", LONG),
    "short, in words of its own": talk("Solve this:\n\n" + SHORT, "Why?"),
    "parts": talk("Hello.", [{"type": "text", "text": part} for part in (LONG[:40], LONG[40:])]),
}


@pytest.mark.parametrize("case", TALKS)
def test_every_message_of_a_user_is_compared(case, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [talk("unrelated"), TALKS[case]])
    write_rows(tmp_path / "test.jsonl", [{"problem": LONG}, {"problem": SHORT}])
    data = config(
        tmp_path,
        train=[{"path": "rows.jsonl", "messages": "messages"}],
        contamination={"against": [{"path": "test.jsonl"}]},
    )
    made, _ = run(data, tmp_path / "packed")
    assert made["splits"]["train"]["dropped"] == {"in a benchmark": 1}


def test_pair_names_the_first_row_of_both_sides(tmp_path):
    rows = [solved("unrelated", "1"), solved(LONG.upper(), "2"), solved(LONG.upper(), "3")]
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "test.jsonl", [{"problem": SHORT}, {"problem": LONG}])
    work = job(config(tmp_path, contamination={"against": [{"path": "test.jsonl"}]}))
    bench = Bench(work.recipe(), work.benchmark, 0.9)
    (block,) = (block for _, block in work.blocks("train"))
    file = store.encode(bench, block, 0, tmp_path / "1.block", np.dtype(np.uint16), True)
    (found,) = store.compare(bench, file, np.arange(2))
    assert found.where == f"{tmp_path}/rows.jsonl:2"
    assert found.benchmark == f"{tmp_path}/test.jsonl:2"


def test_pairs_are_written_with_the_first_row_of_a_pair(tmp_path, monkeypatch):
    monkeypatch.setattr("mcore_sft.data.sources.text_blocks.BLOCK_BYTES", 2000)
    rows = [
        *ROWS[:40],
        solved(LONG, "one"),
        *ROWS[40:80],
        *[solved(LONG, f"{i}") for i in range(9)],
    ]
    write_rows(tmp_path / "rows.jsonl", rows * 2)
    write_rows(tmp_path / "test.jsonl", [{"problem": LONG}])
    against = {"against": [{"path": "test.jsonl"}]}
    for workers in (1, 2):
        data = config(tmp_path, contamination=against, workers=workers)
        made, _ = run(data, tmp_path / str(workers))
        assert made["splits"]["train"]["contaminated_problems"] == 1
        text = (tmp_path / str(workers) / "train.contamination.jsonl").read_text()
        (found,) = map(json.loads, text.splitlines())
        assert (found["where"], found["benchmark"]) == ("rows.jsonl:41", "test.jsonl:1")
        assert made["splits"]["train"]["contaminated_by"] == {"test.jsonl": 1}
        assert "rows.jsonl:41" in (tmp_path / str(workers) / "report.html").read_text()


@pytest.mark.parametrize("met", [1, 1 << 20])
def test_each_distinct_text_is_compared_once_by_whoever_is_asked(met, tmp_path, monkeypatch):
    monkeypatch.setattr("mcore_sft.data.sources.text_blocks.BLOCK_BYTES", 2000)
    monkeypatch.setattr(
        "mcore_sft.data.selection.asked._MET", met
    )  # a process forgets what it met, or not
    compared, check = [], Contamination.check

    def checked(self, problems):
        compared.extend(problems)
        return check(self, problems)

    monkeypatch.setattr(Contamination, "check", checked)
    write_rows(tmp_path / "rows.jsonl", [*ROWS[:80], solved(LONG, "one"), *ROWS[:90]])
    talks = [talk(ROWS[3]["problem"], LONG), talk("Hello.", "Hello.")]
    write_rows(tmp_path / "talks.jsonl", talks * 3)
    write_rows(tmp_path / "test.jsonl", [{"problem": LONG}])
    sources = [{"path": "rows.jsonl"}, {"path": "talks.jsonl", "messages": "messages"}]
    against = {"against": [{"path": "test.jsonl"}]}
    data = config(tmp_path, train=sources, contamination=against)
    made, _ = run(data, tmp_path / "packed")
    assert made["splits"]["train"]["dropped"]["in a benchmark"] == 1 + 3
    asked = {row["problem"] for row in ROWS[:90]} | {LONG, "Hello."}
    assert sorted(compared) == sorted(asked)
    del compared[:]
    for index in range(2):
        prepare_shard(job(data), tmp_path / "shards", index=index, count=2)
    assert compared == []
    assert merge(job(data), tmp_path / "shards", count=2) == made
    assert sorted(compared) == sorted(asked)


def test_empty_benchmark_ends_the_run(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS[:5])
    write_rows(tmp_path / "test.jsonl", [])
    against = {"against": [{"path": "test.jsonl"}]}
    with pytest.raises(DataError, match=r"'test\.jsonl': it holds no row"):
        run(config(tmp_path, contamination=against), tmp_path / "packed")
