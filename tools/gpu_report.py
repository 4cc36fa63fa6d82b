"""A machine with one GPU in, what this project does there out.

    make gpu-report [WHEELS=DIR] [PARTS="tests loss"]

Writes benchmarks/results/<device>.json and .md. DIR is what tools/carry_wheels.py made: with it
nothing is asked of a network, and the torch of `python3` is used as it is. Each part runs by itself
within its own time; one that fails, crashes or hangs is told with its last lines, and the next
begins. With PARTS the others keep what an earlier run on this device wrote of them. This file needs
nothing but Python: what it installs may fail.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # nothing is installed yet, and what is imported needs nothing

from mcore_sft.base import files  # noqa: E402

VENV = ROOT / ".venv"
PYTHON = str(VENV / "bin" / "python")
RESULTS = ROOT / "benchmarks" / "results"
SUMS = "SHA256SUMS"
LAST_LINES = 60
PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "transformer-engine-cu13"),
    *("transformer-engine-torch", "transformers", "triton", "liger-kernel", "numpy"),
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One command of the report; `writes` is the JSON file that it leaves, if any."""

    name: str
    command: tuple[str, ...]
    minutes: float
    writes: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a part ended: `passed`, `exit code N`, `signal N` or `no end within N min`."""

    ended: str
    seconds: float
    command: str
    last_lines: list[str]
    result: Any = None

    @property
    def passed(self) -> bool:
        """Whether all of it is well."""
        return self.ended == "passed"


def parts(wheels: Path | None, scratch: Path) -> list[Part]:
    """All parts in their order; without `wheels` the set-up is make's own."""
    this = (sys.executable, str(Path(__file__).resolve()))

    def setup(name: str, minutes: float) -> Part:
        return Part(name=name, command=(*this, "--install", name, str(wheels)), minutes=minutes)

    def benchmark(name: str, minutes: float) -> Part:
        file = scratch / f"{name}.json"
        command = (PYTHON, f"benchmarks/{name}.py", "--device", "cuda", "--json", str(file))
        return Part(name=name, command=command, minutes=minutes, writes=file)

    doctor = scratch / "doctor.json"
    installation = (
        [
            setup("packages", 10),
            setup("operators", 15),
            setup("transformer_engine", 30),
        ]
        if wheels
        else [Part(name="setup", command=("make", "setup"), minutes=60)]
    )
    return [
        *installation,
        Part(
            name="doctor",
            command=(PYTHON, "tools/doctor.py", "--json", str(doctor)),
            minutes=5,
            writes=doctor,
        ),
        Part(name="tests", command=("make", "test-gpu"), minutes=30),
        benchmark("loss", 30),
        benchmark("train_step", 60),
    ]


def run(part: Part) -> Outcome:
    """Run one part in a process group of its own, showing what it prints."""
    command = without_places(shlex.join(part.command))
    print(f"\n== {part.name}: {command}", flush=True)
    begun = time.monotonic()
    if part.writes:
        part.writes.unlink(missing_ok=True)
    lines: list[str] = []
    process = subprocess.Popen(
        part.command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "160"},
    )

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(without_places(line.rstrip("\n")))

    # In a thread: a process that has left the group may hold the output open.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait(60 * part.minutes)
        ended = f"exit code {code}" if code > 0 else f"signal {-code}" if code else "passed"
    except subprocess.TimeoutExpired:
        ended = f"no end within {part.minutes:g} min"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has left behind
        process.wait()
    reader.join(5)
    return Outcome(
        ended=ended,
        seconds=round(time.monotonic() - begun, 1),
        command=command,
        last_lines=lines[-LAST_LINES:],
        result=_read(part.writes),
    )


def without_places(text: str) -> str:
    """The report is for other machines too: no folders of this one."""
    for place, told in ((f"{ROOT}/", ""), (str(ROOT), "."), (sys.executable, "python3")):
        text = text.replace(place, told)
    return text


def _read(file: Path | None) -> Any:
    if file is None or not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None  # it was cut off while it was written; how the part ended says the rest


