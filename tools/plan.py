"""What will fit and how fast, before anything runs: a configuration and a number of GPUs in.

    python tools/plan.py --config configs/X.yaml --gpus 8 --gpu h100

By arithmetic alone (mcore_sft/plan.py says how): of the model nothing but its config.json is read,
of the data the manifest, where it is packed. Speeds are data sheets times assumed shares.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mcore_sft import command


def main() -> None:
    """Print the plan of the command line."""
    arguments = _arguments()
    config = command.experiment(arguments)
    # Imported late: torch takes seconds, and a typo should cost none of them.
    from mcore_sft import plan
    from mcore_sft.model import architecture as arch

    if arguments.gpu not in plan.GPUS:
        raise plan.PlanError(f"--gpu {arguments.gpu}: expected one of {', '.join(plan.GPUS)}")
    a, gpu, gpus = arch.read(config.model.path), plan.GPUS[arguments.gpu], arguments.gpus
    efficiency = arguments.efficiency or plan.EFFICIENCY
    a.check(config.parallel, config.data.sequence_length)
    load = plan.workload(config)
    own = plan.configured(config, gpus)
    stages = plan.stage_memory(a, config, own, load)
    asked = plan.estimate(a, config, own, gpu, load, efficiency)
    ranked = plan.rank(a, config, gpus, gpu, load, efficiency)
    shown = ranked[: arguments.top]

    console = Console(width=None if Console().is_terminal else 140)
    where = "from the packed dataset" if load.measured else "assumed: no packed dataset"
    console.print(
        f"{config.name} on {gpus} x {arguments.gpu}: {load.examples:.1f} examples and "
        f"{load.supervised:.0f} supervised tokens a pack ({where}); {efficiency:.0%} of "
        f"the peak and {plan.LINK_SHARE:.0%} of the links are assumed, nothing is measured",
        soft_wrap=True,
    )
    console.print(plan.memory_table(stages, "As configured: GiB on a rank of each pipeline stage"))
    console.print(
        f"{asked.memory.total / plan.GIB:.1f} GiB and {plan.RESERVE / plan.GIB:.0f} in reserve of "
        f"{gpu.memory / plan.GIB:.1f}: {'fits' if asked.fits else 'DOES NOT FIT'}; "
        f"{asked.packs} packs a step, {asked.seconds:.2f} s a step, "
        f"{_days(asked, config.train.steps):.2f} days for {config.train.steps} steps",
        soft_wrap=True,
    )
    console.print(_ranking(shown, config.train.steps))
    if not any(one.fits for one in ranked):
        console.print("no layout fits: take more GPUs, or those with more memory", soft_wrap=True)
    if arguments.json:
        content = {
            "gpus": gpus,
            "gpu": arguments.gpu,
            "efficiency": efficiency,
            "link_share": plan.LINK_SHARE,
            "reserve_bytes": plan.RESERVE,
            "workload": asdict(load),
            "stages": [asdict(stage) for stage in stages],
            "configured": _row(asked, config.train.steps),
            "layouts": [_row(one, config.train.steps) for one in ranked],
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = command.parser("What will fit and how fast, before anything runs.")
    parser.add_argument("--gpus", type=_count, required=True, metavar="N")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="such as h100 (the default)")
    parser.add_argument(
        "--efficiency",
        type=_share,
        metavar="SHARE",
        help="of the peak that computation is assumed to reach (default: 0.45)",
    )
    parser.add_argument("--top", type=_count, default=10, metavar="N", help="layouts shown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it, all layouts")
    return parser.parse_intermixed_args()


def _ranking(estimates: list[Any], steps: int) -> Table:
    table = Table(title="Layouts, the fastest that fit first", title_justify="left")
    for name in ("GiB", "fits", "packs", "s/step", "days"):
        table.add_column(name, justify="right")
    table.add_column("configuration", overflow="fold")
    for one in estimates:
        keys = " ".join(f"{key}={str(value).lower()}" for key, value in one.layout.keys.items())
        table.add_row(
            f"{one.memory.total / 2**30:.1f}",
            "yes" if one.fits else "no",
            str(one.packs),
            f"{one.seconds:.2f}",
            f"{_days(one, steps):.2f}",
            keys or "the defaults",
        )
    return table


def _row(one: Any, steps: int) -> dict[str, Any]:
    return asdict(one) | {"total_bytes": one.memory.total, "days": _days(one, steps)}


def _days(one: Any, steps: int) -> float:
    days: float = one.seconds * steps / 86400
    return days


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more; given {text!r}")
    return int(text)


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
