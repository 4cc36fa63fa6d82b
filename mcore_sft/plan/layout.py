"""How a run is split over GPUs, and what it is fed.

RunConfig + number of GPUs -> Layout; RunConfig -> Workload
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mcore_sft.base.errors import UserError
from mcore_sft.config import RunConfig
from mcore_sft.data.packs.loader import Filling, packs_of_a_step
from mcore_sft.model.architecture import Architecture

MEAN_EXAMPLE = 512
"""Assumed tokens of an example, about OpenMathInstruct-2's, while no dataset is packed."""
SUPERVISED = 2 / 3
"""Assumed share of tokens that are trained, while no dataset is packed."""


class PlanError(UserError):
    """Nothing can be planned; the message is meant for the user."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is split over GPUs; `data` is what is left of them."""

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    data: int = 1
    distributed_optimizer: bool = False
    overlap: bool = False
    recompute: str = "none"
    micro_batch: int = 1

    @property
    def gpus(self) -> int:
        """Processes that it takes."""
        return self.tensor * self.pipeline * self.context * self.data

    def filling(self, packs: int) -> Filling:
        """How so many packs a step fill its micro-batches."""
        fewest = self.pipeline if self.virtual > 1 else 1
        return Filling(packs=packs, size=self.data, micro_batch=self.micro_batch, fewest=fewest)

    @property
    def keys(self) -> dict[str, Any]:
        """What of it differs from the defaults, under the names that the configuration has."""
        default = Layout(data=self.data)
        section = {"recompute": "train", "micro_batch": "train"}
        return {
            f"{section.get(name, 'parallel')}.{name}": value
            for name, value in vars(self).items()
            if value != getattr(default, name)
        }


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one pack holds on average."""

    examples: float
    tokens: float
    supervised: float
    measured: bool
    """Whether a packed dataset says so, or it is assumed."""

    def packs(self, config: RunConfig) -> int:
        """Packs of a step, as the loader takes them."""
        return packs_of_a_step(config.train, self.examples)


def configured(config: RunConfig, gpus: int) -> Layout:
    """The layout that `config` asks for on so many GPUs."""
    parallel = config.parallel
    parallel.require_split(gpus, "GPU(s)", f"give a multiple of {parallel.model_size}")
    return Layout(
        tensor=parallel.tensor,
        sequence=parallel.sequence,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual,
        context=parallel.context,
        data=gpus // parallel.model_size,
        distributed_optimizer=parallel.distributed_optimizer,
        overlap=parallel.overlap,
        recompute=config.train.recompute,
        micro_batch=config.train.micro_batch,
    )


def layouts(a: Architecture, sequence_length: int, gpus: int) -> Iterator[Layout]:
    """Every layout of so many GPUs that the model's sizes allow.

    Sequence parallelism costs nothing and goes with tensor, overlap likewise where there is
    something to exchange; selective recomputation saves next to nothing where attention keeps no
    scores (`layer_activations`), and is left out.
    """
    powers = [2**n for n in range(gpus.bit_length())]
    for t, p, v, c in itertools.product((1, 2, 4, 8), powers, (1, 2, 4), (1, 2, 4, 8)):
        d, rest = divmod(gpus, t * p * c)
        if rest or not d or a.heads % t or a.kv_heads % t or a.intermediate % t:
            continue
        if a.layers % (p * v) or (v > 1 and p == 1) or sequence_length % (2 * c * t):
            continue
        for sharded, recompute, micro in itertools.product(
            (False, True) if d * c > 1 else (False,), ("none", "full"), (1, 2, 4, 8)
        ):
            yield Layout(
                tensor=t,
                sequence=t > 1,
                pipeline=p,
                virtual=v,
                context=c,
                data=d,
                distributed_optimizer=sharded,
                overlap=d * c > 1,
                recompute=recompute,
                micro_batch=micro,
            )


def workload(config: RunConfig) -> Workload:
    """What the manifest of the packed dataset says, or what is assumed where there is none."""
    length = config.data.sequence_length
    path = config.packed / "manifest.json"
    if not path.exists():
        return Workload(
            examples=length / MEAN_EXAMPLE,
            tokens=length,
            supervised=SUPERVISED * length,
            measured=False,
        )
    try:
        train = json.loads(path.read_text(encoding="utf-8"))["splits"]["train"]
        packs = train["packs"]
        return Workload(
            examples=train["examples_per_pack"],
            tokens=train["tokens"] / packs,
            supervised=train["supervised_tokens"] / packs,
            measured=True,
        )
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise PlanError(
            f"{path}: not the manifest of a packed dataset ({error!r}); run tools/preprocess.py "
            "again, or name another with data.packed"
        ) from None
