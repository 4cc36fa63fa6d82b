import json
import sys
from pathlib import Path

import draw_loss
import pytest

from mcore_sft.base.errors import UserError
from mcore_sft.training.beside.curve import read_losses

LINES = [
    {"step": 1, "loss": 2.0},
    {"step": 2, "loss": None},
    {"step": 2, "event": "nonfinite", "packs": [3]},
    {"step": 2, "validation_loss": 1.5},
    {"step": 3, "loss": 1.0},
]


def test_a_run_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"step": 4, "lo')
    assert read_losses(log) == ([(1, 2.0), (3, 1.0)], [(2, 1.5)])
    monkeypatch.setattr(sys, "argv", ["draw_loss.py", str(tmp_path)])
    draw_loss.main()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["draw_loss.py", str(tmp_path)])
    with pytest.raises(UserError, match=r"metrics\.jsonl: not there; give the folder of a run"):
        draw_loss.main()
