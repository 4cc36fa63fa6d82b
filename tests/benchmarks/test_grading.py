import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def write(file: Path, *rows: dict[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_cases_are_compared_and_a_disagreement_is_an_error(tmp_path: Path) -> None:
    right = [
        {"gold": "52_8", "prediction": "52_7", "expected_equal": False},
        {"gold": "-5", "response": r"$-\\boxed{5}$", "expected_equal": True},
        {"gold": "5", "response": "So 5.", "policy": "final_answer", "expected_equal": True},
    ]
    wrong = {"id": "x1", "gold": "1/2", "prediction": "0.5", "expected_equal": False, "kind": "k"}
    command = [sys.executable, ROOT / "benchmarks/grading.py", "--cases", tmp_path / "cases.jsonl"]
    for rows, code in ((right, 0), ([*right, wrong], 1)):
        write(tmp_path / "cases.jsonl", *rows)
        ran = subprocess.run(command, cwd=ROOT, timeout=300, capture_output=True, text=True)
        assert ran.returncode == code
        assert f"{len(rows)} cases, {code} disagreements" in ran.stdout
    assert "x1: equal by number, expected not equal: gold '1/2', given '0.5' (k)" in ran.stdout


def test_agreement_extraction_and_speed_are_told(tmp_path: Path) -> None:
    pair = {"gold": "52_8", "prediction": "52_7", "expected_equal": False, "tag": "core"}
    debatable = {"gold": "1", "prediction": "1.0001", "expected_equal": True, "tag": "convention"}
    for name in ("real_pairs_adjudicated", "equivalence_cases"):
        write(tmp_path / f"grading/{name}.jsonl", pair, debatable)
    for name in ("metamorphic_cases", "gsm8k_pairs_labelled"):
        write(tmp_path / f"grading/{name}.jsonl", pair)
    write(
        tmp_path / "grading/extraction_cases.jsonl",
        {"response": r"\boxed{5}", "expected": "5", "form": "raw", "mode": "boxed"},
        {"response": r"\boxed{5}", "expected": "6", "form": "raw", "mode": "boxed"},
        {"response": r"\boxed{5}", "expected": "6", "form": "normalized", "mode": "boxed"},
    )
    write(tmp_path / "outputs/model.jsonl", {"gold": "2^m+2", "response": r"\boxed{2+2^m}"})
    figures = tmp_path / "figures.json"
    command = [sys.executable, ROOT / "benchmarks/grading.py", "--data", tmp_path, "--quick"]
    subprocess.run([*command, "--json", figures], check=True, cwd=ROOT, timeout=300)
    told = json.loads(figures.read_text())
    rows = [(row["grader"], row["rows"], row["false_positives"]) for row in told["agreement"]]
    # math-verify does not heed the base of a numeral
    assert rows == [("ours", 1, 0), ("math-verify", 1, 1)] * 4
    assert told["extraction"] == {"rows": 2, "right": 1}
    assert [row["responses"] for row in told["speed"]] == [1, 1]
