import os
import shlex
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

from mcore_sft import config
from mcore_sft.plan.layout import configured, workload
from mcore_sft.plan.ranking import estimate
from mcore_sft.plan.speed import GPUS
from tests.test_plan import SHAPE_8B, SHAPE_70B
from tools.make_random_model import SHAPES, parse_arguments

EIGHT = "llama31_8b_openmathinstruct2"
SEVENTY = "llama31_70b_openmathinstruct2"
RECIPES = [EIGHT, f"{EIGHT}_1m", SEVENTY]


@pytest.mark.parametrize("name", RECIPES)
def test_a_smoke_form_differs_in_size_alone(name):
    small = config.load(f"configs/{name}_smoke.yaml").model_dump()
    full = config.load(f"configs/{name}.yaml").model_dump()
    for section in ("prompt", "parallel", "optimizer"):
        assert small[section] == full[section]
    sized = ("steps", "packs", "global_batch", "validate_every")
    for section in ("data", "train"):
        for key, value in full[section].items():
            if key not in (*sized, "train"):
                assert small[section][key] == value, key


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_of_a_smoke_form_is_the_full_one_with_few_layers(monkeypatch, name):
    """As the command in its first lines makes it."""
    text = Path(f"configs/{name}_smoke.yaml").read_text().replace("\\\n#", "")
    (line,) = (line for line in text.splitlines() if "make_random_model.py" in line)
    monkeypatch.setattr(sys, "argv", shlex.split(line.partition("python ")[2]))
    asked, full = parse_arguments(), SHAPE_70B if name == SEVENTY else SHAPE_8B
    small = config.load(f"configs/{name}_smoke.yaml")
    assert asked.output == small.model.path
    assert asked.tokenizer == config.load(f"configs/{name}.yaml").model.tokenizer_path
    assert asked.layers == 2
    assert asked.layers % (small.parallel.pipeline * small.parallel.virtual) == 0
    shape = SHAPES[asked.shape]
    for size in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate"):
        assert getattr(shape, size) == getattr(full, size), size
        assert size == "layers" or getattr(asked, size) is None
    assert (shape.norm_eps, shape.rope_theta, shape.tie) == (1e-5, 5e5, False)
    assert (shape.max_positions, shape.rope_scaling) == (131_072, "llama3")
    assert (shape.rope_factor, shape.original_positions) == (8.0, 8192)


@pytest.mark.parametrize("name", RECIPES)
def test_an_fp8_form_differs_in_precision_alone(name):
    plain = config.load(f"configs/{name}.yaml")
    expected = plain.model_dump()
    expected["name"] = f"{name}_fp8"
    expected["data"]["packed"] = plain.packed
    expected["train"]["fp8"] = "blockwise"
    assert config.load(f"configs/{name}_fp8.yaml").model_dump() == expected


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # NeMo RL, examples/configs/sft_openmathinstruct.yaml at 580893268.
        (
            EIGHT,
            {
                "prompt.template": "llama3-instruct",
                "prompt.instruction": "generic/math",
                "data.sequence_length": 4096,
                "train.steps": 60_000,
                "train.packs": 64,  # 512 examples are 59, which fill no layout of 16 ranks
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
                "prompt.template": "chat",
                "prompt.instruction": "nemo_rl/math",
                "data.sequence_length": 4096,
                "data.holdout.fraction": 0.05,
                "data.holdout.by": "row",
                "data.holdout.seed": 42,
                "train.steps": 950_000 // 512,
                "train.packs": 64,  # 512 examples are 59, which fill no layout of 16 ranks
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
                "prompt.template": "llama3-instruct",
                "prompt.instruction": "generic/math",
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
    (source,) = recipe.data.train
    splits = {EIGHT: "train", f"{EIGHT}_1m": "train_1M", SEVENTY: "train_5M"}
    assert (source.path, source.split) == ("nvidia/OpenMathInstruct-2", splits[name])
    assert (source.problem, source.solution) == ("problem", "generated_solution")


def test_the_seed_is_validated_on_its_training_file_and_says_so():
    file = Path(f"configs/{EIGHT}.yaml")
    recipe = config.load(file)
    (trained,), (validated,) = recipe.data.train, recipe.data.validation
    assert validated == trained.model_copy(update={"limit": 4 * 128})
    assert "# The tutorial validates on its training file" in file.read_text()


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


def test_the_slurm_script_starts_torchrun_on_every_node(tmp_path):
    """With a Slurm of shell scripts, whose list of nodes comes line by line."""
    programs = {
        "scontrol": "for n in $(seq 99); do echo node$n; sleep 0.001; done",
        "srun": 'shift; SLURM_NODEID=3 exec "$@"',  # after --kill-on-bad-exit
        "torchrun": "kill -USR1 $$; printf '%s\\n' \"$@\"",  # Slurm's warning ends no torchrun
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-99]", "SLURM_NNODES": "99", "SLURM_JOB_ID": "7"}
    known = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCHRUN": str(tmp_path / "torchrun")}
    script = ["bash", "docs/launch/train_slurm.sh", "configs/demo.yaml", "optimizer.lr=1e-5"]
    ran = subprocess.run(script, env=slurm | known, capture_output=True, text=True, check=True)
    said = ran.stdout.split()
    assert said[said.index("--nnodes") + 1] == "99"
    assert said[said.index("--node-rank") + 1] == "3"
    assert said[said.index("--master-addr") + 1] == "node1"
    assert said[said.index("--master-port") + 1] == "20007"
    assert said[-4:] == ["mcore_sft/train.py", "--config", "configs/demo.yaml", "optimizer.lr=1e-5"]
