import json
from pathlib import Path

from mcore_sft.training.metrics import _cut


def test_lines_after_the_step_that_is_resumed_are_cut(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in (1, 2, 3, 4)]
    file.write_text("\n".join(lines) + '\n{"step": 5, "lo')
    _cut(file, 3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
