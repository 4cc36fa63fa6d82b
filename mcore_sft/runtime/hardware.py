"""What this device can do, and what is in use of it: layers, peak speed, memory, its work."""

import contextlib
import importlib
import importlib.util
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mcore_sft import installed
from mcore_sft.config import ConfigError, ModelConfig, ParallelConfig, TrainConfig

PEAK_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "B200": 2250.0,
    "L40S": 362.0,
}
"""bf16 matrix products without sparsity, 1e12 operations a second, from NVIDIA's data sheets; the
first that is part of the device's name counts."""


_OLDEST = (8, 0)
_FP8_OLDEST = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}
"""Least compute capability, as Transformer Engine 2.9 to 2.11 asks itself; on Blackwell (10.0) and
newer it computes blockwise products as MXFP8."""
_BLOCKWISE_CUDA = (12, 9)
_APEX = ("fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda", "apex.normalization")
"""What the layers call. pip installs Apex without the first two unless the environment asks."""
_INSTALL_APEX = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-cache-dir --no-build-isolation "
    "git+https://github.com/NVIDIA/apex"
)
FUSED_ATTENTION_OLDEST = (9, 0)
"""Least compute capability where Transformer Engine itself has an attention within documents that
keeps no scores; below it takes flash-attn's, and without that one whose scores are of the size
[documents, heads, longest ^ 2]."""
_DETERMINISTIC_ATTENTION = 2**30
_TELLS_MORE = "`python tools/doctor.py --config FILE` tells more"


def gpus() -> list[str]:
    """Name, memory and compute capability of each GPU that torch sees."""
    found = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    return [
        f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {_dotted((gpu.major, gpu.minor))}"
        for gpu in found
    ]


