import json
import shutil
from collections.abc import Callable
from pathlib import Path

import evaluate
import pytest

from mcore_sft.base.errors import UserError
from mcore_sft.data.text.tokenizer import load_tokenizer
from mcore_sft.evaluation.errors import EvaluationError
from tests.evaluation.stand_in import make_python
from tests.tiny import make_model

TOKENIZER = Path(__file__).parent.parent / "fixtures" / "tokenizer"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = load_tokenizer(TOKENIZER)
    make_model(folder, vocab_size=tokenizer.vocab_size + 3, eos_token_id=tokenizer.eos_id)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"question": f"{n} + 1", "answer": f"sum\n#### {n + 1}"} for n in range(5)]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


SHORT = ("evaluation.max_new_tokens=4", "evaluation.precision=fp32")
MARKUP = ("prompt.template=llama3-instruct", "prompt.instruction=null")


def test_a_folder_and_a_file_become_a_report(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    where = ("--model", model, "--benchmark", "gsm8k", "--data", data, "--output", out)
    call(monkeypatch, *where, "--limit", 3, *SHORT, *MARKUP)
    printed = capsys.readouterr().out
    assert "-------------------------- gsm8k ---------------------------" in printed
    assert "greedy          | 3           |" in printed
    assert f"model_name='{model.name}' dataset_name='gsm8k'" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["prompt"]["template"] == "llama3-instruct"
    assert report["benchmark"]["problems"] == 3


def test_the_prompt_is_never_guessed(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("--model", model, "--benchmark", "gsm8k", "--data", data)
    with pytest.raises(EvaluationError, match=r"prompt\.template="):
        call(monkeypatch, *where, *SHORT)
    with pytest.raises(EvaluationError, match=r"prompt\.template="):
        call(monkeypatch, *where, *SHORT, "prompt.instruction=null")


def test_the_prompt_it_was_trained_with(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = {
        "text_begin": "<|begin_of_text|>", "user_begin": "Q ", "user_end": " A",
        "assistant_end": "<|eot_id|>", "stop_phrases": ["<|eot_id|>"],
    }  # fmt: skip
    record = model / "mcore_sft.json"
    record.write_text(
        json.dumps({"format": 1, "prompt": {"template": template, "instruction": None}})
    )
    where = ("--model", model, "--benchmark", "gsm8k", "--data", data, "--output", tmp_path / "out")
    try:
        call(monkeypatch, *where, "--limit", 1, *SHORT)
    finally:
        record.unlink()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["prompt"]["template"]["user_begin"] == "Q "


def test_what_is_missing_is_named(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationError, match="--benchmark NAME"):
        call(monkeypatch, "--model", model, *MARKUP)
    with pytest.raises(EvaluationError, match="expected at least 1"):
        call(monkeypatch, "--model", model, "--benchmark", "gsm8k", "--data", data, "--limit", 0)


def test_samples_are_named_with_the_benchmark(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    where = ("--model", model, "--data", data, "--output", out, "--limit", 2)
    call(monkeypatch, *where, "--benchmark", "gsm8k:2", *SHORT, *MARKUP)
    assert json.loads((out / "report.json").read_text())["benchmark"]["samples"] == 2
    assert len((out / "verdicts.jsonl").read_text().splitlines()) == 6
    with pytest.raises(EvaluationError, match="expected NAME or NAME:SAMPLES, such as math:8"):
        call(monkeypatch, *where, "--benchmark", "gsm8k:x")


def asked(data: Path, *names: str) -> str:
    """An override that names `data` as so many benchmarks."""
    return f"evaluation.benchmarks={json.dumps([{'name': n, 'path': str(data)} for n in names])}"


def test_several_benchmarks_are_one_run(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    where = ("--model", model, "--output", out, "--limit", 1, asked(data, "a", "b", "c"), *SHORT)
    call(monkeypatch, *where, "--benchmark", "c", "--benchmark", "a:1", *MARKUP)
    assert [path.name for path in sorted(out.iterdir())] == ["a", "c"]
    printed = capsys.readouterr().out
    assert 0 < printed.index(" c ---") < printed.index(str(out / "c" / "report.html"))
    assert printed.index(str(out / "c" / "report.html")) < printed.index(" a ---")
    samples = [json.loads((out / n / "report.json").read_text())["benchmark"] for n in "ac"]
    assert [row["samples"] for row in samples] == [1, 0]
    call(monkeypatch, *where, *MARKUP)
    assert [path.name for path in sorted(out.iterdir())] == ["a", "b", "c"]


def test_a_benchmark_is_named_once(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("--model", model, "--output", tmp_path / "out", *SHORT, *MARKUP)
    for twice in (
        (asked(data, "a"), "--benchmark", "a", "--benchmark", "a:2"),
        (asked(data, "a", "b", "a"),),
    ):
        with pytest.raises(EvaluationError, match="benchmark a is named 2 times"):
            call(monkeypatch, *where, *twice)
    with pytest.raises(EvaluationError, match="--data holds one benchmark"):
        call(monkeypatch, *where, "--benchmark", "a", "--benchmark", "b", "--data", data)


Damage = Callable[[Path], object]


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut(name: str, size: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def written(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def test_the_configuration_is_printed_without_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        call(monkeypatch, "--print-config", "evaluation.max_new_tokens=7")
    assert "max_new_tokens: 7" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, "--benchmark", "gsm8k")
    assert "required: --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, r"no config\.json here; give --model a Hugging Face folder"),
        (without("config.json"), r"no config\.json here; give --model a Hugging Face folder"),
        (cut("config.json", 100), r"/config\.json: cannot be read .*export the model again"),
        (written("config.json", "{}"), "`model_type` key .*mend its config.json"),
        (without("model.safetensors"), "no weights here; .*copy them here"),
        (cut("model.safetensors", 5000), r"/model\.safetensors: .*copy it here again"),
        (cut("model.safetensors", 50), r"/model\.safetensors: .*copy it here again"),
        (without("tokenizer.json"), "no tokenizer here; .*copy those of the model's tokenizer"),
        (cut("tokenizer.json", 500), r"/tokenizer\.json: not a tokenizer\.json"),
        (written("mcore_sft.json", "{"), r"/mcore_sft\.json: .* cannot be read .*give prompt"),
        (written("mcore_sft.json", "{}"), r"/mcore_sft\.json: .* cannot be read .*give prompt"),
    ],
)
def test_a_damaged_folder_is_said(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Damage,
    said: str,
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(model, folder)
    damage(folder)
    with pytest.raises(UserError, match=said):
        call(monkeypatch, "--model", folder, asked(data, "a"), *SHORT, *MARKUP)


def test_a_home_folder_is_found_wherever_a_path_begins_with_it(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "model").symlink_to(model)
    shutil.copy(data, home / "asked.jsonl")
    make_python(home)
    (home / "shots.yaml").write_text(
        "{prefix: See., template: '', suffix: '', examples: [{problem: p, solution: s}]}"
    )
    engine = ("evaluation.engine=vllm", "evaluation.vllm.python=~/python")
    paths = (
        asked(Path("~/asked.jsonl"), "a"),
        *engine,
        "evaluation.few_shot=1",
        "evaluation.few_shot_examples=~/shots.yaml",
    )
    call(monkeypatch, "--model=~/model", "--output=~/out", *paths, *SHORT, *MARKUP)
    report = json.loads((home / "out" / "report.json").read_text())
    assert report["model"]["folder"] == str(home / "model")
    assert report["evaluation"]["vllm"]["python"] == str(home / "python")
    assert report["prompt"]["few_shot"] == "See."
    assert report["engine"]["vllm"] == "9.9"
    # and in an experiment file, whose data.root may begin so too
    (home / "run.yaml").write_text(
        "name: home\nmodel: {path: '~/model'}\ndata: {root: '~'}\n"
        "prompt: {template: llama3-instruct, instruction: null}\n"
        "evaluation: {engine: vllm, vllm: {python: '~/python'}, precision: fp32,\n"
        "  max_new_tokens: 4, benchmarks: [{name: a, path: asked.jsonl}]}\n"
    )
    call(monkeypatch, "--model=~/model", "--output=~/two", "--config", home / "run.yaml")
    assert json.loads((home / "two" / "report.json").read_text())["engine"]["vllm"] == "9.9"
    where = ("--model=~/model", "--data=~/asked.jsonl", "--output=~/three")
    call(monkeypatch, *where, "--benchmark", "b", *engine, *SHORT, *MARKUP)
    assert (home / "three" / "report.json").exists()
