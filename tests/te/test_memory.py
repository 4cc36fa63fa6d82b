"""What a plan counts of Transformer Engine's layers is what they keep."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_sft.config import ParallelConfig
from mcore_sft.model import build
from mcore_sft.plan import memory
from mcore_sft.plan.layout import Layout
from mcore_sft.training.step import packed, run
from tests import tiny
from tests.runs import batch_of, loaded, on_layout

pytestmark = pytest.mark.te
ROWS = 256


def _engine() -> None:
    """Take Transformer Engine's layers and fused attention, in this rank."""
    build.layer_implementation = lambda *_: "transformer_engine"
    build.attention_backend = lambda device: "fused"


def kept(parallel: ParallelConfig, folder: Path, fp8: str) -> tuple[Any, int]:
    """The model's shape, and the bytes that its second layer keeps for the backward pass."""
    from megatron.core.fp8_utils import get_fp8_context

    _engine()
    with loaded(folder, parallel, "bf16", fp8=fp8) as here:
        gpt = here.gpt.module.module
        batch = batch_of(here, [tiny.make_pack([40, 64, 152], seed=1)], ROWS)
        stream = gpt.embedding(batch.tokens, batch.positions).detach().requires_grad_()
        angles = gpt.rotary_pos_emb(ROWS, packed_seq=True)
        seen: dict[int, Tensor] = {}

        def see(x: Tensor) -> Tensor:
            if not hasattr(x, "_fp8_dtype"):  # else a weight's copy of 8 bits
                seen.setdefault(x.untyped_storage().data_ptr(), x)
            return x

        hooks = torch.autograd.graph.saved_tensors_hooks(see, lambda x: x)
        with hooks, get_fp8_context(gpt.config, 1):
            gpt.decoder.layers[1](
                stream,
                attention_mask=None,
                rotary_pos_emb=angles,
                packed_seq_params=packed(batch),
            )
        others = {
            x.untyped_storage().data_ptr()
            for x in (*gpt.parameters(), angles, *eight_bit_weights(gpt))
        }
        found = [x.untyped_storage().nbytes() for at, x in seen.items() if at not in others]
        return here.architecture, sum(found)


def eight_bit_weights(module: torch.nn.Module) -> list[Tensor]:
    """The bytes of all weights that are kept in 8 bits."""
    return [
        x
        for one in module.modules()
        for weight in getattr(one, "_fp8_workspaces", {}).values()
        for x in weight.get_data_tensors()
    ]


FAMILIES = ("llama-3.1", "qwen2.5", "qwen3")
SCALINGS = ("none", "delayed", "tensorwise", "blockwise")
LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tensor=2),
    "tp2_sp": Layout(tensor=2, sequence=True),
}
TAKEN = {(family, "none", "one") for family in FAMILIES} | {
    ("llama-3.1", "delayed", "one"),
    ("qwen3", "tensorwise", "tp2"),
    ("qwen2.5", "blockwise", "tp2_sp"),
}
"""Of all; the others are slow."""


@pytest.mark.parametrize(
    ("family", "fp8", "layout"),
    [
        pytest.param(*case, marks=() if case in TAKEN else pytest.mark.slow)
        for case in itertools.product(FAMILIES, SCALINGS, LAYOUTS)
    ],
)
def test_activations_of_a_layer(tmp_path: Path, family: str, fp8: str, layout: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 512}
    folder = tiny.make_model(tmp_path / "model", family=family, **sizes)
    (architecture, found), *_ = on_layout(layout, kept, folder, fp8)
    asked = (architecture, LAYOUTS[layout], ROWS, 2, "transformer_engine", fp8)
    assert memory.layer_activations(*asked) == pytest.approx(found, rel=0.01)


def copies(parallel: ParallelConfig, folder: Path, fp8: str) -> tuple[Any, int]:
    """The model's shape, and the bytes of weights that it keeps in 8 bits after a pass."""
    _engine()
    with loaded(folder, parallel, "bf16", fp8=fp8) as here:
        run(
            here.model,
            [batch_of(here, [tiny.make_pack([128], seed=1)])],
            here.mesh,
            forward_only=False,
        )
        return here.architecture, sum(x.numel() for x in eight_bit_weights(here.gpt))


@pytest.mark.parametrize("fp8", ["delayed", "tensorwise", "blockwise"])
def test_weights_in_8_bits(tmp_path: Path, fp8: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    folder = tiny.make_model(tmp_path / "model", **sizes)
    ((architecture, found),) = on_layout("one", copies, folder, fp8)
    assert found == 2 * architecture.layers * architecture.layer_size(matrices=True)
