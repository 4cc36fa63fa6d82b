from pathlib import Path

import pytest
import torch
from torch import Tensor

from mcore_sft.config import ParallelConfig
from mcore_sft.data.batch import collate
from mcore_sft.model.layers import PackedAttention
from tests import tiny
from tests.runs import gradients, loaded, on_layout


@pytest.mark.parametrize("layout", ["one", "tp2_sp", "pp2_vp2", "cp2"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_again_changes_no_bit(model: Path, layout: str, recompute: str) -> None:
    kept = on_layout(layout, _gradients, model, "none")
    made = on_layout(layout, _gradients, model, recompute)
    for (loss, found, calls), (other_loss, other_found, other_calls) in zip(
        kept, made, strict=True
    ):
        assert other_calls == 2 * calls > 0
        assert other_loss == loss
        assert found.keys() == other_found.keys()
        assert all(torch.equal(found[name], other_found[name]) for name in found)


def _gradients(
    parallel: ParallelConfig, model: Path, recompute: str
) -> tuple[float, dict[str, Tensor], int]:
    """Loss and gradients of two packs, and how often attention was computed."""
    calls = 0
    forward = PackedAttention.forward

    def counted(self: PackedAttention, *args: object, **kwargs: object) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(self, *args, **kwargs)

    PackedAttention.forward = counted
    packs = [tiny.make_pack([20, 31, 50], seed=1), tiny.make_pack([60, 64], seed=2)]
    with loaded(model, parallel, recompute=recompute) as here:
        context = here.mesh.context
        batches = [
            collate([pack], 128, pad_id=0, context=context.size, rank=context.rank)
            for pack in packs
        ]
        return *gradients(here, batches), calls
