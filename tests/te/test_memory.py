"""What a plan counts of Transformer Engine's layers is what they keep."""

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
ROWS = 128


def _engine() -> None:
    """Take Transformer Engine's layers and fused attention, in this rank."""
    build.layer_implementation = lambda *_: "transformer_engine"
    build.attention_backend = lambda device: "fused"


def kept(parallel: ParallelConfig, folder: Path) -> tuple[Any, int]:
    """The model's shape, and the bytes that its second layer keeps for the backward pass."""
    _engine()
    with loaded(folder, parallel, "bf16") as here:
        gpt = here.gpt.module.module
        batch = batch_of(here, [tiny.make_pack([20, 32, 76], seed=1)], ROWS)
        stream = gpt.embedding(batch.tokens, batch.positions).detach().requires_grad_()
        angles = gpt.rotary_pos_emb(ROWS, packed_seq=True)
        others = {x.untyped_storage().data_ptr() for x in (*gpt.parameters(), angles)}
        seen: dict[int, Tensor] = {}

        def see(x: Tensor) -> Tensor:
            seen.setdefault(x.untyped_storage().data_ptr(), x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(see, lambda x: x):
            gpt.decoder.layers[1](
                stream,
                attention_mask=None,
                rotary_pos_emb=angles,
                packed_seq_params=packed(batch),
            )
        found = [x.untyped_storage().nbytes() for at, x in seen.items() if at not in others]
        return here.architecture, sum(found)


@pytest.mark.parametrize("family", ["llama-3.1", "qwen2.5", "qwen3"])
def test_activations_of_a_layer(tmp_path: Path, family: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 320}
    folder = tiny.make_model(tmp_path / "model", family=family, **sizes)
    ((architecture, found),) = on_layout("one", kept, folder)
    planned = memory.layer_activations(architecture, Layout(), ROWS, 2, "transformer_engine")
    assert planned == pytest.approx(found, rel=0.02)


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
        bytes_of = [
            x.numel()
            for module in here.gpt.modules()
            for weight in getattr(module, "_fp8_workspaces", {}).values()
            for x in weight.get_data_tensors()
        ]
        return here.architecture, sum(bytes_of)


@pytest.mark.parametrize("fp8", ["delayed", "tensorwise", "blockwise"])
def test_weights_in_8_bits(tmp_path: Path, fp8: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    folder = tiny.make_model(tmp_path / "model", **sizes)
    ((architecture, found),) = on_layout("one", copies, folder, fp8)
    assert found == 2 * architecture.layers * memory.layer_matrices(architecture, 1)
