"""The emulation of CUDA reports what is wrong with a kernel, and nothing of a sound one."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops import emulation
from tests.ops.test_cuda_kernels import WIDE

UNORDERED = r"thread \d+ of block (\d) \w+ what thread \d+ of block \1 \w+, with no barrier between"
OF_ANOTHER = r"of block (\d) \w+ what thread \d+ of block (?!\1)\d wrote, with no barrier between"
DEFECTS = {
    "reads_too_early": UNORDERED,
    "writes_too_early": UNORDERED,
    "reads_what_nobody_wrote": "read before it is written",
    "writes_where_another_block_writes": OF_ANOTHER,
    "shuffles_without_a_lane": "warp that has lost threads",
    "waits_for_a_lane": "threads wait for others for ever",
    "reaches_out_too_early": "before it has surely begun",
    "reaches_out_too_late": "may have ended when another reaches into its memory",
    "reads_before_the_cluster_has_written": OF_ANOTHER,
}
LAUNCHES = {
    (1, 1025, 1, 0): "a block cannot have 1025 threads",
    (9, 32, 9, 0): "a cluster cannot have 9 blocks",
    (5, 32, 4, 0): "5 blocks are no whole clusters",
    (1, 32, 1, 50000): "more shared memory than its kernel is allowed",
}
OUT_OF_BOUNDS = {
    "writes_past_shared_memory": "heap-buffer-overflow",
    "reads_a_vector_that_is_not_aligned": "misaligned address",
}


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def planted(request: pytest.FixtureRequest) -> ctypes.CDLL:
    emulation.set_machine("planted", backwards=request.param)
    library = emulation.load("planted")
    library.run_planted.restype = library.run_nothing.restype = ctypes.c_char_p
    library.run_nothing.argtypes = [*[ctypes.c_uint] * 3, ctypes.c_size_t]
    return library


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_reported(planted: ctypes.CDLL, defect: str) -> None:
    assert re.search(DEFECTS[defect], planted.run_planted(defect.encode()).decode())


@pytest.mark.parametrize("kernel", ["sound", "sound_cluster"])
def test_of_a_sound_kernel_nothing_is(planted: ctypes.CDLL, kernel: str) -> None:
    assert planted.run_planted(kernel.encode()) == b""


@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_launch_beyond_the_limits_is_refused(
    planted: ctypes.CDLL, launch: tuple[int, int, int, int]
) -> None:
    assert LAUNCHES[launch] in planted.run_nothing(*launch).decode()
    assert planted.run_nothing(8, 1024, 8, 48 << 10) == b""


# --- under the sanitizers ---


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulation.build(tmp_path_factory.mktemp("sanitized"), sanitized=True)


def run(built: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with those arguments, beside the sanitizers' library."""
    compiler = os.environ.get("CXX", "g++")
    preload = [
        subprocess.check_output([compiler, f"-print-file-name={name}.so"], text=True).strip()
        for name in ("libasan", "libstdc++")
    ]
    beside = {"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0"}
    environment = {**os.environ, **beside, emulation.BUILT: str(built)}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=emulation.ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("defect", OUT_OF_BOUNDS)
def test_the_sanitizers_see_kernels(sanitized: Path, defect: str) -> None:
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).run_planted(sys.argv[2].encode())"
    well = run(sanitized, "-c", code, str(sanitized / "planted.so"), "sound_cluster")
    assert well.returncode == 0, well.stderr
    ended = run(sanitized, "-c", code, str(sanitized / "planted.so"), defect)
    assert ended.returncode != 0
    assert OUT_OF_BOUNDS[defect] in ended.stderr


TESTS = ["tests/ops/test_cuda_kernels.py", "tests/ops/test_cross_entropy_rows.py"]


@pytest.mark.parametrize(
    "chosen",
    [
        ["-k", f"test_wide_rows and {WIDE}", TESTS[0]],
        pytest.param(
            ["-k", "(a100 or h100) and not missed", "-m", "slow or not slow", *TESTS],
            marks=[pytest.mark.slow, pytest.mark.timeout(1800)],
        ),
    ],
    ids=["some", "all"],
)
def test_under_the_sanitizers(sanitized: Path, chosen: list[str]) -> None:
    finished = run(sanitized, "-m", "pytest", "-q", "-s", "--noconftest", *chosen)
    assert finished.returncode == 0, finished.stdout + finished.stderr
