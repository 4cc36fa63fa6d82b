import io
import json
from pathlib import Path

from mcore_sft.base.terminal import Console
from mcore_sft.config import DataConfig
from mcore_sft.data.encode.job import Job
from mcore_sft.data.report.preview import preview
from mcore_sft.data.sources import survey as sources
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer
from tests.prompts import MathPrompt

TOKENIZER = Path(__file__).parent.parent / "fixtures" / "tokenizer"


def shown(folder: Path, count: int, **data: object) -> list[str]:
    """The lines of a preview of the sources in `folder`."""
    console = Console(file=io.StringIO(), width=200)
    tokenizer = load_tokenizer(TOKENIZER)
    prompt = Prompt.load(MathPrompt(), tokenizer)
    config = DataConfig.model_validate({"root": folder, **data})
    job = Job(config=config, prompt=prompt, tokenizer=tokenizer, console=console)
    preview(job, count, console=console)
    return console.file.getvalue().splitlines()


def write(file: Path, *solutions: str) -> dict[str, str]:
    """A source of rows with these solutions."""
    rows = ({"problem": "1?", "generated_solution": solution} for solution in solutions)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"path": file.name}


def test_the_first_examples_of_every_source_are_shown(tmp_path):
    train = [
        write(tmp_path / "a.jsonl", "a1", "a2", "a3"),
        write(tmp_path / "b.jsonl", "\\boxed{1} \\boxed{2}", "b2"),
    ]
    validation = [write(tmp_path / "c.jsonl", "c1", "c2", "c3")]
    lines = shown(
        tmp_path, 2, train=train, validation=validation, filters={"drop_multi_boxed": True}
    )
    titles = [line.split(": ")[:2] for line in lines if "tokens, " in line]
    assert titles == [
        ["train", f"{tmp_path}/a.jsonl:1"],
        ["train", f"{tmp_path}/a.jsonl:2"],
        ["train", f"{tmp_path}/b.jsonl:2"],
        ["validation", f"{tmp_path}/c.jsonl:1"],
        ["validation", f"{tmp_path}/c.jsonl:2"],
    ]
    assert next(line for line in lines if "way: " in line).startswith("1 dropped on the way: drop")
    assert sum(line.endswith("b2<|eot_id|>") for line in lines) == 1


def test_no_file_is_read_further_than_its_first_examples(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a whole file is read")

    monkeypatch.setattr(sources, "survey_lines", refuse)
    monkeypatch.setattr(sources, "_checksum", refuse)
    train = [write(tmp_path / f"rows{ending}", "a1") for ending in ("", ".jsonl", ".json")]
    assert sum("tokens, " in line for line in shown(tmp_path, 1, train=train)) == 3
