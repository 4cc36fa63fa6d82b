"""Rows as what is written names and shows them: without the folders of this machine."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mcore_sft.data.encode.block import Sample, excerpt

Shown = dict[str, str]
"""A row that was dropped: where it stands, its text, and perhaps the row that it repeats."""


def place(where: str, root: Path) -> str:
    """FILE:NUMBER without the folders of this machine: from `root`, or in the file's own folder."""
    path = Path(where)
    if path.is_relative_to(root):
        path = path.relative_to(root)
    elif path.is_absolute():
        path = Path(*path.parts[-2:])
    return str(path) if where else ""


def shown(
    samples: Mapping[str, Sequence[Sample]], root: Path, decode: Callable[[list[int]], str]
) -> dict[str, list[Shown]]:
    """Rows of each reason as they are shown; `decode` gives the text of those that are tokens."""

    def show(sample: Sample) -> Shown:
        text = sample.text.removeprefix(f"{sample.where}: ")
        told = {
            "where": place(sample.where, root),
            "text": text or excerpt(decode(list(sample.tokens))),
        }
        return {**told, "same_as": place(sample.same_as, root)} if sample.same_as else told

    return {reason: [show(sample) for sample in some] for reason, some in samples.items()}
