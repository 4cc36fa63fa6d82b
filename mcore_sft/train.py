"""The command that torchrun runs: `torchrun mcore_sft/train.py --config FILE [key=value ...]`.

`python mcore_sft/train.py --config FILE --dry-run [--gpus N]` builds everything without its bytes,
in one process, and tells what a rank of each pipeline stage would hold.
"""

import contextlib
import os
from typing import NoReturn

from mcore_sft import command
from mcore_sft.base.errors import UserError
from mcore_sft.config import RunConfig


def main() -> None:
    """Train the experiment of the command line."""
    try:
        config = prepare()
    except UserError as error:
        end_all(error)
    except SystemExit as end:
        if end.code:  # argparse has said why
            with contextlib.suppress(UserError):
                end_all(UserError("its command line is wrong, as its own log says"))
        raise
    if config is not None:
        from mcore_sft.training.loop import train

        train(config)


def end_all(error: UserError) -> NoReturn:
    """Raise `error`, which this rank has before it meets the others, once they know of it."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from mcore_sft.runtime.peers import end_together

        end_together(error)
    raise error


def prepare() -> RunConfig | None:
    """The experiment to train, with layers that are there; None if only a dry run was asked for."""
    parser = command.parser("Packed dataset -> distributed checkpoints.")
    parser.add_argument(
        "--dry-run", action="store_true", help="tell what a rank would hold, and stop"
    )
    parser.add_argument(
        "--gpus",
        type=command.count,
        metavar="N",
        help="of a dry run (default: as few as the layout needs)",
    )
    arguments = parser.parse_intermixed_args()
    config = command.experiment(arguments)
    if arguments.dry_run:
        dry_run(config, arguments.gpus or config.parallel.model_size)
        return None
    if arguments.gpus is not None:
        parser.error("--gpus goes with --dry-run; a run takes the processes that torchrun starts")
    # Imported late: torch and Megatron-core take seconds, and a typo should cost none of them.
    from mcore_sft.runtime.device import device
    from mcore_sft.runtime.hardware import layer_implementation, order_kernels
    from mcore_sft.runtime.launch import Launch

    Launch.read().check_restarts()
    order_kernels(config.parallel)  # before anything asks for a GPU
    # Megatron-core imports Transformer Engine, and a broken one would end it with a traceback.
    layer_implementation(config.model, config.train, device())
    return config


def dry_run(config: RunConfig, gpus: int) -> None:
    """Print what a rank of each pipeline stage would hold among `gpus`."""
    from dataclasses import replace

    from mcore_sft.base.terminal import Console
    from mcore_sft.model import families
    from mcore_sft.plan import layout, memory
    from mcore_sft.training import dry_run as dry

    architecture = families.read(config.model.path)
    architecture.check(config.parallel, config.data.sequence_length)
    load = layout.workload(config)
    own = layout.configured(config, gpus)
    planned = memory.stage_memory(architecture, config, own, load)
    stages = [
        replace(stage, weights=found.weights, gradients=found.gradients, optimizer=found.optimizer)
        for stage, found in zip(planned, dry.dry_run(config, architecture, gpus), strict=True)
    ]
    title = f"{config.name} on {gpus} GPU(s): GiB on a rank of each pipeline stage"
    console = Console(soft_wrap=True)
    console.print(memory.table(stages, title))
    console.print(
        "weights, gradients and optimizer from the real objects, on the meta device; activations "
        "and workspace by arithmetic, as tools/plan.py"
    )


# Saving a checkpoint starts processes that import this file again.
if __name__ == "__main__":
    command.run(main)
