"""What is installed, what fits what, and what an experiment lacks here, each with its mend.

    python tools/doctor.py [--config FILE [key=value ...]] [--gpus N] [--json FILE]

Exit code 0 if the experiment can run here or, without one, training on the CPU; 1 if not. Of an
experiment it asks what the commands themselves ask at their start, by the same functions.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

# Nothing else is imported up here: a package that is absent or broken is a finding.
try:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    from mcore_sft import installed
    from mcore_sft.base.errors import UserError
    from mcore_sft.base.files import write_named
    from mcore_sft.base.terminal import Parser, say
except ImportError as error:
    sys.exit(
        f"WRONG  {sys.executable} lacks this package or what it needs ({error}); run `make setup` "
        "in the root of the repository, then `.venv/bin/python tools/doctor.py`"
    )

if TYPE_CHECKING:
    from mcore_sft.config import RunConfig

OK, NOTE, WRONG = "ok", "note", "WRONG"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing: WRONG is what keeps the experiment from running, a note is not."""

    what: str
    state: str
    found: str
    mend: str = ""


def main() -> int:
    """Tell all that is found; the exit code."""
    arguments = _arguments()
    warnings.filterwarnings("ignore")  # libraries warn of each other's absence as they are imported
    chosen = arguments.config or "training on the CPU"
    left = installed.left_behind("transformer_engine")  # what is imported below hides it
    sections = {
        "Packages": packages(),
        "This machine": machine(),
        "Built for this machine": built(left),
    }
    if arguments.config:
        sections[" ".join([f"For {chosen}", *arguments.overrides])] = experiment(
            arguments.config, arguments.overrides, arguments.gpus
        )
    told: dict[str, list[Finding]] = {}
    for title, findings in sections.items():
        say(title)
        told[title] = [_print(finding) for finding in findings]
    wrong = [one for findings in told.values() for one in findings if one.state == WRONG]
    say(f"{chosen} " + (f"CANNOT run here: {len(wrong)} WRONG above" if wrong else "can run here"))
    if arguments.json:
        content = {
            "can_run": not wrong,
            "config": arguments.config,
            "overrides": arguments.overrides,
            "findings": [
                {"section": title, **asdict(one)} for title, found in told.items() for one in found
            ],
        }
        write_named(Path(arguments.json), json.dumps(content, indent=2) + "\n")
    return int(bool(wrong))


def packages() -> Iterator[Finding]:
    """Python and what we declare that we need, then what some configurations need."""
    here = Path(__file__).resolve().parents[1] / "mcore_sft"
    folder = Path(installed.__file__).resolve().parent
    try:
        wanted = metadata.metadata("mcore-sft")["Requires-Python"]
    except metadata.PackageNotFoundError:
        yield Finding(what="mcore-sft", state=WRONG, found="not installed", mend="make setup")
        return
    yield Finding(
        what="mcore-sft",
        state=OK if folder == here else WRONG,
        found=f"{folder}" + ("" if folder == here else f", which is not {here}"),
        mend="make setup",
    )
    python = platform.python_version()
    yield Finding(
        what="python",
        state=OK if SpecifierSet(wanted).contains(python, prereleases=True) else WRONG,
        found=f"{python} ({sys.executable}), needed {wanted}",
        mend="make PYTHON=python3.13 setup",
    )
    for one in installed.requirements("mcore-sft"):
        yield package(one, WRONG)
    for extra in ("track", "plot"):
        for one in installed.requirements("mcore-sft", extra):
            yield package(one, NOTE)
    yield package(Requirement("triton"), NOTE)


def package(wanted: Requirement, otherwise: str) -> Finding:
    """Whether `wanted` is installed, in a version that fits, and can be imported."""
    name, found = wanted.name, installed.version(wanted.name)
    needed = f", needed {wanted.specifier}" if wanted.specifier else ""
    mend = f"pip install '{name}{wanted.specifier}'"
    if found is None:
        return Finding(
            what=name,
            state=otherwise,
            found=f"not installed{needed}",
            mend="torch brings it with CUDA" if name == "triton" else mend,
        )
    if not wanted.specifier.contains(found, prereleases=True):
        return Finding(what=name, state=otherwise, found=found + needed, mend=mend)
    if error := installed.import_error(name):
        again = mend.replace("install", "install --force-reinstall --no-deps", 1)
        if name == "megatron-core" and installed.version("transformer-engine"):
            again = "mend Transformer Engine, which it imports (below), or pip uninstall it"
        found = f"{found}{needed}; cannot be imported: {error}"
        return Finding(what=name, state=otherwise, found=found, mend=again)
    return Finding(what=name, state=OK, found=found + needed)


