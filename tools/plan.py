"""What will fit and how fast, before anything runs: a configuration and a number of GPUs in.

    python tools/plan.py --config configs/X.yaml --gpus 8 --gpu h100

By arithmetic alone (mcore_sft/plan says how): of the model nothing but its config.json is read, of
the data the manifest, where it is packed. Speeds are data sheets times assumed shares.
"""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mcore_sft import command
from mcore_sft.base.files import check_writable, write_named
from mcore_sft.base.terminal import Console

if TYPE_CHECKING:
    from mcore_sft.plan.ranking import Estimate


def main() -> None:
    """Print the plan of the command line."""
    arguments = _arguments()
    if arguments.json:
        check_writable(arguments.json)
    config = command.experiment(arguments)
    # Imported late: torch takes seconds, and a typo should cost none of them.
    from mcore_sft.model import families
    from mcore_sft.plan import layout, memory, ranking, speed
    from mcore_sft.runtime.hardware import FUSED_ATTENTION_OLDEST, chosen_layers

    if arguments.gpu not in speed.GPUS:
        raise layout.PlanError(f"--gpu {arguments.gpu}: expected one of {', '.join(speed.GPUS)}")
    a, gpu, gpus = families.read(config.model.path), speed.GPUS[arguments.gpu], arguments.gpus
    efficiency = arguments.efficiency or speed.EFFICIENCY
    a.check(config.parallel, config.data.sequence_length)
    load = layout.workload(config)
    own = layout.configured(config, gpus)
    stages = memory.stage_memory(a, config, own, load)
    asked = ranking.estimate(a, config, own, gpu, load, efficiency)
    ranked = ranking.rank(a, config, gpus, gpu, load, efficiency)
    steps = config.train.steps

    def row(one: "Estimate") -> dict[str, Any]:
        """All of an estimate, and what the tables show of it."""
        return asdict(one) | {
            "total_bytes": one.memory.total,
            "tokens_per_second_per_gpu": one.packs * load.tokens / one.seconds / gpus,
            "run_hours": one.seconds * steps / 3600,
        }

    console = Console(width=None if Console().is_terminal else 160, soft_wrap=True)
    where = "from the packed dataset" if load.measured else "assumed: no packed dataset"
    console.print(
        f"{config.name} on {gpus} x {arguments.gpu}\n"
        f"a pack: {load.examples:.1f} examples, {load.supervised:.0f} supervised tokens ({where})\n"
        f"assumed: {efficiency:.0%} of the peak, {speed.LINK_SHARE:.0%} of the links; nothing is "
        "measured"
    )
    layers = chosen_layers(config.model, config.train, gpu=True)
    if layers == "transformer_engine" and gpu.capability < FUSED_ATTENTION_OLDEST:
        console.print(
            f"{arguments.gpu}: attention within the documents of a pack needs flash-attn "
            "(docs/gpu.md)"
        )
    console.print(memory.table(stages, "As configured: GiB on a rank of each pipeline stage"))
    found = row(asked)
    console.print(
        f"{asked.memory.total / memory.GIB:.1f} GiB and {ranking.RESERVE / memory.GIB:.0f} in "
        f"reserve of {gpu.memory / memory.GIB:.0f}: {'fits' if asked.fits else 'DOES NOT FIT'}; "
        f"{asked.packs} packs a step and {own.filling(asked.packs)}; {asked.seconds:.2f} s a step, "
        f"{found['tokens_per_second_per_gpu']:,.0f} tokens a second and GPU, "
        f"{found['run_hours']:,.1f} hours for {steps:,} steps"
    )
    console.print(_ranking(ranked[: arguments.top], [row(one) for one in ranked[: arguments.top]]))
    if not any(one.fits for one in ranked):
        console.print("no layout fits: take more GPUs, or those with more memory")
    if arguments.json:
        content = {
            "gpus": gpus,
            "gpu": arguments.gpu,
            "efficiency": efficiency,
            "link_share": speed.LINK_SHARE,
            "reserve_bytes": ranking.RESERVE,
            "workload": asdict(load),
            "stages": [asdict(stage) for stage in stages],
            "configured": found,
            "layouts": [row(one) for one in ranked],
        }
        write_named(arguments.json, json.dumps(content, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = command.parser("What will fit and how fast, before anything runs.")
    parser.add_argument("--gpus", type=command.count, metavar="N", help="how many (needed)")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="such as h100 (the default)")
    parser.add_argument(
        "--efficiency",
        type=_share,
        metavar="SHARE",
        help="of the peak that computation is assumed to reach (default: 0.45)",
    )
    parser.add_argument("--top", type=command.count, default=10, metavar="N", help="layouts shown")
    parser.add_argument(
        "--json", type=command.path, metavar="FILE", help="write all of it, all layouts"
    )
    arguments = parser.parse_intermixed_args()
    if not (arguments.gpus or arguments.print_config):
        parser.error("the following arguments are required: --gpus")
    return arguments


def _ranking(estimates: "list[Estimate]", rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Layouts, the fastest that fit first", title_justify="left")
    for name in ("GiB", "fits", "packs", "empty", "s/step", "tokens/s/GPU", "hours"):
        table.add_column(name, justify="right")
    table.add_column("configuration", overflow="fold")
    for one, row in zip(estimates, rows, strict=True):
        keys = " ".join(f"{key}={str(value).lower()}" for key, value in one.layout.keys.items())
        table.add_row(
            f"{one.memory.total / 2**30:.1f}",
            "yes" if one.fits else "no",
            str(one.packs),
            f"{100 * one.empty:.0f} %",
            f"{one.seconds:.2f}",
            f"{row['tokens_per_second_per_gpu']:,.0f}",
            f"{row['run_hours']:,.1f}",
            keys or "the defaults",
        )
    return table


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0, at most 1; given {text!r}")
    return value


if __name__ == "__main__":
    command.run(main)