def check_architecture(device: torch.device) -> None:
    """Raise `ConfigError` for a GPU older than what bf16 and our operators are made for."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _OLDEST:
        raise ConfigError(
            f"{_named(device)}; training needs {_dotted(_OLDEST)} (A100) or newer: take such a "
            "GPU, or hide this one and train on the CPU (CUDA_VISIBLE_DEVICES=)"
        )


def chosen_layers(settings: ModelConfig, train: TrainConfig, *, gpu: bool) -> str:
    """`local`, `apex` or `transformer_engine`, which `auto` is for bf16 on a GPU.

    Raises `ConfigError` for what Transformer Engine's layers do not compute as it is asked.
    """
    if settings.layers in ("local", "apex"):
        return settings.layers
    if settings.layers == "auto" and not (gpu and train.precision == "bf16"):
        return "local"
    if train.precision == "fp32":
        raise ConfigError(
            "model.layers: transformer_engine multiplies fp32 numbers as TF32 (got train.precision "
            "fp32, expected bf16). Fix: model.layers=local"
        )
    if train.recompute == "selective":
        raise ConfigError(
            "train.recompute: selective saves nothing with Transformer Engine's layers, whose "
            "attention keeps no scores (got selective, expected none or full). Fix: "
            "train.recompute=none"
        )
    return "transformer_engine"


def layer_implementation(settings: ModelConfig, train: TrainConfig, device: torch.device) -> str:
    """`local` or `transformer_engine`; an error that names the mend where it cannot be had."""
    cuda = device.type == "cuda"
    if settings.layers in ("apex", "transformer_engine") and not cuda:
        raise ConfigError(
            f"model.layers: {settings.layers} needs an NVIDIA GPU, but this process runs on CPU; "
            "use model.layers=local"
        )
    chosen = chosen_layers(settings, train, gpu=cuda)
    if chosen == "transformer_engine":
        check_transformer_engine()
        check_fp8(train.fp8, device)
        check_attention(device)
    elif train.fp8 != "none":
        raise ConfigError(
            f"train.fp8: {train.fp8} needs Transformer Engine's layers, which take an NVIDIA GPU, "
            f"but model.layers is {chosen} here; use train.fp8=none"
        )
    if chosen == "apex":
        check_apex()
    return chosen


def check_transformer_engine() -> None:
    """Raise `ConfigError` unless Transformer Engine is there, fits what is around it, and loads."""
    found, cores = installed.version("transformer-engine"), ("cu12", "cu13")
    wanted = installed.transformer_engine().specifier
    cuda = f"cu{(torch.version.cuda or '13').partition('.')[0]}"
    built = [core for core in cores if installed.version(f"transformer-engine-{core}")]
    if found is None:
        trouble: str | None = "is not installed"
    elif found not in wanted:
        trouble = f"is {found}"
    elif built not in ([], [cuda]):  # one that was built from its source names none
        trouble = f"is built for {' and '.join(built)}, and torch for {cuda}"
    elif trouble := installed.import_error("transformer-engine"):
        trouble = f"{found} cannot be imported ({trouble})"
    if trouble:
        # pip keeps what it has built for another CUDA, under the same name.
        install = "pip install --no-cache-dir --no-build-isolation"
        remove = "pip uninstall -y transformer-engine{,-torch,-cu12,-cu13} && " if found else ""
        raise ConfigError(
            f"model.layers: transformer_engine: Transformer Engine {trouble}; run `{remove}"
            f"{install} 'transformer-engine[pytorch]{wanted}'` (needs nvcc), or use "
            f"model.layers=local and train.fp8=none; {_TELLS_MORE}"
        )


def check_apex() -> None:
    """Raise `ConfigError` unless NVIDIA's Apex is there with the extensions that layers call."""
    found = importlib.util.find_spec("apex")  # PyPI's does not have to be imported to be known
    folders = (found and found.submodule_search_locations) or []
    if found is None:
        trouble = "is not installed"
    elif not any(Path(folder, "normalization").is_dir() for folder in folders):
        trouble = "is not what is installed: PyPI's package apex is for websites"
    elif error := next(filter(None, map(installed.import_error, _APEX)), None):
        trouble = f"is installed without CUDA extensions that fit torch ({error})"
    else:
        return
    remove = "pip uninstall -y apex && " if found else ""
    raise ConfigError(
        f"model.layers: apex: NVIDIA's Apex {trouble}; run `{remove}{_INSTALL_APEX}` (needs git "
        f"and the nvcc of torch's CUDA), or use model.layers=local; {_TELLS_MORE}"
    )


def check_fp8(fp8: str, device: torch.device) -> None:
    """Raise `ConfigError` where the GPU, or torch's CUDA, has no products of this `train.fp8`."""
    if fp8 == "none":
        return
    if torch.cuda.get_device_capability(device) < _FP8_OLDEST[fp8]:
        least = _dotted(_FP8_OLDEST[fp8])
        raise ConfigError(
            f"train.fp8: {fp8} needs compute capability {least} or newer, but {_named(device)}; "
            f"use train.fp8=none or another GPU (8.9 is L40S, 9.0 H100); {_TELLS_MORE}"
        )
    cuda = tuple(int(number) for number in (torch.version.cuda or "0").split("."))
    if fp8 == "blockwise" and cuda < _BLOCKWISE_CUDA:
        raise ConfigError(
            f"train.fp8: blockwise needs CUDA {_dotted(_BLOCKWISE_CUDA)} or newer, and torch "
            f"{torch.__version__} is built for {torch.version.cuda}; install a build of torch for "
            f"CUDA 13, or use train.fp8=tensorwise; {_TELLS_MORE}"
        )


def attention_backend(device: torch.device) -> str:
    """The attention that Transformer Engine is to take, in Megatron-core's words, and no other."""
    newer = torch.cuda.get_device_capability(device) >= FUSED_ATTENTION_OLDEST
    return "fused" if newer else "flash"