def machine() -> Iterator[Finding]:
    """Compilers, driver and GPUs, as far as they are seen without torch."""
    compiler = [os.environ.get("CXX", "g++"), "--version"]
    yield attempt("C++ compiler", lambda: _output(compiler)[0], NOTE, "apt install g++")
    toolkit = "NVIDIA's cuda-toolkit-13-0 (nvcc on PATH or under CUDA_HOME), to build for GPUs"
    yield attempt("nvcc", lambda: f"CUDA {'.'.join(_nvcc())}", NOTE, toolkit)
    yield attempt("NVIDIA driver, GPUs", lambda: "; ".join(_listed()), NOTE, "none on a CPU")


def built(left: str | None) -> Iterator[Finding]:
    """Whether torch and what is compiled for it fit each other and the GPUs.

    `left` is the folder that pip left of Transformer Engine, if it did.
    """
    yield attempt("torch", _torch, WRONG)
    yield attempt("torch on GPUs", _torch_on_gpus, NOTE)
    yield attempt("nvcc for torch", _nvcc_for_torch, NOTE)
    yield attempt("operators on CPU", _operators, WRONG)
    yield attempt("operators on CUDA", _cuda_operators, NOTE)
    if left:
        yield Finding(
            what="Transformer Engine",
            state=NOTE,
            found=f"not installed, but pip left {left}; a run ignores it, other programs may not",
            mend=f"rm -r {shlex.quote(left)}",
        )
    else:
        yield attempt("Transformer Engine", _transformer_engine, NOTE)
    yield attempt("Apex", _apex, NOTE)


def experiment(file: str, overrides: Sequence[str], gpus: int | None) -> Iterator[Finding]:
    """What the commands would refuse of the experiment, or miss."""
    try:
        from mcore_sft.config import load

        config = load(file, overrides)
    except Exception as error:
        yield Finding(what="configuration", state=WRONG, found=_said(error))
        return
    yield attempt("model.path", lambda: _model(config), WRONG)
    yield attempt("tokenizer", lambda: _tokenizer(config), WRONG)
    yield attempt("device", _device, WRONG)
    yield attempt("model.layers, train.fp8", lambda: _layers(config), WRONG)
    yield attempt("parallel", lambda: _parallel(config, gpus), WRONG)
    yield attempt("log", lambda: _log(config), WRONG)
    yield attempt("evaluation.engine", lambda: _engine(config), WRONG)
    if config.evaluation.vllm.python and config.evaluation.engine != "vllm":
        yield attempt("evaluation.vllm.python", lambda: _vllm(config), NOTE)
    packed = config.packed / "manifest.json"
    yield Finding(
        what="packed data",
        state=OK if packed.exists() else NOTE,
        found=f"{config.packed}{'' if packed.exists() else ' is not there yet'}",
        mend=" ".join(["python tools/preprocess.py --config", file, *overrides]),
    )


def attempt(what: str, ask: Callable[[], str], otherwise: str, mend: str = "") -> Finding:
    """What `ask` says; if it raises, `otherwise` and its error (a `UserError` names a mend)."""
    try:
        return Finding(what=what, state=OK, found=ask())
    except Exception as error:
        return Finding(what=what, state=otherwise, found=_said(error), mend=mend)


def _said(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error).partition("; `python tools/doctor.py")[0]
    return " ".join(f"{type(error).__name__}: {error}".split())


def _output(command: list[str]) -> list[str]:
    """The lines that a program prints."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not there") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{command[0]} fails: {_said(error)}") from None
    return ran.stdout.strip().splitlines() or [""]


def _nvcc() -> tuple[str, str]:
    """Major and minor CUDA version of nvcc."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    lines = _output([shutil.which("nvcc") or f"{home}/bin/nvcc", "--version"])
    if release := re.search(r"release (\d+)\.(\d+)", " ".join(lines)):
        return release[1], release[2]
    raise UserError(f"it names no release: {lines}")


def _listed() -> list[str]:
    """Driver, name, memory and compute capability of each GPU that the driver lists."""
    asked = "--query-gpu=driver_version,name,memory.total,compute_cap"
    return _output(["nvidia-smi", asked, "--format=csv,noheader"])


def _torch() -> str:
    import torch

    return f"{torch.__version__}, " + (
        f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    )


def _torch_on_gpus() -> str:
    import torch

    from mcore_sft.runtime import hardware

    if seen := hardware.gpus():
        return "; ".join(seen)
    try:
        listed = _listed()
    except UserError:
        return "no GPU here"
    plain = torch.__version__.partition("+")[0]
    raise UserError(
        f"torch sees no GPU, but the driver lists {'; '.join(listed)}: "
        + (
            f"update the driver for CUDA {torch.version.cuda}, or look at CUDA_VISIBLE_DEVICES"
            if torch.version.cuda
            else f"pip install --force-reinstall torch=={plain}, in a build with CUDA"
        )
    )


def _nvcc_for_torch() -> str:
    import torch

    if torch.version.cuda is None:
        return "not needed: torch is a CPU build"
    major, minor = _nvcc()
    wanted = torch.version.cuda.partition(".")[0]
    if major != wanted:
        raise UserError(
            f"nvcc is of CUDA {major}.{minor}, torch of {torch.version.cuda}; to build for GPUs, "
            f"put an nvcc of CUDA {wanted} on PATH, or name its toolkit by CUDA_HOME"
        )
    return f"CUDA {major}.{minor}, torch's is {torch.version.cuda}"


