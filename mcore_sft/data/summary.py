"""Counts of the splits in, the labelled figures that console and report show out."""

from collections.abc import Mapping
from typing import Any

Section = dict[str, tuple[str, ...]]
"""Label -> a figure for each split."""

Splits = Mapping[str, Mapping[str, Any]]


def summary(splits: Splits, sequence_length: int) -> list[Section]:
    """Rows and what became of them, tokens, packs, and what was found, where there is any."""
    tokens = {
        "tokens": _numbers(splits, "tokens"),
        "supervised tokens": _shares(splits, "supervised_tokens", "tokens"),
        "longest example": _numbers(splits, "longest"),
    }
    packs = {
        f"packs of {sequence_length:,}": _numbers(splits, "packs"),
        "packing efficiency": tuple(f"{c['packing_efficiency']:.2%}" for c in splits.values()),
        "examples per pack": tuple(f"{c['examples_per_pack']:.2f}" for c in splits.values()),
    }
    found = {}
    for key, label in {
        "contaminated_problems": "problems that share words with a benchmark's",
        "shared_problems": "problems in train and validation",
    }.items():
        if any(counts.get(key) for counts in splits.values()):
            found[label] = _numbers(splits, key)
    return [section for section in (_rows(splits), tokens, packs, found) if section]


def _rows(splits: Splits) -> Section:
    section = {"rows read": _numbers(splits, "rows")}
    for reason in sorted({reason for counts in splits.values() for reason in counts["dropped"]}):
        section[f"dropped: {reason}"] = tuple(
            _share(counts["dropped"].get(reason, 0), counts["rows"]) for counts in splits.values()
        )
    section["examples kept"] = _shares(splits, "examples", "rows")
    if any(counts["visits"] != counts["examples"] for counts in splits.values()):
        section["visits of an epoch"] = _numbers(splits, "visits")
    return section


def _numbers(splits: Splits, key: str) -> tuple[str, ...]:
    return tuple(f"{counts[key]:,}" if key in counts else "" for counts in splits.values())


def _shares(splits: Splits, key: str, whole: str) -> tuple[str, ...]:
    return tuple(_share(counts.get(key, 0), counts[whole]) for counts in splits.values())


def _share(number: int, whole: int) -> str:
    return f"{number:,} ({number / max(whole, 1):.1%})"
