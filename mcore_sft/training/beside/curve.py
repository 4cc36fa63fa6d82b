"""The JSON lines of a run in, a picture of its losses out."""

import json
from pathlib import Path


def read_losses(log: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(step, loss) of training and of validation; steps without a loss are left out.

    So is a last line that is being written, or was when the run was killed.
    """
    whole, _, _ = log.read_text(encoding="utf-8").rpartition("\n")
    entries = [json.loads(line) for line in whole.splitlines()]
    trained, validated = (
        [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
        for key in ("loss", "validation_loss")
    )
    return trained, validated


def draw(log: Path, picture: Path) -> None:
    """Draw the losses of `log` over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    trained, validated = read_losses(log)
    for points, style, label in ((trained, "-", "training"), (validated, "o-", "held out")):
        if points:
            axes.plot(*zip(*points, strict=True), style, linewidth=1, label=label)
    axes.set(xlabel="step", ylabel="loss per supervised token", yscale="log")
    # Where fewer than two of these lie in a narrow range, round numbers take their place.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=150)