def _operators() -> str:
    from mcore_sft.ops import library

    library.load()
    return "built, and fits this torch"


def _cuda_operators() -> str:
    from mcore_sft.ops import library

    library.load_cuda()
    return "built, and fits this torch"


def _transformer_engine() -> str:
    from mcore_sft.runtime.device import device
    from mcore_sft.runtime.hardware import check_attention, check_transformer_engine

    check_transformer_engine()
    if (here := device()).type == "cuda":
        check_attention(here)
    wanted = installed.transformer_engine().specifier
    return f"{installed.version('transformer-engine')}, needed {wanted}"


def _apex() -> str:
    from mcore_sft.runtime.hardware import check_apex

    check_apex()
    return f"{installed.version('apex')}, with its CUDA extensions"


def _model(config: "RunConfig") -> str:
    from mcore_sft.checkpoint.safetensors_folder import SafetensorsFolder
    from mcore_sft.model import families

    found = families.read(config.model.path)
    found.check(config.parallel, config.data.sequence_length)
    weights = SafetensorsFolder(config.model.path)
    types = " and ".join(
        f"{count} tensors in {name}" for name, count in weights.types(weights.names()).items()
    )
    return f"{config.model.path}: {found.layers} layers of width {found.hidden}, {types}"


def _tokenizer(config: "RunConfig") -> str:
    from mcore_sft.data.text.fit import check_fit
    from mcore_sft.data.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model.tokenizer_path, gigatoken=config.data.gigatoken)
    check_fit(tokenizer, config.model.path)
    return str(config.model.tokenizer_path)


def _device() -> str:
    from mcore_sft.ops import library
    from mcore_sft.runtime.device import device
    from mcore_sft.runtime.hardware import check_architecture

    here = device()
    check_architecture(here)
    if here.type == "cuda":
        library.load_cuda()
    return here.type


def _layers(config: "RunConfig") -> str:
    from mcore_sft.runtime.device import device
    from mcore_sft.runtime.hardware import layer_implementation

    layers = layer_implementation(config.model, config.train, device())
    return f"{layers}, fp8 {config.train.fp8}"


def _parallel(config: "RunConfig", gpus: int | None) -> str:
    from mcore_sft.runtime import hardware

    size = config.parallel.model_size
    here = gpus or len(hardware.gpus())
    if not here:
        return f"a multiple of {size} process(es), on the CPU"
    config.parallel.require_split(
        here,
        "GPU(s)",
        f"take a multiple of {size}, change parallel.*, or say --gpus N for all machines of a run",
    )
    return f"{here} GPU(s) hold the model {here // size} time(s)"


def _log(config: "RunConfig") -> str:
    from mcore_sft.runtime.device import device
    from mcore_sft.runtime.hardware import check_capture
    from mcore_sft.training.beside import trackers

    trackers.check(config.log)
    if config.log.profile and config.log.profiler == "nsys":
        check_capture(device())
        if shutil.which("nsys") is None:
            raise UserError(
                "log.profiler: nsys needs NVIDIA's Nsight Systems, and nsys is not on PATH; "
                "install it, or use log.profiler=torch"
            )
    return "all that it asks for is there"


def _engine(config: "RunConfig") -> str:
    settings = config.evaluation
    if settings.engine == "vllm":
        return _vllm(config)
    if settings.engine == "server":
        from mcore_sft.evaluation.engines import server_engine

        server_engine.check(settings.server)
        return f"server: {settings.server.url} (not asked)"
    return settings.engine


def _vllm(config: "RunConfig") -> str:
    from mcore_sft.evaluation.engines import vllm_engine

    python, versions = vllm_engine.interpreter(config.evaluation.vllm.python)
    return f"vllm: {python} has {json.dumps(versions)}"


def _arguments() -> argparse.Namespace:
    parser = Parser(description="What is here, what fits, and what is missing.")
    parser.add_argument(
        "--config", type=os.path.expanduser, metavar="FILE", help="experiment file (configs/*.yaml)"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="of the run (default: those here)")
    parser.add_argument("--json", type=os.path.expanduser, metavar="FILE", help="write all of it")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_intermixed_args()
    if arguments.overrides and not arguments.config:
        parser.error("KEY=VALUE goes with --config")
    if arguments.gpus is not None and arguments.gpus < 1:
        parser.error(f"--gpus: expected 1 or more, given {arguments.gpus}")
    return arguments


def _print(finding: Finding) -> Finding:
    say(f"  {finding.state:5}  {finding.what:24}  {finding.found}")
    if finding.mend and finding.state != OK:
        say(f"{'':35}-> {finding.mend}")
    return finding


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as problem:
        say(f"error: {problem}", error=True)
        sys.exit(2)
