"""A distributed checkpoint in, a Hugging Face folder out."""

import argparse
from pathlib import Path

from mcore_sft import command


def main() -> None:
    """Export the checkpoint of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="such as results/NAME/step_1000",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="without it, DIR/../hf_step_1000"
    )
    arguments = parser.parse_intermixed_args()
    checkpoint: Path = arguments.checkpoint
    output: Path = arguments.output or checkpoint.parent / f"hf_{checkpoint.name}"
    # Imported late: torch takes seconds, and a typo should cost none of them.
    from mcore_sft.checkpoint.export import export

    export(checkpoint, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    command.run(main)
