"""Layouts, the fastest that fit first.

Architecture + RunConfig + Gpu -> Estimates
"""

from dataclasses import dataclass

from mcore_sft.config import RunConfig
from mcore_sft.model.architecture import Architecture
from mcore_sft.plan.layout import Layout, Workload, layouts
from mcore_sft.plan.memory import GIB, Memory, stage_memory
from mcore_sft.plan.speed import EFFICIENCY, Gpu, step_seconds

RESERVE = 4 * GIB
"""Assumed for NCCL's buffers and fragmentation."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a layout needs, in the worst of its stages, and how long a step takes."""

    layout: Layout
    memory: Memory
    fits: bool
    packs: int
    """Packs of a step."""
    empty: float
    """The share of empty packs among those that are computed."""
    seconds: float
    """Of a step."""


def estimate(
    a: Architecture,
    config: RunConfig,
    layout: Layout,
    gpu: Gpu,
    load: Workload,
    efficiency: float = EFFICIENCY,
) -> Estimate:
    """Memory of the fullest stage, and the seconds of a step, of `layout`."""
    packs = load.packs(config)
    filling = layout.filling(packs)
    fullest = max(stage_memory(a, config, layout, load), key=lambda found: found.total)
    return Estimate(
        layout=layout,
        memory=fullest,
        fits=fullest.total + RESERVE <= gpu.memory,
        packs=packs,
        empty=filling.empty,
        seconds=step_seconds(
            a,
            layout,
            gpu,
            load,
            precision=config.train.precision,
            sequence_length=config.data.sequence_length,
            micro_batches=filling.micro_batches,
            efficiency=efficiency,
        ),
    )


def rank(
    a: Architecture,
    config: RunConfig,
    gpus: int,
    gpu: Gpu,
    load: Workload,
    efficiency: float = EFFICIENCY,
) -> list[Estimate]:
    """All layouts, the fastest that fit first."""
    found = [
        estimate(a, config, layout, gpu, load, efficiency)
        for layout in layouts(a, config.data.sequence_length, gpus)
        if not (config.train.fp8 == "delayed" and layout.recompute == "full")  # which is refused
    ]
    return sorted(found, key=lambda one: (not one.fits, one.seconds, one.memory.total))
