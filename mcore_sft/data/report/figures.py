"""Counts of the splits in, the labelled figures that console and report show out.

rows read - dropped - held out = examples;    an epoch shows examples as often as weights say
"""

from collections.abc import Mapping
from typing import Any

from mcore_sft.data.packs.split import by_rule

Section = dict[str, tuple[str, ...]]
"""Label -> a figure for each split."""

Splits = Mapping[str, Mapping[str, Any]]


def summary(splits: Splits, sequence_length: int) -> dict[str, Section]:
    """By title: rows and what became of them, an epoch, its packs, and what was found, if any."""
    examples = {
        "examples": _shares(splits, "examples", "rows"),
        "longest, in tokens": _numbers(splits, "longest"),
    }
    epoch = {
        "examples shown": _numbers(splits, "visits"),
        "tokens": _numbers(splits, "tokens"),
        "supervised tokens": _shares(splits, "supervised_tokens", "tokens"),
        f"packs of {sequence_length:,}": _numbers(splits, "packs"),
        "packing efficiency": tuple(f"{c['packing_efficiency']:.2%}" for c in splits.values()),
        "examples per pack": tuple(f"{c['examples_per_pack']:.2f}" for c in splits.values()),
    }
    sections = {
        "rows": {**_rows(splits), **examples},
        "an epoch": epoch,
        "overlaps": _found(splits),
    }
    return {title: section for title, section in sections.items() if section}


def _rows(splits: Splits) -> Section:
    section = {"rows read": _numbers(splits, "rows")}
    for reason in by_rule({reason for counts in splits.values() for reason in counts["dropped"]}):
        section[f"dropped: {reason}"] = tuple(
            _share(counts["dropped"].get(reason, 0), counts["rows"]) for counts in splits.values()
        )
    if any(counts.get("held_out") for counts in splits.values()):
        section["held out for validation"] = _shares(splits, "held_out", "rows")
    return section


def _found(splits: Splits) -> Section:
    """Problems that benchmarks ask too, and those of training that validation asks."""
    section = {}
    named = [counts.get("contaminated_by", {}) for counts in splits.values()]
    for benchmark in sorted({name for names in named for name in names}):
        section[f"problems that share words with {benchmark or 'a benchmark'}"] = tuple(
            f"{names.get(benchmark, 0):,}" for names in named
        )
    if any(counts.get("shared_problems") for counts in splits.values()):
        section["problems in train and validation"] = _numbers(splits, "shared_problems")
    return section


def _numbers(splits: Splits, key: str) -> tuple[str, ...]:
    return tuple(f"{counts[key]:,}" if key in counts else "" for counts in splits.values())


def _shares(splits: Splits, key: str, whole: str) -> tuple[str, ...]:
    return tuple(_share(counts.get(key, 0), counts[whole]) for counts in splits.values())


def _share(number: int, whole: int) -> str:
    return f"{number:,} ({number / max(whole, 1):.1%})"
