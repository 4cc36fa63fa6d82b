import sys
from pathlib import Path

import preprocess
import pytest

from mcore_sft import command
from mcore_sft.data.dataset import PackedDataset

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture
def experiment(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text(
        f"name: fixture\noutput: {tmp_path / 'run'}\n"
        f"model: {{path: {FIXTURES / 'tokenizer'}}}\n"
        f"data: {{root: {FIXTURES}, train: [{{path: rows.jsonl}}], workers: 1}}\n",
        encoding="utf-8",
    )
    return file


def preprocess_with(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["preprocess.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        command.run(preprocess.main)
    return stopped.value.code


def test_writes_the_dataset_beside_the_run_and_prints_its_table(experiment, monkeypatch, capsys):
    overrides = ["data.sequence_length=256", "prompt.template=chat"]
    assert preprocess_with(monkeypatch, "--config", experiment, *overrides) == 0
    folder = experiment.parent / "run" / "data"
    dataset = PackedDataset(folder)
    shown = capsys.readouterr().out
    assert "packing efficiency" in shown
    assert "dropped: longer than the sequence" in shown
    assert str(folder) in shown
    assert dataset.manifest["inputs"]["prompt"]["template"] == "chat"


def test_show_writes_nothing(experiment, monkeypatch, capsys):
    assert preprocess_with(monkeypatch, "--config", experiment, "--show", 2) == 0
    shown = capsys.readouterr().out
    assert "rows.jsonl:2" in shown
    assert "<|begin_of_text|>" in shown
    assert not (experiment.parent / "run").exists()


def test_tokenizer_too_large_for_the_model_stops_before_anything_is_written(
    experiment, monkeypatch, capsys
):
    model = experiment.parent / "model"
    model.mkdir()
    (model / "config.json").write_text('{"vocab_size": 640}', encoding="utf-8")
    overrides = [f"model.path={model}", f"model.tokenizer={FIXTURES / 'tokenizer'}"]
    assert preprocess_with(monkeypatch, "--config", experiment, *overrides) == 2
    assert "701 tokens" in capsys.readouterr().err
    assert not (experiment.parent / "run").exists()
