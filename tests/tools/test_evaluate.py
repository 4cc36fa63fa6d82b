import json
from pathlib import Path

import evaluate
import pytest

from mcore_sft.data.tokenizer import load_tokenizer
from mcore_sft.evaluation.errors import EvaluationError
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
