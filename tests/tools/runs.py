"""Folders as tools/evaluate.py leaves them, as far as compare.py and summarize.py read them."""

import json
from pathlib import Path
from typing import Any

SHARE = {"percent": 50.0, "hits": 1, "total": 2, "wilson95": [9.5, 90.5]}


def write_run(folder: Path, right: list[bool], **change: Any) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {
            "id": f"p{number}",
            "sample": 0,
            "problem": f"question {number}",
            "expected_answer": "5",
            "response": "so it is",
            "extracted": "5" if is_right else None,
            "verdict": "equal" if is_right else "no_answer",
            "rule": "same_text" if is_right else "no_box",
        }
        | change
        for number, is_right in enumerate(right)
    ]
    report = {
        "format": 2,
        "benchmark": {"name": "mine", "problems": len(rows)},
        "score": {"symbolic_correct": SHARE | {"percent": 100 * sum(right) / len(right)}},
        "model": {"folder": "m", "files": {}},
        "evaluation": {"policy": "last_box"},
        "text": "",
    }
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "answers.jsonl").write_text("")
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "report.txt").write_text("")
    return folder
