"""What .ci/run makes of parts that fail, on stand-ins for make and for the search for a Python."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# `make VENV=.venv-lane PYTHON=... setup` becomes the line `lane setup` of the log.
MAKE = """#!/bin/bash
job="${*: -1}"; [[ "$*" == *VENV=.venv-lane* ]] && job="lane $job"
echo "$job" >>"$LOG"
if [[ ":$FAILING:" == *":$job:"* ]]; then echo "$SAID"; exit 2; fi
"""
# What .ci/run itself calls; with these alone on PATH there is no Chromium.
TOOLS = ("bash", "cp", "dirname", "env", "grep", "id", "mktemp", "rm", "tail", "tee")
APT = """#!/bin/bash
echo "apt $*" >>"$LOG"
if [[ "$*" == *"$FAILING_APT"* && -n "$FAILING_APT" ]]; then echo "$SAID"; exit 100; fi
"""
CHROMIUM: Mapping[str, str] = {"chromium": "#!/bin/bash\n"}
FREE = '#!/bin/bash\necho Avail; echo " ${FREE}G"\n'


def ran(
    folder: Path,
    failing: str = "",
    said: str = "",
    free: str = "50",
    python: str = "/bin/true",
    programs: Mapping[str, str] = CHROMIUM,
    **surroundings: str,
) -> tuple[int, list[str], str]:
    """The exit code, what make was asked for, and the lines at the end."""
    (folder / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    path = folder / "bin"
    path.mkdir()
    search = f"#!/bin/bash\necho {python}\n[ -n '{python}' ]\n"
    there = {"make": MAKE, "df": FREE, "python3": search, **programs}
    for name, text in there.items():
        (path / name).write_text(text)
        (path / name).chmod(0o755)
    for name in TOOLS:
        if name not in there:
            (path / name).symlink_to(str(shutil.which(name)))
    log = folder / "log"
    surroundings |= {"LOG": str(log), "FAILING": failing, "SAID": said, "FREE": free}
    done = subprocess.run(
        [str(shutil.which("bash")), str(folder / ".ci" / "run")],
        env=os.environ | surroundings | {"PATH": str(path)},
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


ROOT_USER = {"id": "#!/bin/bash\necho 0\n", "apt-get": APT}


def test_chromium_is_installed_where_there_is_none(tmp_path: Path) -> None:
    code, jobs, told = ran(tmp_path, programs=ROOT_USER, FAILING_APT="")
    update, install, *others = jobs
    assert (code, others) == (0, ALL)
    assert update == "apt -qq update"
    assert install.startswith("apt -qq install --no-install-recommends chromium fonts-noto-core")
    assert told.startswith("chromium ")


@pytest.mark.parametrize(
    ("programs", "said", "code"),
    [
        ({"apt-get": APT, "id": "#!/bin/bash\necho 1000\n"}, "no apt-get that may install it", 0),
        ({"id": "#!/bin/bash\necho 0\n"}, "no apt-get that may install it", 0),
        (ROOT_USER, "E: Unable to locate package chromium", 0),
        (ROOT_USER, "E: Failed to fetch http://deb.debian.org", 0),
        (ROOT_USER, "E: dpkg was interrupted", 1),
    ],
)
def test_where_it_cannot_be_installed_that_is_one_line(
    tmp_path: Path, programs: dict[str, str], said: str, code: int
) -> None:
    found, jobs, told = ran(tmp_path, said=said, programs=programs, FAILING_APT="install")
    assert found == code
    assert [job for job in jobs if not job.startswith("apt")] == ALL
    assert ("CANNOT run in a browser: " in told) == (code == 0)
    assert code or said in told


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
