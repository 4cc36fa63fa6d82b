"""A distributed checkpoint in, or several to be averaged, and a Hugging Face folder out.

python tools/to_hf.py --checkpoint results/X/step_1000
python tools/to_hf.py --average results/X/step_10000 results/X/step_20000 results/X/step_30000
"""

from pathlib import Path

from mcore_sft import command
from mcore_sft.base.terminal import Console, Parser, say


def main() -> None:
    """Export what the command line names."""
    parser = Parser(description="Make a Hugging Face folder of a distributed checkpoint.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint", type=command.path, metavar="DIR", help="such as results/NAME/step_1000"
    )
    source.add_argument(
        "--average",
        type=command.path,
        nargs="+",
        metavar="DIR",
        help="checkpoints of one run, whose weights are averaged",
    )
    parser.add_argument(
        "--output",
        type=command.path,
        metavar="DIR",
        help="without it, hf_step_1000 or hf_average_10000_20000 beside the checkpoint",
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32", "fp16"),
        help="without it, weights are stored as they were trained",
    )
    arguments = parser.parse_args()
    checkpoints: list[Path] = arguments.average or [arguments.checkpoint]
    output: Path = arguments.output or _beside(checkpoints)
    # Imported late: torch takes seconds, and a typo should cost none of them.
    from mcore_sft.checkpoint.export import export

    checkpoint, *others = checkpoints
    console = Console(stderr=True)
    export(checkpoint, output, others=others, dtype=arguments.dtype, console=console)
    say(f"wrote {output}")


def _beside(checkpoints: list[Path]) -> Path:
    names = [path.name for path in checkpoints]
    if len(names) > 1:
        names = ["average", *(name.removeprefix("step_") for name in names)]
    return checkpoints[0].parent / f"hf_{'_'.join(names)}"


if __name__ == "__main__":
    command.run(main)
