"""Whole and partial training runs for the equalities: on any layout, in forked ranks."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcore_sft import config as configuration
from mcore_sft.base.terminal import Console
from mcore_sft.checkpoint import sharded, weights
from mcore_sft.checkpoint.optimizer_state import MOMENTS
from mcore_sft.checkpoint.safetensors_folder import SafetensorsFolder
from mcore_sft.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from mcore_sft.data.encode.job import Job
from mcore_sft.data.packs.batch import Batch, collate
from mcore_sft.data.packs.pack import Pack
from mcore_sft.data.prepare import prepare
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer
from mcore_sft.model import build, families
from mcore_sft.model.architecture import Architecture
from mcore_sft.runtime.mesh import Mesh, connect
from mcore_sft.training import loop
from mcore_sft.training import optimizer as optim
from mcore_sft.training.beside.metrics import FILE as METRICS
from mcore_sft.training.step import count, run
from tests.distributed import run_ranks
from tests.prompts import MATH

FIXTURES = Path(__file__).parent / "fixtures"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp4": (4, {"pipeline": 4}),
    "dp2": (2, {}),
    "tp2_sp_pp2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "tp2_sp_dp2": (4, {"tensor": 2, "sequence": True}),
    "pp2_vp2": (2, {"pipeline": 2, "virtual": 2}),
    "cp2": (2, {"context": 2}),
    "tp2_sp_cp2": (4, {"tensor": 2, "sequence": True, "context": 2}),
    "pp2_cp2": (4, {"pipeline": 2, "context": 2}),
    "dp2_do": (2, {"distributed_optimizer": True}),
    "dp2_do_overlap": (2, {"distributed_optimizer": True, "overlap": True}),
}
"""Name -> number of processes, parallel section."""


def matrix() -> Iterator[tuple[int, dict[str, Any]]]:
    """Every layout of axes of one or two ranks, those that make no sense among them."""
    choices = {
        "tensor": (1, 2),
        "sequence": (False, True),
        "pipeline": (1, 2),
        "virtual": (1, 2),
        "context": (1, 2),
        "distributed_optimizer": (False, True),
        "overlap": (False, True),
    }
    for data, *values in itertools.product((1, 2), *choices.values()):
        section = dict(zip(choices, values, strict=True))
        size = data * math.prod(section[axis] for axis in ("tensor", "pipeline", "context"))
        yield size, {name: value for name, value in section.items() if value is True or value > 1}


@dataclass(frozen=True)
class Loaded:
    """A model with its weights on this rank."""

    model: build.Chunks
    optimizer: Any
    mesh: Mesh
    architecture: Architecture

    @property
    def gpt(self) -> Any:
        """The model where it is one chunk."""
        (only,) = self.model
        return only


@contextmanager
def loaded(
    folder: Path,
    parallel: ParallelConfig,
    precision: str = "fp32",
    optimizer: OptimizerConfig | None = None,
    layers: str = "auto",
    **train: Any,
) -> Iterator[Loaded]:
    """Connect and load the model of `folder`."""
    architecture = families.read(folder)
    settings = TrainConfig(precision=precision, **train)
    with connect(parallel) as mesh:
        named = ModelConfig.model_validate({"path": folder, "layers": layers})
        model = build.build(architecture, named, settings, mesh)
        made = optim.build(optimizer or OptimizerConfig(), settings, model, mesh)
        weights.load_pretrained(SafetensorsFolder(folder), model, architecture, mesh)
        made.reload_model_params()
        yield Loaded(model, made, mesh, architecture)


def on_layout(layout: str, function: Any, *args: Any) -> list[Any]:
    """Call `function(parallel, *args)` on every rank of a layout."""
    size, parallel = LAYOUTS[layout]
    return run_ranks(size, function, ParallelConfig(**parallel), *args)


def batch_of(here: Loaded, packs: Sequence[Pack], length: int = 128) -> Batch:
    """This context-parallel rank's share of packs in one row."""
    context = here.mesh.context
    return collate(packs, length, pad_id=0, context=context.size, rank=context.rank)


def gradients(here: Loaded, batches: Sequence[Batch]) -> tuple[float, dict[str, Tensor]]:
    """Mean loss of `batches` (this rank's) and this rank's gradient of every weight."""
    for chunk in here.model:
        chunk.train()
        chunk.zero_grad_buffer()
    losses = run(here.model, batches, here.mesh, forward_only=False)
    (loss,) = here.mesh.sum_over_world([sum(losses)])
    supervised, _, _ = count(batches, here.mesh)
    found = {
        f"chunk {number}: {name}": weight.main_grad.clone()
        for number, chunk in enumerate(here.model)
        for name, weight in chunk.named_parameters()
    }
    return loss / max(1, supervised), found


def experiment(folder: Path, model: Path, **changes: Any) -> RunConfig:
    """A run on the project's own 200 rows; `changes` are dotted overrides, `__` for the dots."""
    tree = {
        "name": "equality",
        "output": str(folder),
        "model": {"path": str(model), "tokenizer": str(FIXTURES / "tokenizer")},
        "prompt": MATH,
        "data": {
            "root": str(FIXTURES),
            "packed": str(model / "packed"),
            "train": [{"path": "rows.jsonl"}],
            "sequence_length": 512,
        },
        "train": {"steps": 20, "global_batch": 10, "precision": "fp32"},
        "optimizer": {"lr": 1e-4, "weight_decay": 0.1},
        "log": {"every": 1000},
    }
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    return configuration.parse(tree, overrides)


def pack_rows(config: RunConfig) -> None:
    """Preprocess the rows of `config`."""
    tokenizer = load_tokenizer(config.model.tokenizer_path)
    prompt = Prompt.load(config.prompt, tokenizer)
    console = Console(quiet=True)
    job = Job(config=config.data, prompt=prompt, tokenizer=tokenizer, console=console)
    prepare(job, config.packed)


def train(config: RunConfig, layout: str = "one") -> list[dict[str, Any]]:
    """Run `config` on a layout; its metrics, a dict a step."""
    size, parallel = LAYOUTS[layout]
    placed = config.model_copy(update={"parallel": ParallelConfig(**parallel)})
    run_ranks(size, _train, placed)
    return metrics(config)


def metrics(config: RunConfig) -> list[dict[str, Any]]:
    """What the run wrote of each step."""
    lines = (config.folder / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def state(config: RunConfig, step: int) -> dict[str, dict[str, Tensor]]:
    """Weights and both moments after `step` updates, by Hugging Face's names."""
    read = sharded.whole_tensors(config.folder / f"step_{step}")
    architecture = families.read(config.model.path)
    prefixes = {"weights": "", **{name: f"optimizer.{name}." for name in MOMENTS}}
    return {
        kind: dict(weights.export(lambda key, prefix=prefix: read(prefix + key), architecture))
        for kind, prefix in prefixes.items()
    }


def _train(config: RunConfig) -> None:
    torch.set_num_threads(1)
    loop.train(config)


def relative(value: float, reference: float) -> float:
    """How far `value` is from `reference`, as a share of it."""
    return abs(value - reference) / abs(reference)


def relative_norm(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients, as a share of the norm of the reference."""
    assert found.keys() == reference.keys()
    difference = sum(float((found[name] - reference[name]).square().sum()) for name in reference)
    return float(difference / sum(float(grad.square().sum()) for grad in reference.values())) ** 0.5
