"""pytest -p tests.te.plugin: Transformer Engine's own Python, on the CPU."""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch._dynamo  # which looks for triton, and finds none here

from tests.te import cuda
from tests.te.fetch import FOLDER

NEVER_RUN = (
    *("einops", "onnx", "onnxscript", "triton"),
    *("triton.language", "triton.language.core", "triton.language.standard"),
)
"""What TE's Python imports and training never runs."""


def _import() -> ModuleType:
    """TE's Python over our extension; Megatron-core finds it imported."""
    assert FOLDER.exists(), f"{FOLDER}: not there. Fix: make fetch-te"
    sys.path.insert(0, str(FOLDER))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # without its libraries
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    torch.te_cuda = sys.modules["torch.te_cuda"] = cuda  # type: ignore[attr-defined]
    extension = importlib.import_module("tests.te.extension")
    for room in ("attention", "context_parallel", "norms", "products", "quantizers"):
        importlib.import_module(f"tests.te.{room}")
    sys.modules[extension.NAME] = extension.MODULE
    with _never_run():
        importlib.import_module("transformer_engine")
        engine = importlib.import_module("transformer_engine.pytorch")
    _wait_at_once()
    return engine


@contextlib.contextmanager
def _never_run() -> Iterator[None]:
    """Let what is not installed be imported inside, and only there: others look for triton."""
    absent = {
        name: MagicMock(name=name, __version__="3.5.0")
        for name in NEVER_RUN
        if importlib.util.find_spec(name.partition(".")[0]) is None
    }
    with patch.dict(sys.modules, absent):
        yield
        found = {name: module for name, module in sys.modules.items() if name not in absent}
    sys.modules.update(found)


def _wait_at_once() -> None:
    """Let what context-parallel ranks hand on arrive before the next product.

    Streams order it on GPUs; over gloo a later wait of one rank meets the next send of another.
    """
    name = "transformer_engine.pytorch.attention.dot_product_attention.context_parallel"
    module: Any = importlib.import_module(name)
    begin = module.flash_attn_p2p_communicate

    def communicate(*args: Any, **kwargs: Any) -> list[Any]:
        for request in begin(*args, **kwargs):
            request.wait()
        return []

    module.flash_attn_p2p_communicate = communicate


ENGINE = _import()
