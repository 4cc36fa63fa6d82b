from operator import attrgetter
from pathlib import Path

import pytest

from mcore_sft import config
from mcore_sft.plan.layout import configured, workload
from mcore_sft.plan.ranking import estimate
from mcore_sft.plan.speed import GPUS
from tests.test_plan import SHAPE_8B, SHAPE_70B

SMOKE = sorted(file.stem for file in Path("configs").glob("*_smoke.yaml"))


@pytest.mark.parametrize("name", SMOKE)
def test_a_smoke_form_differs_in_size_alone(name):
    small = config.load(f"configs/{name}.yaml").model_dump()
    full = config.load(f"configs/{name.removesuffix('_smoke')}.yaml").model_dump()
    for section in ("prompt", "parallel", "optimizer"):
        assert small[section] == full[section]
    sized = ("steps", "global_batch", "validate_every")
    for section in ("data", "train"):
        for key, value in full[section].items():
            if key not in (*sized, "train"):
                assert small[section][key] == value, key


@pytest.mark.parametrize("name", sorted(file.stem for file in Path("configs").glob("*_fp8.yaml")))
def test_an_fp8_form_differs_in_precision_alone(name):
    plain = config.load(f"configs/{name.removesuffix('_fp8')}.yaml")
    expected = plain.model_dump()
    expected["name"] = name
    expected["data"]["packed"] = plain.packed
    expected["train"]["fp8"] = "blockwise"
    assert config.load(f"configs/{name}.yaml").model_dump() == expected


EIGHT = "llama31_8b_openmathinstruct2"
SEVENTY = "llama31_70b_openmathinstruct2"


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # NeMo RL, examples/configs/sft_openmathinstruct.yaml at 580893268.
        (
            EIGHT,
            {
                "data.sequence_length": 4096,
                "train.steps": 60_000,
                "train.global_batch": 512,
                "train.precision": "bf16",
                "train.seed": 42,
                "train.validate_every": 1000,
                "parallel.tensor": 4,
                "parallel.pipeline": 1,
                "optimizer.lr": 2e-5,
                "checkpoint.every": 1000,
                "checkpoint.best": 12,
                "checkpoint.keep_every": 10_000,
            },
        ),
        # NeMo RL, examples/configs/sft_openmathinstruct2.yaml.
        (
            f"{EIGHT}_1m",
            {
                "data.sequence_length": 4096,
                "data.holdout.fraction": 0.05,
                "data.holdout.by": "row",
                "train.steps": 950_000 // 512,
                "train.global_batch": 512,
                "train.validate_every": 500,
                "train.seed": 42,
                "optimizer.lr": 2e-5,
                "checkpoint.every": 500,
                "checkpoint.best": 0,
            },
        ),
        # NeMo-Skills, docs/openmathinstruct2/training.md.
        (
            SEVENTY,
            {
                "data.sequence_length": 4096,
                "train.steps": 20_000,
                "parallel.tensor": 8,
                "parallel.pipeline": 2,
                "optimizer.lr": 1e-5,
                "checkpoint.every": 3330,
                "checkpoint.best": 0,
            },
        ),
    ],
)
def test_a_recipe_is_the_published_one(name, published):
    recipe = config.load(f"configs/{name}.yaml")
    for key, value in published.items():
        assert attrgetter(key)(recipe) == value, key
    optimizer = recipe.optimizer
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.98), 1e-8, 0.01)
    assert (optimizer.schedule, optimizer.warmup_steps) == ("constant", 0)
    assert optimizer.clip_grad is None


@pytest.mark.parametrize(
    ("name", "shape", "gpus"),
    [
        (EIGHT, SHAPE_8B, 8),
        (EIGHT, SHAPE_8B, 64),
        (f"{EIGHT}_1m", SHAPE_8B, 8),
        (SEVENTY, SHAPE_70B, 64),
        (SEVENTY, SHAPE_70B, 256),
    ],
)
def test_a_recipe_fits_its_gpus(name, shape, gpus):
    recipe = config.load(f"configs/{name}.yaml")
    load = workload(recipe)
    assert estimate(shape, recipe, configured(recipe, gpus), GPUS["h100"], load).fits
