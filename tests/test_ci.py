"""What .ci/run makes of parts that fail, on stand-ins for make and for the search for a Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# `make VENV=.venv-lane PYTHON=... setup` becomes the line `lane setup` of the log.
MAKE = """#!/bin/bash
job="${*: -1}"; [[ "$*" == *VENV=.venv-lane* ]] && job="lane $job"
echo "$job" >>"$LOG"
if [[ ":$FAILING:" == *":$job:"* ]]; then echo "$SAID"; exit 2; fi
"""
FREE = '#!/bin/bash\necho Avail; echo " ${FREE}G"\n'


def ran(
    folder: Path, failing: str = "", said: str = "", free: str = "50", python: str = "/bin/true"
) -> tuple[int, list[str], str]:
    """The exit code, what make was asked for, and the lines at the end."""
    (folder / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    programs = folder / "bin"
    programs.mkdir()
    search = f"#!/bin/bash\necho {python}\n[ -n '{python}' ]\n"
    for name, text in (("make", MAKE), ("df", FREE), ("python3", search)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    log = folder / "log"
    surroundings = {"LOG": str(log), "FAILING": failing, "SAID": said, "FREE": free}
    done = subprocess.run(
        ["bash", str(folder / ".ci" / "run")],
        env=os.environ | surroundings | {"PATH": f"{programs}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, log.read_text().splitlines(), done.stdout.partition("\nci: ")[2]


TEST_TE = ["fetch-te", "test-te"]
ALL = ["setup", "check", "test", "test-layouts", *TEST_TE, "lane setup", "lane lane"]


def test_both_lanes_run_one_after_the_other(tmp_path: Path) -> None:
    code, jobs, told = ran(tmp_path)
    assert (code, jobs) == (0, ALL)
    assert [line.split()[-1] for line in told.splitlines()[: len(ALL)]] == ["0"] * len(ALL)


FAIL = ["setup", "check", "test", "test-layouts", "test-te", "lane lane"]


@pytest.mark.parametrize("failing", FAIL)
def test_the_rest_runs_where_a_part_fails_and_the_whole_fails(tmp_path: Path, failing: str) -> None:
    code, jobs, told = ran(tmp_path, failing)
    assert (code, jobs) == (1, ALL)
    assert told.count("exit code 2") == 1


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ({"python": ""}, "no newer supported Python"),
        ({"free": "7"}, "needs 8 GB, and 7 GB are free"),
        (
            {"failing": "lane setup", "said": "ERROR: OSError: [Errno 28] No space left on device"},
            "packages could not be installed: ERROR: OSError: [Errno 28] No space left on device",
        ),
    ],
)
def test_a_lane_that_cannot_run_is_one_line_and_no_failure(
    tmp_path: Path, case: dict[str, str], why: str
) -> None:
    code, jobs, told = ran(tmp_path / "lane", **case)
    assert code == 0
    assert "lane lane" not in jobs
    (line,) = [line for line in told.splitlines() if "CANNOT" in line]
    assert why in line
    case["failing"] = f"{case.get('failing')}:test"
    assert ran(tmp_path / "both", **case)[0] == 1


def test_files_that_cannot_be_fetched_are_one_line_and_no_failure(tmp_path: Path) -> None:
    said = "ERROR: Could not find a version that satisfies it (from versions: none)"
    code, jobs, told = ran(tmp_path / "none", "fetch-te", said)
    assert (code, jobs) == (0, [job for job in ALL if job != "test-te"])
    assert f"test-te CANNOT run: its files could not be fetched: {said}" in told
    code, _, told = ran(tmp_path / "broken", "fetch-te", "error: hashes differ")
    assert code == 1
    assert "CANNOT" not in told


def test_a_lane_whose_set_up_is_broken_fails(tmp_path: Path) -> None:
    said = "WARNING: Retrying after connection broken by 'Read timed out'\nerror: 'g++' failed"
    code, jobs, told = ran(tmp_path, "lane setup", said)
    assert (code, jobs) == (1, ALL[:-1])
    assert "CANNOT" not in told
