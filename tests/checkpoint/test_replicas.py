import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_sft.checkpoint import replicas
from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.checkpoint.replicas import bit_sum
from mcore_sft.checkpoint.sharded import Checkpoints, Progress
from mcore_sft.config import CheckpointConfig, OptimizerConfig, ParallelConfig
from mcore_sft.training.step import train_step
from tests import runs, tiny

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn]


def sum_of(*weights: Tensor) -> int:
    return int(bit_sum(weights, CPU))


def integers(weight: Tensor) -> Tensor:
    """The same memory as unsigned or signed integers."""
    return weight.view(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[weight.itemsize])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_and_any_swap_changes_the_sum(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(replicas, "CHUNK", 4)
    weights = [torch.arange(1, 8).to(dtype), torch.arange(8, 11).to(dtype)]
    sums = {sum_of(*weights)}
    count = 1
    for bits in map(integers, weights):
        for place, bit in itertools.product(range(len(bits)), range(8 * dtype.itemsize)):
            flipped = torch.tensor(1 << bit).to(bits.dtype)
            bits[place] ^= flipped
            sums.add(sum_of(*weights))
            bits[place] ^= flipped
            count += 1
        for one, other in itertools.combinations(range(len(bits)), 2):
            bits[[one, other]] = bits[[other, one]]
            sums.add(sum_of(*weights))
            bits[[one, other]] = bits[[other, one]]
            count += 1
    assert len(sums) == count
    assert sum_of(*reversed(weights)) not in sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [torch.neg, lambda x: x * 2, lambda x: x.flip(0)])
def test_a_change_of_all_numbers_of_a_matrix_changes_the_sum(
    dtype: torch.dtype, change: Any
) -> None:
    """Sums of powers of two that a plain position as the factor would lose."""
    matrix = torch.full((2048, 1024), 1.0, dtype=dtype)
    matrix[1024:] = 2.0
    assert sum_of(matrix) != sum_of(change(matrix))


def test_the_sum_is_taken_modulo_two_to_the_64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "CHUNK", 2)
    weight = torch.tensor([1.5, -2.0, 3.25])
    random = torch.Generator().manual_seed(1)
    factors = (torch.randint(-(2**63), 2**63 - 1, (2,), generator=random) | 1).tolist()
    one, two, three = integers(weight).tolist()
    exact = (factors[0] * one + factors[1] * two) * replicas._NEXT_CHUNK + factors[0] * three
    assert abs(exact) > 2**63
    assert sum_of(weight) % 2**64 == exact % 2**64


def _flip(weight: Tensor) -> None:
    integers(weight.data)[5] ^= 1


def _swap(weight: Tensor) -> None:
    weight.data.view(-1)[[5, 9]] = weight.data.view(-1)[[9, 5]]


def _nothing(weight: Tensor) -> None:
    pass


def _saved(
    parallel: ParallelConfig,
    model: Path,
    folder: Path,
    precision: str,
    planted: tuple[int, str, Any],
) -> str:
    """Save after each of two steps, one rank's weight changed before the second: what is said."""
    rank, part, change = planted
    with runs.loaded(model, parallel, precision) as here:
        mesh = replace(here.mesh, hosts=("a", "b", "c", "d")[: here.mesh.world.size])
        made = Checkpoints(
            folder, CheckpointConfig(), model=here.model, optimizer=here.optimizer, mesh=mesh
        )
        packs = [tiny.make_pack([20, 30], seed=2 * mesh.data.rank + n) for n in range(2)]
        batches = [runs.batch_of(here, [pack]) for pack in packs]
        train_step(here.model, here.optimizer, batches, here.mesh, OptimizerConfig(), 1e-2)
        made.save(Progress(step=1), lambda folder: None)
        made.wait()
        if mesh.world.rank == rank:
            change(next(x for name, x in here.model[0].named_parameters() if part in name))
        try:
            made.save(Progress(step=2), lambda folder: None)
            made.wait()
        except CheckpointError as error:
            return str(error)
        return ""


def refused(run: Path, told: list[str], differ: str) -> None:
    """All ranks say the same, and step_2 has neither its name nor a folder."""
    assert told == [told[0]] * len(told)
    assert told[0].startswith(f"{run / 'step_2'}: not saved, because ranks that hold the same")
    assert f"differ after step 2 (got other bits on {differ}, expected the same)" in told[0]
    assert told[0].endswith(f"{run / 'step_1'} is the last good checkpoint")
    assert sorted(path.name for path in run.iterdir()) == ["latest", "step_1"]


@pytest.mark.parametrize("change", [_flip, _swap])
@pytest.mark.parametrize("layout", ["dp2", "dp2_do", "cp2"])
def test_a_replica_that_differs_ends_the_run_before_the_step_has_its_name(
    model: Path, tmp_path: Path, layout: str, change: Any
) -> None:
    planted = (1, "layers.1.mlp.linear_fc1.weight", change)
    told = runs.on_layout(layout, _saved, model, tmp_path / "run", "bf16", planted)
    refused(tmp_path / "run", told, "rank 1 (b) from rank 0 (a)")


def test_a_copy_on_a_tensor_rank_that_differs_ends_the_run(model: Path, tmp_path: Path) -> None:
    planted = (0, "input_layernorm", _flip)
    told = runs.on_layout("tp2", _saved, model, tmp_path / "run", "fp32", planted)
    refused(tmp_path / "run", told, "rank 1 (b) from rank 0 (a)")


def test_each_rank_is_compared_with_the_first_of_its_own_replicas(
    model: Path, tmp_path: Path
) -> None:
    planted = (3, "input_layernorm", _flip)
    told = runs.on_layout("tp2_sp_dp2", _saved, model, tmp_path / "run", "bf16", planted)
    refused(tmp_path / "run", told, "rank 3 (d) from rank 1 (b), rank 3 (d) from rank 2 (c)")


@pytest.mark.parametrize("layout", ["one", "pp2_vp2", "tp2_sp_pp2", "tp2_sp_dp2", "dp2_do_overlap"])
def test_ranks_that_hold_other_weights_are_not_compared(tmp_path: Path, layout: str) -> None:
    """With a tied embedding, chunks of virtual stages and weights that are split."""
    model = tiny.make_model(tmp_path / "model", family="llama-3.2")
    planted = (0, "linear_proj", _flip if layout == "tp2_sp_pp2" else _nothing)
    told = runs.on_layout(layout, _saved, model, tmp_path / "run", "bf16", planted)
    assert set(told) == {""}