def device() -> dict[str, str]:
    """Name, memory and driver of the first GPU; an error in one sentence where there is none."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout
        name, memory, driver = (field.strip() for field in told.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        raise SystemExit(
            f"error: nvidia-smi names no GPU ({type(error).__name__}: {error}); run this on a "
            "machine with an NVIDIA GPU and its driver"
        ) from None
    return {"device": name, "memory": memory, "driver": driver}


def versions() -> dict[str, str]:
    """What the environment holds of what decides the figures."""
    program = (
        "import json, sys\n"
        "from importlib.metadata import PackageNotFoundError, version\n"
        "def of(name):\n"
        "    try: return version(name)\n"
        "    except PackageNotFoundError: return 'absent'\n"
        "print(json.dumps({name: of(name) for name in sys.argv[1:]} | "
        "{'python': sys.version.split()[0]}))"
    )
    try:
        told = subprocess.run(
            [PYTHON, "-c", program, *PACKAGES], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"environment": f"cannot be asked: {error}"}
    found: dict[str, str] = json.loads(told.stdout)
    return found


def commit() -> str:
    """The commit that is checked out, `-dirty` where files differ from it."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return told.stdout.strip() or "unknown"


def file_name(where: dict[str, str]) -> str:
    """The device in letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", where["device"].lower()).strip("_")


def report(where: dict[str, str], outcomes: dict[str, dict[str, Any]], folder: Path) -> Path:
    """Write <device>.json and <device>.md into `folder`; the path of the second."""
    name = file_name(where)
    written = {**where, "parts": outcomes}
    files.replace(folder / f"{name}.json", json.dumps(written, indent=1) + "\n")
    rows = [
        f"| {part} | {found['ended']} | {found['seconds']:.0f} | {found['date']} {found['commit']} "
        f"| `{found['command']}` |"
        for part, found in outcomes.items()
    ]
    text = [
        f"# {where['device']}",
        "",
        ", ".join(f"{key} {value}" for key, value in where.items() if key != "device"),
        "",
        "| part | ended | seconds | when | command |",
        "|---|---|---|---|---|",
        *rows,
    ]
    for part, found in outcomes.items():
        text += ["", f"## {part}", "", "```", *found["last_lines"], "```"]
    file = folder / f"{name}.md"
    files.replace(file, "\n".join(text) + "\n")
    return file


def earlier(where: dict[str, str], folder: Path) -> dict[str, dict[str, Any]]:
    """The parts that the last report on this device holds."""
    found = _read(folder / f"{file_name(where)}.json") or {}
    return dict(found.get("parts", {}))


def make_report(wanted: Sequence[Part], where: dict[str, str], folder: Path) -> int:
    """Run the parts, write the report after each, and say what failed; the exit code."""
    outcomes = earlier(where, folder)
    file = folder
    failed = []
    for part in wanted:
        outcome = run(part)
        print(f"== {part.name}: {outcome.ended}, {outcome.seconds:.0f} s", flush=True)
        outcomes[part.name] = {
            **asdict(outcome),
            "date": datetime.now(UTC).date().isoformat(),
            "commit": commit(),
        }
        file = report(where | versions(), outcomes, folder)
        if not outcome.passed:
            failed.append(f"{part.name} ({outcome.ended})")
    print(f"\ngpu-report: {file}")
    print("gpu-report: " + (f"FAILED: {', '.join(failed)}" if failed else "everything passed"))
    return int(bool(failed))


# ---- installing what was carried


@contextlib.contextmanager
def carried_files(carried: Path) -> Iterator[list[Path]]:
    """The carried files, whole again in a folder that is removed in the end."""
    with tempfile.TemporaryDirectory() as scratch:
        yield join(carried, Path(scratch))


def join(carried: Path, folder: Path) -> list[Path]:
    """Put the carried files together in `folder`, each as its checksum says."""
    pieces: dict[str, list[Path]] = {}
    for file in sorted(path for path in carried.rglob("*") if path.is_file()):
        if file.name != SUMS:
            pieces.setdefault(re.sub(r"\.piece\d+$", "", file.name), []).append(file)
    lists = sorted(carried.rglob(SUMS))
    if not lists:
        raise SystemExit(
            f"error: {carried} has no {SUMS}; give the folder of tools/carry_wheels.py"
        )
    made = []
    for line in lists[0].read_text(encoding="utf-8").splitlines():
        digest, name = line.split()
        whole = folder / name
        with whole.open("wb") as out:
            for piece in pieces.get(name, []):
                out.write(piece.read_bytes())
        if hashlib.sha256(whole.read_bytes()).hexdigest() != digest:
            raise SystemExit(
                f"error: {name} in {carried} is missing, cut short or damaged; carry it again"
            )
        made.append(whole)
    return made


def install(what: str, carried: Path) -> None:
    """One part of the set-up: `packages`, `operators` or `transformer_engine`."""
    pip = (PYTHON, "-m", "pip", "--isolated", "--disable-pip-version-check")
    add = (*pip, "install", "--no-index", "--no-deps")
    stamps = VENV / ".stamps"  # make's: it finds its own set-up done
    if what == "packages":
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        # The torch of this Python, which may be of a virtual environment itself.
        site = Path(sysconfig.get_path("purelib", vars={"base": str(VENV)}))
        outer = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (site / "machine.pth").write_text("\n".join(outer) + "\n", encoding="utf-8")
        with carried_files(carried) as files:
            wheels = [str(f) for f in files if not f.name.startswith("transformer_engine")]
            bad = []
            if subprocess.run([*add, "--quiet", *wheels], check=False).returncode:
                # One that cannot be installed costs no other.
                ran = [subprocess.run([*add, "--quiet", one], check=False) for one in wheels]
                bad = [f"{Path(one.args[-1]).name}" for one in ran if one.returncode]
        program = "import torch; print('torch', torch.__version__, 'CUDA', torch.version.cuda)"
        subprocess.run([PYTHON, "-c", program], check=True)
        stamps.mkdir(exist_ok=True)
        identity = f"{VENV.resolve()} {'.'.join(map(str, sys.version_info[:2]))}\n"
        (stamps / "venv").write_text(identity, encoding="utf-8")
        for stamp in ("torch", "pins"):
            (stamps / stamp).touch()
        if bad:
            raise SystemExit(f"error: not installed: {', '.join(bad)}")
    elif what == "operators":
        subprocess.run([*add, "--no-build-isolation", "-e", "."], check=True, cwd=ROOT)
        (stamps / "package").touch()
        program = "from mcore_sft.ops import library as l; l.load(); l.load_cuda(); print('built')"
        subprocess.run([PYTHON, "-c", program], check=True)
    else:
        try:
            with carried_files(carried) as files:
                engine = [str(f) for f in files if f.name.startswith("transformer_engine")]
                build = ("--no-build-isolation", "--no-cache-dir", "-v")
                subprocess.run([*add, *build, *engine], check=True, env=os.environ | building())
            program = "import transformer_engine.pytorch as te; print('imported', te.__name__)"
            subprocess.run([PYTHON, "-c", program], check=True)
        except subprocess.CalledProcessError:
            # Megatron-core imports what is half there, and nothing else would run.
            names = [f"transformer-engine{part}" for part in ("", "-torch", "-cu13")]
            subprocess.run([*pip, "uninstall", "--yes", *names], check=False)
            raise


def building() -> dict[str, str]:
    """The variables by which Transformer Engine's extension builds here, asking no network.

    Its headers of cuDNN and NCCL come with torch, in packages that no compiler knows of.
    """
    program = "import json, nvidia; print(json.dumps(list(nvidia.__path__)))"
    told = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True, check=False)
    roots = [Path(path) for path in json.loads(told.stdout)] if told.returncode == 0 else []
    headers = [
        str(folder)
        for root in roots
        for part in ("cudnn", "nccl", "cu13")
        if (folder := root / part / "include").is_dir()
    ]
    cudnn = [str(root / "cudnn") for root in roots if (root / "cudnn").is_dir()]
    return {
        "NVTE_FRAMEWORK": "pytorch",
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",
        "MAX_JOBS": str(min(16, len(os.sched_getaffinity(0)))),
        "CPATH": os.pathsep.join([*headers, *filter(None, [os.environ.get("CPATH")])]),
        **({"CUDNN_PATH": cudnn[0]} if cudnn else {}),
    }


def main() -> int:
    """Run what the command line names; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="made by tools/carry_wheels.py")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="these and no others")
    parser.add_argument("--install", nargs=2, metavar=("PART", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.install:
        try:
            install(options.install[0], Path(options.install[1]))
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"error: {error}") from None
        return 0
    where = device()
    scratch = ROOT / "results" / "gpu_report"
    scratch.mkdir(parents=True, exist_ok=True)
    # Seen from the root, where the parts run.
    known = parts(options.wheels and Path(os.path.relpath(options.wheels, ROOT)), scratch)
    names = [part.name for part in known]
    wanted = options.parts or names
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--parts {' '.join(unknown)}: expected some of {', '.join(names)}")
    return make_report([part for part in known if part.name in wanted], where, RESULTS)


if __name__ == "__main__":
    sys.exit(main())
