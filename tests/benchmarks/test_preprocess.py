"""The benchmark of preprocessing runs from end to end; its figures are nobody's business here."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import preprocess

FIXTURES = Path(__file__).parent.parent / "fixtures"
SPELT = {"problem": "bell \a, 8 x 12345678", "solution": "a digit of \\u0007 is no number"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The fixtures' rows, laid out as MATH and GSM8K."""
    rows = [json.loads(line) for line in (FIXTURES / "rows.jsonl").open(encoding="utf-8")]
    pairs = [(row["problem"], row["generated_solution"]) for row in rows]
    for name, columns in {"math": ("problem", "solution"), "gsm8k": ("question", "answer")}.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps(dict(zip(columns, pair, strict=True))) + "\n" for pair in pairs]
        (tmp_path / name / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "math" / "test.jsonl").write_text(json.dumps({"problem": pairs[0][0]}) + "\n")
    return tmp_path


def test_rows_are_distinct_and_differ_from_the_source_in_digits_alone(
    data: Path, tmp_path: Path
) -> None:
    with (data / "math" / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(SPELT) + "\n")
    preprocess.make_rows(data, tmp_path / "rows.jsonl", 2000)
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(lines) == 2000 == len(set(lines))
    rows = [json.loads(line) for line in lines]
    source = [json.loads(line) for line in (FIXTURES / "rows.jsonl").open(encoding="utf-8")]
    known = {(bare(row["problem"]), bare(row["generated_solution"])) for row in source}
    assert {(bare(row["problem"]), bare(row["solution"])) for row in rows} <= known
    made = (tmp_path / "rows.jsonl").read_bytes()
    preprocess.make_rows(data, tmp_path / "again.jsonl", 2000)
    assert (tmp_path / "again.jsonl").read_bytes() == made


def bare(text: str) -> str:
    return re.sub(r"[0-9]", "0", text)


def test_what_is_not_as_it_is_known_to_be_is_told(data: Path) -> None:
    figures = {figure.name.strip(): figure for figure in preprocess.contamination(data)}
    same = figures["pairs of the same problem"]
    assert (same.value, same.met, same.known) == (1, False, True)


def test_packing_is_measured() -> None:
    seconds, full, differ = preprocess.packing(2000)
    assert seconds.value > 0
    assert 0.9 < full.value <= 1
    assert differ.met


@pytest.mark.slow
def test_both_pipelines_are_measured_compared_printed_and_written(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(preprocess, "PACKED_LENGTHS", 1000)
    monkeypatch.setattr(preprocess, "contamination", lambda data: iter(()))
    out = tmp_path / "figures.json"
    places = ["--data", data, "--tokenizer", FIXTURES / "tokenizer", "--work", tmp_path / "work"]
    sizes = ["--quick", "--rows", 300, "--peer-rows", 100]
    assert preprocess.main([str(word) for word in (*places, *sizes, "--json", out)]) == 0
    figures = {row["name"].strip(): row for row in json.loads(out.read_text())["rows"]}
    assert figures["ours, tokens a second"]["value"] > 0
    assert figures["ours, anonymous memory"]["value"] > 1e7
    assert figures["shuffled"]["value"] > 0
    assert any(name.startswith("shuffled, in 1000 MB") for name in figures)
    assert figures["conversations through a chat template, tokens a second"]["value"] > 0
    assert "100 examples, ids and masks the same" in figures["peer, tokens a second"]["shown"]
    assert "opening 300 examples" in capsys.readouterr().out

    mask = tmp_path / "work" / "peer" / "mask.bin"
    raw = bytearray(mask.read_bytes())
    raw[-1] ^= 1
    mask.write_bytes(raw)
    with pytest.raises(SystemExit, match="example 99: the peer has other ids"):
        preprocess.require_same(tmp_path / "work" / "packed-300", tmp_path / "work" / "peer")
