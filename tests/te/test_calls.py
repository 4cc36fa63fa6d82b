"""What a step of training calls: how many of each kernel, and no other attention."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mcore_sft.config import OptimizerConfig, ParallelConfig
from mcore_sft.model import build
from mcore_sft.training.step import train_step
from tests import tiny
from tests.runs import batch_of, loaded, on_layout

pytestmark = pytest.mark.te
LAYERS, ENDS = 4, 2
"""Layers of the model, and passes of a micro-batch."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that 8-bit products take on two tensor ranks."""
    sizes = {"hidden_size": 128, "intermediate_size": 128}
    return tiny.make_model(tmp_path_factory.mktemp("model") / "tiny", **sizes)


def calls(
    parallel: ParallelConfig, model: Path, packs: int, again: str, train: dict[str, Any]
) -> dict[str, int]:
    """How often the second step of so many packs called each kernel, and reduced.

    `again` is what is recomputed, behind the configuration's back.
    """
    from tests.te.extension import CALLS

    build._RECOMPUTE["none"] = build._RECOMPUTE[again]
    build.layer_implementation = lambda *_: "transformer_engine"
    build.attention_backend = lambda device: "fused"
    with loaded(model, parallel, "bf16", **train) as here:
        batches = [batch_of(here, [tiny.make_pack([60, 64], seed=2)]) for _ in range(packs)]
        step = (here.model, here.optimizer, batches, here.mesh, OptimizerConfig(), 1e-3)
        train_step(*step)
        CALLS.clear()
        reduce = dist.all_reduce

        def counting(*args: Any, **kwargs: Any) -> Any:
            CALLS["all-reduce"] += 1
            return reduce(*args, **kwargs)

        dist.all_reduce = counting
        train_step(*step)
        return dict(CALLS)


def of_one(layout: str, *args: Any) -> dict[str, int]:
    """The calls of the first rank, which are those of all."""
    first, *others = on_layout(layout, calls, *args)
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize("again", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_each_layer_takes_the_fused_kernels_once_a_pass(model: Path, again: str) -> None:
    found = of_one("one", model, 3, again, {})
    backward, forward = 3 * LAYERS, 3 * LAYERS * (1 + (again == "full"))
    assert {name: found.get(name, 0) for name in ("swiglu", "dswiglu")} == {
        "swiglu": forward,
        "dswiglu": backward,
    }
    assert (found["fused_attn_fwd"], found["fused_attn_bwd"]) == (forward, backward)
    assert found["fused_rope_forward"] == 2 * forward  # queries and keys
    assert found["fused_rope_backward"] == 2 * backward
    assert found["generic_gemm"] == 4 * forward + 2 * 4 * backward
    assert "convert_thd_to_bshd" not in found  # which the unfused attention needs


@pytest.mark.parametrize(("fp8", "packs"), [("none", 3), ("blockwise", 2)])
def test_gradients_of_weights_are_added_in_place(model: Path, fp8: str, packs: int) -> None:
    """In 8 bits those of the first micro-batch are written there, and the others added."""
    found = of_one("one", model, 3, "none", {"fp8": fp8})
    assert found["products added in place"] == packs * 4 * LAYERS


@pytest.mark.parametrize("fp8", ["delayed", "tensorwise", "blockwise"])
def test_weights_are_turned_into_8_bits_once_a_step(model: Path, fp8: str) -> None:
    one, two = (of_one("one", model, packs, "none", {"fp8": fp8})["quantize"] for packs in (1, 2))
    assert 2 * one - two == 4 * LAYERS


@pytest.mark.parametrize("layout", ["one", "dp2_do"])
def test_delayed_scaling_takes_new_scales_once_a_pass(model: Path, layout: str) -> None:
    plain = of_one(layout, model, 3, "none", {})
    found = of_one(layout, model, 3, "none", {"fp8": "delayed"})
    updates = found["fused_amax_and_scale_update_after_reduction"]
    assert updates == 3 * ENDS
    reduced = found["all-reduce"] - plain["all-reduce"]
    assert reduced == (updates if layout == "dp2_do" else 0)


def test_delayed_scaling_takes_many_more_where_layers_are_computed_again(model: Path) -> None:
    """Which is why the configuration refuses the two together."""
    found = of_one("one", model, 3, "full", {"fp8": "delayed"})
    assert found["fused_amax_and_scale_update_after_reduction"] > 3 * ENDS * LAYERS


@pytest.mark.parametrize("fp8", ["tensorwise", "blockwise"])
def test_other_scalings_keep_nothing_from_step_to_step(model: Path, fp8: str) -> None:
    found = of_one("one", model, 3, "full", {"fp8": fp8})
    assert "fused_amax_and_scale_update_after_reduction" not in found
