"""What was trained is what is asked, exported and tokenized: numbers 1 and 2, and the tokenizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluate
import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from mcore_sft.base.terminal import Console
from mcore_sft.checkpoint.describe import Description
from mcore_sft.config import DataConfig, ParallelConfig, PromptConfig, SourceConfig
from mcore_sft.data.encode import prompt_record
from mcore_sft.data.encode.job import Job
from mcore_sft.data.errors import DataError
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.prepare import prepare
from mcore_sft.data.rows import Chats, Pairs
from mcore_sft.data.sources import text_blocks
from mcore_sft.data.text import chat_files
from mcore_sft.data.text.fit import check_fit
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import Tokenizer, load_tokenizer
from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.trained_prompt import Asked, choose
from mcore_sft.training import packs
from tests import runs
from tests.runs import FIXTURES

# --- 2: the exported folder chats as it was trained ---

OWN = {
    "text_begin": "<|begin_of_text|>{{ not jinja }} ",
    "system_begin": 'System "\\": {% ',
    "system_end": "\n\n",
    "system_optional": True,
    "user_begin": "Q: Ł😀\u2028 ",
    "user_end": "\n",
    "assistant_begin": "A:",
    "assistant_end": " #} <|eot_id|> \r\n",
    "stop_phrases": ["<|eot_id|>"],
}
TEMPLATES = ["llama3-instruct", "chatml", "own", "chat"]


def base(folder: Path, **config: Any) -> Path:
    """A tokenizer whose chat template and eos token are of another kind than what is trained."""
    text = (FIXTURES / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    text = text.replace("<|start_header_id|>", "<|im_start|>").replace(
        "<|end_header_id|>", "<|im_end|>"
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "chat_template": "{% for m in messages %}"
        "<|{{ m.role }}|>{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(told | config), encoding="utf-8")
    return folder


def exported(folder: Path, template: str, instruction: str | None = None) -> tuple[Prompt, Any]:
    """A prompt, and the tokenizer that transformers loads from the export."""
    if template == "own":
        template = str(folder / "own.yaml")
        Path(template).write_text(json.dumps(OWN), encoding="utf-8")
    shipped = FIXTURES / "tokenizer" if template == "llama3-instruct" else base(folder / "base")
    tokenizer = load_tokenizer(shipped)
    prompt = Prompt.load(PromptConfig(template=template, instruction=instruction), tokenizer)
    chat_files.save(tokenizer, prompt, folder / "hf")
    return prompt, AutoTokenizer.from_pretrained(folder / "hf")


def said(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


TALKS = [
    said("What is 1 + 1?", "It is 2."),
    said("What is 1 + 1?", "It is 2.", system="Count."),
    said("What is 1 + 1?", "It is 2.", system=""),
    said("1?", "one", "2?", "two", "Ł😀?", "three"),
    said("1?", "one", "2?", "two", system="Count."),
    [
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "one", "tool_calls": None},
    ],
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_02_exported_folder_renders_the_ids_that_were_trained(
    tmp_path: Path, template: str
) -> None:
    prompt, hf = exported(tmp_path, template)
    # the list of text parts is joined before a chat template of the base's own sees it
    talks = TALKS if template != "chat" else TALKS[:-1]
    rows = Chats(name="a.jsonl", numbers=np.arange(len(talks)) + 1, messages=talks)
    examples, dropped = prompt.encode(rows)
    assert dropped == {}
    ends, spans = np.cumsum(examples.lengths), np.cumsum(examples.span_counts)
    for number, talk in enumerate(talks):
        tokens = examples.tokens[ends[number] - examples.lengths[number] : ends[number]].tolist()
        first = spans[number] - examples.span_counts[number]
        answers = [i for i, message in enumerate(talk) if message["role"] == "assistant"]
        for answer, (begin, _) in zip(answers, examples.spans[first : spans[number]], strict=True):
            asked = hf.apply_chat_template(
                talk[:answer], add_generation_prompt=True, return_dict=False
            )
            assert asked == tokens[:begin]
        assert hf.apply_chat_template(talk, return_dict=False) == tokens
    assert hf.eos_token_id in prompt.stop_ids


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("instruction", ["generic/math", None])
def test_02_exported_folder_renders_problems_under_their_instruction(
    tmp_path: Path, template: str, instruction: str | None
) -> None:
    prompt, hf = exported(tmp_path, template, instruction)
    rows = Pairs(
        name="a.jsonl",
        numbers=np.arange(1) + 1,
        problems=pa.array(["1 + 1?"], pa.large_string()),
        solutions=pa.array(["It is 2."], pa.large_string()),
    )
    examples, _ = prompt.encode(rows)
    asked = "1 + 1?"
    if instruction:
        asked = (
            "Solve the following math problem. Make sure to put the answer (and only answer) "
            "inside \\boxed{}.\n\n1 + 1?"
        )
    talk = said(asked, "It is 2.")
    ids = hf.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
    assert ids == prompt.prompt_ids("1 + 1?")
    assert hf.apply_chat_template(talk, return_dict=False) == examples.tokens.tolist()


@pytest.mark.parametrize("template", ["llama3-instruct", "chatml", "own"])
def test_02_what_a_template_cannot_express_raises_in_jinja_too(
    tmp_path: Path, template: str
) -> None:
    _, hf = exported(tmp_path, template)
    talk, tools = said("1?", "one"), [{"type": "function", "function": {"name": "add"}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    for messages, options in (
        (talk, {"tools": tools}),
        (talk, {"documents": [{"text": "a"}]}),
        ([*talk, {"role": "tool", "content": "2"}], {}),
        ([*talk, {"role": "system", "content": "Count."}], {}),
        ([talk[0], call], {}),
        ([talk[0], {**talk[1], "reasoning_content": "so"}], {}),
        ([{"role": "user", "content": [{"type": "image"}]}], {}),
        ([{"role": "user", "content": None}], {}),
    ):
        with pytest.raises(Exception, match=r"has no markup|have no markup|no content|it first"):
            hf.apply_chat_template(messages, tokenize=False, **options)


def test_02_verbatim_exports_no_chat_template(tmp_path: Path) -> None:
    prompt, hf = exported(tmp_path, "passthrough")
    assert prompt.chat_template is None
    assert hf.chat_template is None


def test_02_chat_keeps_its_own_template_and_files(tmp_path: Path) -> None:
    named = [
        {
            "name": "default",
            "template": "{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}",
        }
    ]
    named.append({"name": "rag", "template": "x"})
    tokenizer = load_tokenizer(base(tmp_path / "base", chat_template=named))
    chat_files.save(tokenizer, Prompt("chat", None, tokenizer), tmp_path / "hf")
    told = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert told["chat_template"] == named
    assert told["eos_token"] == "<|eot_id|>"


def test_02_the_export_can_be_trained_on_with_its_own_template(tmp_path: Path) -> None:
    prompt, _ = exported(tmp_path, "chatml", "generic/math")
    again = Prompt("chat", "generic/math", load_tokenizer(tmp_path / "hf"))
    assert again.prompt_ids("1 + 1?") == prompt.prompt_ids("1 + 1?")
    assert again.stop_ids == prompt.stop_ids


# --- 1: a dataset records what its prompts had, and evaluation asks the same ---


def talk(number: int, system: str | None) -> dict[str, Any]:
    return {"messages": said(f"What is {number} + 1?", f"{number + 1}", system=system)}


def pair(number: int) -> dict[str, Any]:
    return {"problem": f"What is {number} + 2?", "generated_solution": f"{number + 2}"}


MIXED = [
    {"path": "talks.jsonl", "messages": "messages", "weight": 2},
    {"path": "pairs.jsonl"},
]


def packed(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> tuple[Any, PackedDataset]:
    """A dataset of conversations and problems; its configuration."""
    folder.mkdir(exist_ok=True)
    for name, key in (("talks", "messages"), ("pairs", "problem")):
        lines = [json.dumps(row) + "\n" for row in rows if key in row]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    changes = {"data__root": str(folder), "data__train": MIXED, **changes}
    config = runs.experiment(folder / "run", folder, **changes)
    runs.pack_rows(config)
    return config, PackedDataset(config.packed)


def hf_folder(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> tuple[Any, Path]:
    """What the export of a run on `rows` would have beside its weights."""
    config, dataset = packed(folder, rows, **changes)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    Description.read(config, dataset, None, None).write(folder / "run")
    return config, folder / "run" / "model"


TALKS_ALONE = [{"path": "talks.jsonl", "messages": "messages"}]


def test_01_manifest_records_what_the_prompts_had(tmp_path: Path) -> None:
    rows = [talk(n, "Count." if n < 3 else None) for n in range(5)]
    rows += [talk(0, "Count."), talk(9, "Add.")]  # the first of them came before
    rows += [pair(n) for n in range(4)]
    _, dataset = packed(tmp_path, rows)
    assert dataset.manifest["splits"]["train"]["prompts"] == {
        "with_instruction": 4,
        "without_instruction": 2 * 6,
        "tokenized_elsewhere": 0,
        "without_system_text": 2 * 2 + 4,
        "distinct_system_texts": 2,
        "system_texts": [
            {"text": "Count.", "examples": 6, "with_instruction": False},
            {"text": "Add.", "examples": 2, "with_instruction": False},
        ],
    }


def test_01_record_of_many_system_texts_is_bounded_and_counts_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_record, "KEPT", 16)
    monkeypatch.setattr(text_blocks, "BLOCK_BYTES", 2000)
    rows = [talk(n, f"You are {n}." if n < 200 or n % 3 else "Count.") for n in range(300)]
    manifests = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        _, dataset = packed(folder, rows, data__train=TALKS_ALONE, data__workers=workers)
        manifests.append(dict(dataset.manifest["splits"]["train"]))
    assert manifests[0] == manifests[1]
    told = manifests[0]["prompts"]
    assert told["distinct_system_texts"] == 200 + 67 + 1  # and "Count."
    assert told["system_texts"][0] == {
        "text": "Count.",
        "examples": 33,
        "with_instruction": False,
    }
    assert len(told["system_texts"]) == prompt_record.LISTED
    files = [(tmp_path / w / "packed" / "train.bin").read_bytes() for w in ("1", "2")]
    assert files[0] == files[1]


def test_01_rare_system_texts_alone_are_no_reason_for_the_instruction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_record, "KEPT", 4)
    rows = [talk(n, f"You are {n}.") for n in range(40)]
    _, model = hf_folder(tmp_path, rows, data__train=TALKS_ALONE)
    tokenizer = load_tokenizer(model)
    asked = choose(model, tokenizer, Asked())
    assert not asked.prompt.has_instruction
    assert str(asked.prompt.system).startswith("You are ")
    # it is not listed, and may have been trained
    other = choose(model, tokenizer, Asked(configured=PromptConfig(system="You are 39.")))
    assert "perhaps never trained, asked for by prompt.system" in other.why
    configured = PromptConfig(instruction="nemo_rl/math")
    with pytest.raises(EvaluationError, match="none of its 40 training examples"):
        choose(model, tokenizer, Asked(configured=configured))


def test_01_conversations_are_not_asked_under_the_instruction(tmp_path: Path) -> None:
    rows = [talk(n, "Count." if n else None) for n in range(6)]
    config, model = hf_folder(tmp_path, rows, data__train=TALKS_ALONE)
    tokenizer = load_tokenizer(model)
    for configured in (None, config.prompt, PromptConfig(**config.prompt.model_dump())):
        chosen = choose(model, tokenizer, Asked(configured=configured))
        assert chosen.prompt.describe() == {
            "template": "llama3-instruct",
            "instruction": None,
            "system": "Count.",
        }
        assert chosen.why == (
            "prompt: template llama3-instruct, no instruction, system text 'Count.'; 5 of 6 "
            "training examples had it"
        )
    plain = choose(model, tokenizer, Asked(keys={"system": None}))
    assert plain.prompt.system is None
    assert "1 of 6 training examples had it" in plain.why


def test_01_problems_are_asked_under_the_instruction_they_had(tmp_path: Path) -> None:
    rows = [pair(n) for n in range(5)]
    source = [{"path": "pairs.jsonl"}]
    _, model = hf_folder(tmp_path, rows, data__train=source, prompt__system="Count.")
    chosen = choose(model, load_tokenizer(model), Asked())
    trained = PackedDataset(tmp_path / "packed").example(0)
    asked = chosen.prompt.prompt_ids("What is 0 + 2?")
    assert asked == trained.tokens[: trained.spans[0, 0]].tolist()
    assert "instruction generic/math, system text 'Count.'; 5 of 5 training" in chosen.why


def test_01_what_a_chat_template_was_given_is_given_again(tmp_path: Path) -> None:
    given = {"date": "2026-11-09", "variables": {"greeting": "hi"}}
    changes = {f"prompt__{name}": part for name, part in given.items()}
    changes |= {"prompt__template": "chat", "data__train": TALKS_ALONE}
    config, model = hf_folder(tmp_path, [talk(n, None) for n in range(6)], **changes)
    tokenizer = load_tokenizer(model)
    for asked in (Asked(), Asked(configured=config.prompt)):
        chosen = choose(model, tokenizer, asked)
        assert chosen.prompt.describe() == {"template": "chat", "instruction": None, **given}
        assert "6 of 6 training examples had it" in chosen.why
    other = choose(model, tokenizer, Asked(keys={"date": "2027-01-01"}))
    assert other.prompt.describe()["date"] == "2027-01-01"
    assert "none of 6 training examples had it, asked for by prompt.date" in other.why
    fixed = choose(model, tokenizer, Asked(keys={"template": "llama3-instruct"}))
    assert fixed.prompt.describe() == {"template": "llama3-instruct", "instruction": None}
    said = PromptConfig(template="chat", date="2027-01-01")
    with pytest.raises(EvaluationError, match=r"had the prompt\.date of the experiment file"):
        choose(model, tokenizer, Asked(configured=said))


def test_01_a_prompt_that_was_never_trained_is_refused_unless_asked_for_by_key(
    tmp_path: Path,
) -> None:
    _, model = hf_folder(tmp_path, [talk(n, None) for n in range(6)], data__train=TALKS_ALONE)
    tokenizer = load_tokenizer(model)
    for other in (
        PromptConfig(instruction="nemo_rl/math"),
        PromptConfig(system="Count."),
        PromptConfig(template="chat"),
    ):
        with pytest.raises(
            EvaluationError, match=r"none of its 6 training examples had the prompt\."
        ):
            choose(model, tokenizer, Asked(configured=other))
        keys = other.model_dump(exclude_unset=True)
        chosen = choose(model, tokenizer, Asked(keys=keys, configured=other))
        assert f"none of 6 training examples had it, asked for by prompt.{next(iter(keys))}" in (
            chosen.why
        )
        assert chosen.prompt.describe().items() >= keys.items()


def test_01_a_folder_without_the_record_is_asked_as_before(tmp_path: Path) -> None:
    _, model = hf_folder(tmp_path, [talk(n, None) for n in range(6)], data__train=TALKS_ALONE)
    tokenizer, file = load_tokenizer(model), model / "mcore_sft.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    del told["trained_prompts"]  # as an older export
    file.write_text(json.dumps(told), encoding="utf-8")
    assert choose(model, tokenizer, Asked()).prompt.describe()["instruction"] == "generic/math"
    configured = Asked(configured=PromptConfig(instruction="nemo_rl/math"))
    assert choose(model, tokenizer, configured).prompt.describe()["instruction"] == "nemo_rl/math"
    file.unlink()  # as another trainer's
    assert choose(model, tokenizer, configured).prompt.describe()["instruction"] == "nemo_rl/math"
    with pytest.raises(EvaluationError, match="nothing says how to ask this model"):
        choose(model, tokenizer, Asked(keys={"system": "Count."}))


def test_01_evaluate_tells_keys_of_the_command_line_from_those_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.yaml").write_text("name: x\nmodel: {path: m}\nprompt: {template: chatml}\n")
    for arguments, keys in (
        (["--config", str(tmp_path / "x.yaml")], {}),
        (["--config", str(tmp_path / "x.yaml"), "prompt.system=null"], {"system": None}),
        (["prompt={instruction: null}"], {"instruction": None}),
        ([], {}),
    ):
        monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", str(tmp_path), *arguments])
        plan = evaluate._plan(evaluate._arguments())
        assert plan.prompt.keys == keys
        configured = plan.prompt.configured
        if "--config" in arguments:
            set_there = configured.model_dump(exclude_unset=True)
            assert set_there == {"template": "chatml", **keys}
        else:
            assert configured is None


# --- a tokenizer that disagrees with the base folder's own ---


def edited(folder: Path, change: Callable[[dict[str, Any]], object], **config: Any) -> Tokenizer:
    """The tokenizer of the fixtures with another tokenizer.json."""
    shutil.copytree(FIXTURES / "tokenizer", folder)
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    change(told)
    file.write_text(json.dumps(told), encoding="utf-8")
    named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(named | config), encoding="utf-8")
    return load_tokenizer(folder, gigatoken=False)


def with_model(folder: Path, rows: int) -> Path:
    """A model folder with the tokenizer of the fixtures."""
    shutil.copytree(FIXTURES / "tokenizer", folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows}), encoding="utf-8")
    return folder


def swap(told: dict[str, Any]) -> None:
    vocab = told["model"]["vocab"]
    vocab["!"], vocab["#"] = vocab["#"], vocab["!"]


def cut(told: dict[str, Any]) -> None:
    """Take away the last token that was learned, as a tokenizer of fewer merges has it."""
    vocab = told["model"]["vocab"]
    last = max(vocab, key=lambda token: vocab[token])
    del vocab[last]
    told["model"]["merges"] = [m for m in told["model"]["merges"] if "".join(m) != last]


def add(*tokens: str) -> Callable[[dict[str, Any]], None]:
    def change(told: dict[str, Any]) -> None:
        for number, token in enumerate(tokens, start=701):
            known = told["added_tokens"][0] | {"id": number, "content": token}
            told["added_tokens"].append(known)

    return change


@pytest.mark.parametrize(
    ("change", "config", "error"),
    [
        (swap, {}, r"token \d+ is '[#!]' \(expected '[#!]', as in the model's own"),
        (cut, {}, r"1 tokens of the model's own .* are missing"),
        (add("<think>"), {}, r"a vocabulary of 701, .* \(got '<think>', 701\)"),
        (add("<pad>", "<think>"), {"pad_token": "<pad>"}, r"a vocabulary of 701"),
        (add("<end>"), {"pad_token": "<end>", "eos_token": "<end>"}, r"\(got '<end>', 701\)"),
    ],
)
def test_tokenizer_that_disagrees_with_the_base_folder_is_refused(
    tmp_path: Path, change: Any, config: dict[str, Any], error: str
) -> None:
    model = with_model(tmp_path / "m", rows=760)
    tokenizer = edited(tmp_path / "other", change, **config)
    with pytest.raises(DataError, match=error):
        check_fit(tokenizer, model)


def test_tokenizer_with_fewer_tokens_than_the_embedding_has_rows_is_normal(tmp_path: Path) -> None:
    model = with_model(tmp_path / "m", rows=760)
    assert check_fit(load_tokenizer(model), model) is None
    assert check_fit(load_tokenizer(FIXTURES / "tokenizer"), model) is None


@pytest.mark.parametrize("rows", [701, 760])
def test_one_added_pad_is_accepted_and_never_fed(tmp_path: Path, rows: int) -> None:
    model = with_model(tmp_path / "m", rows=rows)
    tokenizer = edited(tmp_path / "padded", add("<pad>"), pad_token="<pad>")
    assert tokenizer.pad_id == 701
    assert check_fit(tokenizer, model) == 701
    config, dataset = packed(
        tmp_path / "run",
        [pair(n) for n in range(12)],
        data__train=[{"path": "pairs.jsonl"}],
        model__path=str(model),
        model__tokenizer=str(tmp_path / "padded"),
    )
    shape: Any = SimpleNamespace(vocab=rows)
    ranks: Any = SimpleNamespace(rank=0, size=1)
    mesh: Any = SimpleNamespace(
        data=ranks,
        context=ranks,
        tensor=ranks,
        pipeline=ranks,
        parallel=ParallelConfig(),
    )
    loader = packs.load(config, "train", dataset, tokenizer, shape, mesh)
    for batch in loader.batches(0):
        assert int(batch.tokens.max()) < 701


def test_a_row_that_spells_the_added_pad_is_refused(tmp_path: Path) -> None:
    model = with_model(tmp_path / "m", rows=701)
    tokenizer = edited(tmp_path / "padded", add("<pad>"), pad_token="<pad>")
    rows = [{"problem": "1?", "generated_solution": "a<pad><|eot_id|>"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    config = DataConfig(root=tmp_path, train=(SourceConfig(path="rows.jsonl"),), workers=1)
    job = Job(
        config=config,
        prompt=Prompt("passthrough", None, tokenizer),
        tokenizer=tokenizer,
        console=Console(quiet=True),
        unfed=check_fit(tokenizer, model),
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:1: it holds the token <pad> \(701\)"):
        prepare(job, tmp_path / "packed")