def check_attention(device: torch.device) -> None:
    """Raise `ConfigError` where attention within documents needs flash-attn, and it is absent."""
    if attention_backend(device) == "fused":
        return
    flash = _flash_attention()
    if not (flash.is_installed and flash.v2_4_1_plus):  # which is deterministic where it must be
        found = installed.version("flash-attn") or "none"
        raise ConfigError(
            f"model.layers: transformer_engine: below compute capability "
            f"{_dotted(FUSED_ATTENTION_OLDEST)}, attention within the documents of a pack is "
            f"flash-attn's, and {_named(device)} (got flash-attn {found}, expected 2.4.1 to "
            f"{flash.max_version}). Fix: pip install --no-build-isolation "
            f"'flash-attn>=2.4.1,<={flash.max_version}', or model.layers=local; {_TELLS_MORE}"
        )


def check_deterministic(attention: int, device: torch.device) -> None:
    """Raise `ConfigError` where fused attention has no deterministic form of this size.

    `attention`: documents of a row x heads of a rank x the longest document's tokens squared.
    Transformer Engine 2.20 ends such a step; older releases run out of memory, which is in
    proportion to it (`get_attention_backend` in its dot_product_attention/utils.py).
    """
    if attention_backend(device) == "fused" and attention >= _DETERMINISTIC_ATTENTION:
        raise ConfigError(
            "train.deterministic: Transformer Engine's fused attention is deterministic only below "
            f"2^30 documents x heads x tokens of the longest document squared (got {attention:,} "
            "in a row of this dataset). Fix: train.deterministic=false, a higher parallel.tensor, "
            "a lower train.micro_batch or data.sequence_length, or model.layers=local"
        )


def _flash_attention() -> Any:
    """What Transformer Engine knows of flash-attn: whether it takes what is installed."""
    name = "transformer_engine.pytorch.attention.dot_product_attention.utils"
    return importlib.import_module(name).FlashAttentionUtils


def prepare_transformer_engine() -> None:
    """Set what Transformer Engine reads of the environment, unless it is set.

    It compiles kernels as it runs, and looks for headers under CUDA_HOME and in /usr/local/cuda,
    not where pip's CUDA has them. The scales of `train.fp8: delayed` are a pickle, which it refuses
    to open in newer releases; those of a checkpoint are read by checkpoint/pickles.py before.
    """
    os.environ.setdefault("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for headers in ("cu13/include", "cuda_runtime/include"):
            if Path(folder, headers, "cuda_runtime.h").exists():
                os.environ.setdefault("NVTE_CUDA_INCLUDE_DIR", str(Path(folder, headers)))
                return


def order_kernels(parallel: ParallelConfig) -> None:
    """Let exchanges within a layer start before the products beside them, as Megatron expects.

    CUDA reads it once, when this process first uses a GPU.
    """
    if parallel.tensor > 1 or parallel.context > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _named(device: torch.device) -> str:
    capability = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} has compute capability {_dotted(capability)}"


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def peak_flops(device: torch.device) -> float | None:
    """Operations a second of bf16 matrix products; None where they are not known, as of a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes that tensors took on a GPU so far, or this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def finish_work(device: torch.device) -> None:
    """Wait for what this process has given to its device, not for what others still send it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def check_capture(device: torch.device) -> None:
    """Raise `ConfigError` where Nsight Systems has nothing to capture."""
    if device.type != "cuda":
        raise ConfigError(
            "log.profiler: nsys needs an NVIDIA GPU, but this process runs on CPU; use "
            "log.profiler=torch"
        )


@contextlib.contextmanager
def capture_range(device: torch.device) -> Iterator[None]:
    """What is computed inside is what Nsight Systems captures, with a mark for each operator."""
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    try:
        with torch.autograd.profiler.emit_nvtx():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.cuda.synchronize(device)
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def be_deterministic() -> None:
    """The same bits of the same run on the same machine; an operation that cannot is an error."""
    os.environ.update(
        CUBLAS_WORKSPACE_CONFIG=":4096:8", NVTE_ALLOW_NONDETERMINISTIC_ALGO="0", NCCL_ALGO="Ring"
    )
    torch.use_deterministic_algorithms(True)
