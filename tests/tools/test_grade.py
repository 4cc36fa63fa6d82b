import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def grade(
    tmp_path: Path, lines: list[str], *arguments: str
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    source, output = tmp_path / "answers.jsonl", tmp_path / "verdicts.jsonl"
    source.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    ran = subprocess.run(
        [
            sys.executable,
            ROOT / "tools/grade.py",
            "--input",
            source,
            "--output",
            output,
            *arguments,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=tmp_path,
    )
    if not output.exists():
        return ran, []
    return ran, [json.loads(line) for line in output.read_text().splitlines()]


def test_one_verdict_a_row_in_order(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": 7, "gold": "2^m+2", "prediction": "2+2^m"},
        {"expected_answer": "5", "response": r"so \boxed{6}", "id": "b"},
        {"gold": 5, "prediction": 5},
        {"gold": "5", "prediction": None},
        {"gold": "5", "response": r"\boxed{}"},
        {"gold": "5", "response": "and so", "finish_reason": "length"},
        {"gold": "5", "generation": r"\boxed{5}", "predicted_answer": "5"},
    ]
    ran, verdicts = grade(tmp_path, [json.dumps(row) for row in rows])
    assert ran.returncode == 0, ran.stderr
    assert verdicts == [
        {"id": 7, "verdict": "equal", "rule": "math_verify", "extracted": "2+2^m"},
        {"id": "b", "verdict": "different", "rule": "number", "extracted": "6"},
        {"verdict": "equal", "rule": "same_text", "extracted": "5"},
        {"verdict": "no_answer", "rule": "null", "extracted": None},
        {"verdict": "no_answer", "rule": "empty", "extracted": ""},
        {"verdict": "no_answer", "rule": "truncated", "extracted": None},
        {"verdict": "equal", "rule": "same_text", "extracted": "5"},
    ]
    assert "7 rows" in ran.stdout
    assert "correct 42.86%, 95 % interval" in ran.stdout


def test_the_policy_decides(tmp_path: Path) -> None:
    lines = [json.dumps({"gold": "5", "response": "The answer is 5."})]
    _, verdicts = grade(tmp_path, lines)
    assert verdicts[0]["verdict"] == "no_answer"
    _, verdicts = grade(tmp_path, lines, "--policy", "final_answer")
    assert (verdicts[0]["verdict"], verdicts[0]["extracted"]) == ("equal", "5")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"gold": "5", "prediction": "5"', "line 1: broken JSON"),
        ("[1]", "line 1: expected a JSON object, given list"),
        (
            '{"prediction": "5"}',
            "line 1: no gold answer; expected a text in gold or expected_answer",
        ),
        ('{"gold": "5", "pred": "5"}', "line 1: nothing to grade; expected response, generation"),
        ('{"gold": ["5"], "prediction": "5"}', "line 1: gold is list, expected a text or a number"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, complaint: str) -> None:
    ran, verdicts = grade(tmp_path, [line])
    assert ran.returncode == 2
    assert complaint in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not verdicts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--timeout", "abc"], "--timeout: expected seconds, above 0 and below 86400"),
        (["--timeout", "0"], "such as 10 or 0.5; given '0'"),
        (["--timeout", "nan"], "given 'nan'"),
        (["--processes", "x"], "--processes: expected a whole number, 0 or more; given 'x'"),
        (["--processes", "-1"], "given '-1'"),
        (["--output", "none/there.jsonl"], "there is no folder"),
        (["--output", "."], "it is a folder"),
    ],
)
def test_what_cannot_be_asked_is_said_before_any_work(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    # the rows would be complained of when they are read
    ran, verdicts = grade(tmp_path, ["no JSON"], *arguments)
    assert ran.returncode == 2
    assert said in ran.stderr
    assert "_" not in ran.stderr.rpartition("error: ")[2].replace(str(tmp_path), "")
    assert not verdicts


def test_verdicts_go_straight_into_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "pipe").symlink_to("/dev/stdout")
    line = json.dumps({"gold": "5", "prediction": "6"})
    ran, _ = grade(tmp_path, [line], "--output", "pipe")
    assert json.loads(ran.stdout.splitlines()[0])["verdict"] == "different"
    assert (tmp_path / "pipe").is_symlink()


HOSTILE = [
    "__import__('pathlib').Path('MARKER').touch()",
    r"\boxed{__import__('pathlib').Path('MARKER').touch()}",
    r"\boxed{\text{open('MARKER','w')}}",
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{(10^9)!}",
    r"\boxed{\binom{10^9}{5\cdot 10^8}}",
    r"\boxed{\sum_{k=1}^{10^9} \frac{1}{k}}",
    "\\boxed{" + "(" * 100_000 + "1" + ")" * 100_000 + "}",
    "\\boxed{" + "9" * 1_000_000 + "}",
    "\\" * 1_000_000,
    r"\boxed{" * 100_000,
]


@pytest.mark.parametrize(
    ("policy", "field"),
    [("last_box", "response"), ("nemo_rl", "response"), ("last_box", "prediction")],
)
def test_hostile_answers_leave_no_trace(tmp_path: Path, policy: str, field: str) -> None:
    pytest.importorskip("gmpy2", reason="with gmpy2 a large factorial does not heed any signal")
    lines = [json.dumps({"gold": "5", field: text}) for text in [*HOSTILE, r"\boxed{5}"]]
    ran, verdicts = grade(tmp_path, lines, "--timeout", "2", "--policy", policy)
    assert ran.returncode == 0, ran.stderr
    assert [row["verdict"] for row in verdicts][-1] == "equal"
    assert "equal" not in {row["verdict"] for row in verdicts[:-1]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "verdicts.jsonl"]
