"""A machine with one GPU in, what this project does there out.

    make gpu-report [KIT=DIR] [OUT=DIR] [QUICK=1] [PARTS="ops layers"] [DEVICE=cpu|emulated]

Writes <device>.json, .md and .log into OUT (benchmarks/results) and rewrites them after each part,
so a run that is ended early keeps its results. KIT is what tools/carry_wheels.py made: with it
nothing is built, no network is asked, and the torch of `python3` is used as it is. Each part runs
by itself within its own time; one that fails, crashes or hangs is told with its last lines, and the
next begins. They come in the order of what is needed most; QUICK is a visit of some minutes. With
PARTS the others keep what an earlier run on this device wrote of them. DEVICE=cpu is a rehearsal:
all but the kernels. With DEVICE=emulated tests/te and tests/ops compute for these too. This file
needs nothing but Python: what it installs may fail.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tarfile
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
KIT = "kit.tar.xz"
"""`site`: packages; `operators`: the compiled csrc; `kit.json`: what they were made for and of."""
LAST_LINES = 60
PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "transformer-engine-cu13"),
    *("transformer-engine-torch", "transformers", "triton", "liger-kernel", "apex", "numpy"),
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


def parts(kit: Path | None, scratch: Path, *, device: str = "cuda", quick: bool) -> list[Part]:
    """All parts in their order; without `kit` the set-up is make's own."""
    emulated = device == "emulated"

    def limited(quickly: float, minutes: float) -> float:
        return quickly if quick and device == "cuda" else minutes

    def tests(name: str, *places: str, quickly: float, minutes: float, engine: bool = True) -> Part:
        words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10", "-m", "gpu"]
        if emulated:
            words[-1] = "te or gpu" if engine else "not slow and not gpu"
            words += ["-p", "tests.te.plugin"] if engine else []
        command = (PYTHON, *words, *places)
        return Part(name=name, command=command, minutes=limited(quickly, minutes))

    def writing(name: str, *words: str, quickly: float, minutes: float) -> Part:
        file = scratch / f"{name}.json"
        command = (PYTHON, *words, "--json", str(file))
        return Part(name=name, command=command, minutes=limited(quickly, minutes), writes=file)

    def benchmark(
        name: str, script: str, *words: str, quickly: float, minutes: float, short: str = ""
    ) -> Part:
        words = ("--device", "cpu" if emulated else device, *words)
        words = (f"benchmarks/{script}.py", *words, *(short.split() if quick else ()))
        if script != "head":  # which is short
            words = (*words, "--minutes", f"{0.9 * limited(quickly, minutes):g}")
        if emulated and script in ("train_step", "converge"):  # which train
            words = ("-m", "tests.te", *words)
        return writing(name, *words, quickly=quickly, minutes=minutes)

    this = (sys.executable, str(Path(__file__).resolve()))
    peers = ("torch native", "Megatron-core", "QuACK")
    return [
        Part(name="kit", command=(*this, "--install", str(kit)), minutes=3)
        if kit
        else Part(name="setup", command=("make", "setup"), minutes=60),
        *(
            [Part(name="emulation", command=(PYTHON, "-m", "tests.te.fetch"), minutes=5)]
            if emulated
            else []
        ),
        writing("doctor", "tools/doctor.py", quickly=0.75, minutes=5),
        tests("engine", "tests/test_gpu_engine.py", quickly=1.5, minutes=10),
        tests("ops", "tests/ops", quickly=1.5, minutes=15, engine=False),
        tests("test_gpu", "tests/test_gpu.py", quickly=2.5, minutes=30),
        benchmark("head", "head", quickly=1, minutes=10),
        benchmark(
            "loss",
            *("loss", "--only", "ours", "Liger"),
            quickly=1.5,
            minutes=30,
            short="--quick",
        ),
        benchmark(
            "layers",
            *("train_step", "--only", "ours"),
            quickly=3,
            minutes=60,
            short="--quick --layers 8",
        ),
        benchmark("train", "converge", quickly=2, minutes=30, short="--fp8 blockwise"),
        benchmark(
            "loss_peers",
            *("loss", "--only", "ours, main_grad", *peers),
            quickly=1.5,
            minutes=30,
            short="--quick",
        ),
        benchmark(
            "step_peers",
            *("train_step", "--only", "Megatron-core", "transformers"),
            quickly=2.5,
            minutes=60,
            short="--quick --layers 8",
        ),
    ]


