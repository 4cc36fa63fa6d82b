import sys

import pytest

from mcore_sft.checkpoint import export
from tools import to_hf


@pytest.mark.parametrize(
    ("words", "made"),
    [
        ("--checkpoint run/step_7", ("run/step_7", [], "run/hf_step_7", None)),
        ("--checkpoint run/step_7/ --dtype fp16", ("run/step_7", [], "run/hf_step_7", "fp16")),
        ("--checkpoint run/step_7 --output hf", ("run/step_7", [], "hf", None)),
        (
            "--average run/step_7 run/step_14 other/step_21",
            ("run/step_7", ["run/step_14", "other/step_21"], "run/hf_average_7_14_21", None),
        ),
        (
            "--average run/step_7 run/step_14 --output hf --dtype fp32",
            ("run/step_7", ["run/step_14"], "hf", "fp32"),
        ),
    ],
)
def test_what_is_made_of_what(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    made: tuple[str, list[str], str, str | None],
) -> None:
    calls = []

    def record(checkpoint, output, *, others, dtype, console):
        calls.append((str(checkpoint), [str(path) for path in others], str(output), dtype))

    monkeypatch.setattr(export, "export", record)
    monkeypatch.setattr(sys, "argv", ["to_hf.py", *words.split()])
    to_hf.main()
    assert calls == [made]
    assert capsys.readouterr().out == f"wrote {made[2]}\n"


@pytest.mark.parametrize(
    "words", ["", "--checkpoint a --average b c", "--average", "--checkpoint a --dtype fp8"]
)
def test_a_command_line_that_says_too_little_or_too_much(
    monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["to_hf.py", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        to_hf.main()
    assert stopped.value.code == 2
