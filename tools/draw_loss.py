"""The JSON lines of a run in, a picture of its losses out."""

from pathlib import Path

from mcore_sft import command
from mcore_sft.base.errors import UserError
from mcore_sft.base.terminal import Parser, say


def main() -> None:
    """Draw the run of the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=command.path, metavar="DIR", help="such as results/NAME")
    parser.add_argument(
        "--output", type=command.path, metavar="FILE", help="without it, DIR/loss.png"
    )
    arguments = parser.parse_args()
    log: Path = arguments.run / "metrics.jsonl"
    if not log.exists():
        raise UserError(f"{log}: not there; give the folder of a run, such as results/NAME")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("matplotlib is not installed: pip install matplotlib") from None
    from mcore_sft.training.beside.curve import draw

    picture = arguments.output or arguments.run / "loss.png"
    draw(log, picture)
    say(f"wrote {picture}")


if __name__ == "__main__":
    command.run(main)
