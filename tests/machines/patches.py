"""What happens within a rank: each is a `Node.patch`, with its arguments bound."""

import ctypes
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from mcore_sft.checkpoint import weights, writer
from mcore_sft.data.packs.loader import Loader
from mcore_sft.model import build
from mcore_sft.training import loop
from mcore_sft.training.beside import accuracy


def at_step(step: int, happens: Callable[[], object]) -> None:
    """In the step of this number, before it computes."""
    batches = loop.Loader.batches

    def patched(self: Loader, before: int) -> Any:
        if before + 1 == step:
            happens()
        return batches(self, before)

    loop.Loader.batches = patched  # type: ignore[method-assign,assignment]


def hold_the_lock(seconds: int) -> None:
    """Let no other thread of Python run for so long."""
    ctypes.PyDLL(None).sleep(seconds)


def weight_differs(step: int) -> None:
    """One number of a weight that every rank has is another one from this step on."""
    built = build.build

    def patched(*arguments: Any) -> Any:
        chunks = built(*arguments)
        at_step(step, lambda: _change(chunks))
        return chunks

    build.build = patched  # type: ignore[assignment]


def _change(chunks: build.Chunks) -> None:
    named = {name: weight for chunk in chunks for name, weight in chunk.named_parameters()}
    (norm,) = (weight for name, weight in named.items() if "final_layernorm" in name)
    with torch.no_grad():
        norm[3] *= 1.001


def slow_save(step: int, seconds: float) -> None:
    """This rank writes its share of step_N for so long."""
    write = writer._write

    def patched(transforms: list[Any], bucket: Any) -> list[Any]:
        if f"step_{step}." in str(bucket[0]):
            time.sleep(seconds)
        return write(transforms, bucket)

    writer._write = patched


def slow_load(seconds: float) -> None:
    """This rank reads the base weights for so long."""
    load = weights.load_pretrained

    def patched(*arguments: Any) -> None:
        time.sleep(seconds)
        load(*arguments)

    weights.load_pretrained = patched  # type: ignore[assignment]


def endless_evaluation() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(3600)"]
    accuracy._command = lambda *_: sleep
