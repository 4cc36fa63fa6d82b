"""The local layers with Apex's two functions, in whose place stand two of torch.

They ask what the kernels demand, and Megatron-core's own layers call them.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mcore_sft.config import ParallelConfig
from mcore_sft.data.packs.batch import collate
from mcore_sft.data.packs.pack import Pack
from mcore_sft.model import build
from tests import tiny
from tests.runs import batch_of, gradients, loaded, on_layout, relative_norm

from megatron.core.tensor_parallel import layers

CALLS: Counter[str] = Counter()
PACKS = [tiny.make_pack([20, 31, 50], seed=1), tiny.make_pack([60, 64], seed=2)]


def fused_rms_norm_affine(
    input: Tensor,
    weight: Tensor,
    normalized_shape: tuple[int, ...],
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """Both tensors of one type; normalized and scaled in fp32, and rounded once."""
    assert input.dtype == weight.dtype
    assert tuple(weight.shape) == normalized_shape == input.shape[-1:]
    CALLS["norms"] += 1
    scaled = functional.rms_norm(input.float(), normalized_shape, weight.float(), eps)
    return scaled.to(input.dtype)


def wgrad_gemm_accum_fp32(input: Tensor, d_output: Tensor, d_weight: Tensor) -> None:
    """Rows of one type side by side in memory; their product is added to an fp32 gradient."""
    assert input.dtype == d_output.dtype
    assert d_weight.dtype == torch.float32
    for rows in (input, d_output, d_weight):
        assert rows.dim() == 2
        assert rows.is_contiguous()
    CALLS["weight gradients"] += 1
    d_weight.addmm_(d_output.float().t(), input.float())


def _gradients(
    parallel: ParallelConfig,
    model: Path,
    implementation: str,
    precision: str = "fp32",
    packs: Sequence[Pack] = PACKS,
) -> tuple[float, dict[str, Tensor], Counter[str], bool]:
    """Loss and gradients of packs, the calls of Apex, and whether norms are marked."""
    norm, weight = ModuleType("apex.normalization.fused_layer_norm"), ModuleType("wgrad")
    norm.fused_rms_norm_affine = fused_rms_norm_affine  # type: ignore[attr-defined]
    weight.wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp32  # type: ignore[attr-defined]
    folders = {name: ModuleType(name) for name in ("apex", "apex.normalization")}
    with (
        mock.patch.dict(sys.modules, folders | {norm.__name__: norm}),
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", weight, create=True),
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
        mock.patch.object(build, "layer_implementation", return_value=implementation),
        loaded(model, parallel, precision) as here,
    ):
        CALLS.clear()
        loss, found = gradients(here, [batch_of(here, [pack]) for pack in packs])
        marked = [
            getattr(weight, "sequence_parallel", False) == parallel.sequence
            for chunk in here.model
            for name, weight in chunk.named_parameters()
            if "norm" in name
        ]
        return loss, found, CALLS, bool(marked) and all(marked)


@pytest.mark.parametrize("layout", ["one", "tp2_sp", "pp2_vp2", "dp2_do_overlap"])
def test_apex_computes_what_the_local_layers_do(tmp_path: Path, layout: str) -> None:
    model = tiny.make_model(tmp_path / "tiny", family="qwen3")
    ours = on_layout(layout, _gradients, model, "apex")
    theirs = on_layout(layout, _gradients, model, "local")
    for (loss, found, calls, marked), (known, reference, none, _) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(known, rel=1e-6)
        assert relative_norm(found, reference) < 1e-6
        assert marked
        assert not none, "local layers ask nothing of Apex"
        norms = sum("norm" in name for name in found)
        matrices = sum("linear" in name and "norm" not in name for name in found)
        assert calls == {"norms": 2 * norms, "weight gradients": 2 * matrices}


def test_gradients_that_apex_adds_are_not_rounded_to_bf16(model: Path) -> None:
    (_, apex, _, _), (_, local, _, _) = (
        on_layout("one", _gradients, model, implementation, "bf16", PACKS[:1])[0]
        for implementation in ("apex", "local")
    )
    assert relative_norm(apex, local) < 2e-2
    tokens = collate(PACKS[:1], 128, pad_id=0).supervised
    for name, gradient in local.items():
        if "linear" in name and "norm" not in name:
            assert _is_bf16(tokens * gradient)
            assert not _is_bf16(tokens * apex[name])


def _is_bf16(sums: Tensor) -> bool:
    """Whether these were sums in bf16 before the number of tokens divided them."""
    return torch.allclose(sums, sums.bfloat16().float(), rtol=1e-6, atol=0)