def run(part: Part, log: Path | None = None) -> Outcome:
    """Run one part in a process group of its own; what it prints is shown and added to `log`."""
    command = without_places(shlex.join(part.command))
    begun = time.monotonic()
    if part.writes:
        part.writes.unlink(missing_ok=True)
    lines: list[str] = []
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(log.open("a", encoding="utf-8")) if log else None

        def tell(line: str) -> None:
            print(line, flush=True)
            if kept:
                print(line, file=kept, flush=True)

        tell(f"\n== {part.name}: {command}")
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
            with contextlib.suppress(ValueError):  # the log is closed: it was given up on
                for line in process.stdout:
                    lines.append(without_places(line.rstrip("\n")))
                    tell(lines[-1])

        def end(*_: object) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            os._exit(128 + signal.SIGTERM)

        # In a thread: a process that has left the group may hold the output open.
        reader = threading.Thread(target=read, daemon=True)
        before = signal.signal(signal.SIGTERM, end)
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
            signal.signal(signal.SIGTERM, before)
        reader.join(5)
        seconds = round(time.monotonic() - begun, 1)
        tell(f"== {part.name}: {ended}, {seconds:.0f} s")
    return Outcome(
        ended=ended,
        seconds=seconds,
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


def gpu() -> dict[str, str]:
    """Name, memory and driver of the first GPU; an error in one sentence where there is none."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout
        name, memory, driver = (field.strip() for field in told.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        raise SystemExit(
            f"error: nvidia-smi names no GPU ({type(error).__name__}: {error}); run this on a "
            "machine with an NVIDIA GPU and its driver, or rehearse with --device cpu"
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


def open_loopback() -> None:
    """Let processes of this machine meet: under `unshare -n` 127.0.0.1 itself is down."""
    get_flags, set_flags, is_up, layout = 0x8913, 0x8914, 1, "16sH14x"  # linux/sockios.h, net/if.h
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        told = fcntl.ioctl(one, get_flags, struct.pack(layout, b"lo", 0))
        flags = struct.unpack(layout, told)[1]
        if flags & is_up:
            return
        try:
            fcntl.ioctl(one, set_flags, struct.pack(layout, b"lo", flags | is_up))
        except OSError as error:
            raise SystemExit(
                f"error: the interface lo is down ({error}), and ranks meet over it; run `ip link "
                "set lo up` as root"
            ) from None


def make_report(wanted: Sequence[Part], where: dict[str, str], folder: Path) -> int:
    """Run the parts, write the report after each, and say what failed; the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = earlier(where, folder)
    file = folder
    failed = []
    for part in wanted:
        outcome = run(part, folder / f"{file_name(where)}.log")
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


def sources() -> str:
    """SHA-256 of all that the operators are built of."""
    found = hashlib.sha256()
    for file in sorted([ROOT / "setup.py", *(ROOT / "csrc").rglob("*")]):
        if file.is_file():
            found.update(f"{file.relative_to(ROOT)} {file.stat().st_size}\n".encode())
            found.update(file.read_bytes())
    return found.hexdigest()


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


def install(carried: Path) -> None:
    """Make .venv of a kit and of what this Python holds: torch and its libraries among it."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", VENV], check=True)
    unpacked = VENV / "kit"
    with carried_files(carried) as (archive,), tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(VENV)}))
    # The torch of this Python, which may be of a virtual environment itself.
    outer = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    places = [str(unpacked / "site"), *outer, str(ROOT)]
    (site / "machine.pth").write_text("\n".join(places) + "\n", encoding="utf-8")
    for place in outer:
        # Transformer Engine looks for the libraries that torch brings beside the packages of .venv.
        if Path(place, "nvidia").is_dir() and not (site / "nvidia").exists():
            (site / "nvidia").symlink_to(Path(place, "nvidia"), target_is_directory=True)
    made_for = json.loads((unpacked / "kit.json").read_text(encoding="utf-8"))
    check_fit(made_for)
    if made_for["sources"] == sources():
        for operators in (unpacked / "operators").iterdir():
            shutil.copy2(operators, ROOT / "mcore_sft")
    else:
        print("csrc/ is not what the kit was made of; building the operators here", flush=True)
        subprocess.run([PYTHON, "setup.py", "-q", "build_ext", "--inplace"], check=True, cwd=ROOT)
    stamps = VENV / ".stamps"  # make's: it finds its own set-up done
    stamps.mkdir()
    identity = f"{VENV.resolve()} {'.'.join(map(str, sys.version_info[:2]))}\n"
    (stamps / "venv").write_text(identity, encoding="utf-8")
    for stamp in ("torch", "pins", "package"):
        (stamps / stamp).touch()
    program = "from mcore_sft.ops import library as l; l.load(); l.load_cuda(); print('loaded')"
    subprocess.run([PYTHON, "-c", program], check=True, cwd=ROOT)


def check_fit(made_for: dict[str, Any]) -> None:
    """End with an error unless the kit was made for this Python and the torch that it holds."""
    program = "import torch; print(torch.__version__.partition('+')[0], torch.version.cuda)"
    told = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True, check=False)
    if told.returncode:
        raise SystemExit(f"error: python3 has no torch that can be imported:\n{told.stderr}")
    torch, cuda = told.stdout.split()
    found = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}", "torch": torch, "cuda": cuda}
    wanted = {name: made_for[name] for name in found}
    print(f"kit of {made_for['commit']}: {wanted}, architectures {made_for['architectures']}")
    if found != wanted:
        raise SystemExit(
            f"error: the kit was made for {wanted}, and this machine has {found}; make one for it "
            "with tools/carry_wheels.py"
        )


def main() -> int:
    """Run what the command line names; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kit", type=Path, metavar="DIR", help="made by tools/carry_wheels.py")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="a visit of some minutes")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="these and no others")
    parser.add_argument("--device", choices=("cuda", "cpu", "emulated"), default="cuda")
    parser.add_argument("--install", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.install:
        try:
            install(options.install)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"error: {error}") from None
        return 0
    open_loopback()
    where = gpu() if options.device == "cuda" else {"device": options.device}
    scratch = ROOT / "results" / "gpu_report"
    scratch.mkdir(parents=True, exist_ok=True)
    # Seen from the root, where the parts run.
    kit = options.kit and Path(os.path.relpath(options.kit, ROOT))
    known = parts(kit, scratch, device=options.device, quick=options.quick)
    names = [part.name for part in known]
    wanted = options.parts or names
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--parts {' '.join(unknown)}: expected some of {', '.join(names)}")
    if names[0] not in wanted and not (VENV / "bin" / "python").exists():
        parser.error(f"--parts {' '.join(wanted)}: there is no {VENV.name}; ask for {names[0]} too")
    folder = options.out or (RESULTS if options.device == "cuda" else scratch)
    return make_report([part for part in known if part.name in wanted], where, folder)


if __name__ == "__main__":
    sys.exit(main())
