"""What the prompts of a split really had: the instruction or not, and which system texts.

Encoded (system texts) -> record in manifest.json -> mcore_sft.json of an exported model

Every number counts examples as an epoch shows them, and is exact; texts are told apart by 64 bits
of a hash. Listed are the most frequent of the texts that more than one in KEPT + 1 of the encoded
examples have, or of all, where there are no more than KEPT: memory is bounded.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mcore_sft.data.selection.duplicates import text_hashes

MODEL_FILE = "mcore_sft.json"
"""The file of a checkpoint and of an exported folder that tells what the model was trained with."""

KEPT = 1024
"""System texts that are in memory at a time."""

LISTED = 20
"""System texts that a record lists, the most frequent first."""

SystemHashes = npt.NDArray[np.uint64]


def system_hashes(texts: Sequence[str | None]) -> SystemHashes:
    """A number for the system text of each of N conversations [N]; 0 where it has none."""
    hashes = text_hashes(pa.array([text or "" for text in texts], pa.large_string()))[:, 0]
    there = np.array([text is not None for text in texts], np.bool_)
    return np.where(there, np.maximum(hashes, 1), 0).astype(np.uint64)


class SystemTexts:
    """The frequent ones among all that are added (Misra and Gries, 1982), and the first few."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, None] = {}

    def add(self, counts: Mapping[str, int]) -> None:
        """Count the texts of one block."""
        self._counts.update(counts)
        if len(self._first) < LISTED:
            self._first.update(dict.fromkeys(islice(counts, LISTED)))
        if len(self._counts) > KEPT:
            cut = sorted(self._counts.values())[-KEPT - 1]
            self._counts = Counter({t: n - cut for t, n in self._counts.items() if n > cut})

    def by_hash(self) -> dict[int, str]:
        """The texts that are kept, by the number that `system_hashes` gives them."""
        texts = list({**self._first, **self._counts})
        return dict(zip(system_hashes(texts).tolist(), texts, strict=True))


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to ask: under the instruction or not, with a system text or none."""

    instruction: bool
    system: str | None


def record(
    *,
    problems: int,
    wording: Way,
    systems: SystemHashes,
    times: npt.NDArray[np.int16],
    texts: Mapping[int, str],
    elsewhere: int,
) -> dict[str, Any]:
    """The record of a split.

    problems: examples of a problem and its solution, all asked in the way of `wording`; systems and
    times [C]: the system text of each conversation, and how often an epoch shows it; texts: the
    system texts that are known; elsewhere: examples that others have tokenized.
    """
    found, which = np.unique(systems, return_inverse=True)
    shown = np.bincount(which, times, minlength=len(found)).astype(np.int64)
    counts = dict(zip(found.tolist(), shown.tolist(), strict=True))
    without = counts.pop(0, 0)
    own = None if wording.system is None else int(system_hashes([wording.system])[0])
    distinct = len(counts) + int(problems > 0 and own is not None and own not in counts)
    ways = Counter({(False, texts[key]): n for key, n in counts.items() if key in texts})
    if problems and wording.system is not None:
        ways[wording.instruction, wording.system] += problems
    elif problems:
        without += problems
    ranked = sorted(ways.items(), key=lambda item: (-item[1], item[0]))
    return {
        "with_instruction": problems if wording.instruction else 0,
        "without_instruction": int(times.sum()) + (0 if wording.instruction else problems),
        "tokenized_elsewhere": elsewhere,
        "without_system_text": without,
        "distinct_system_texts": distinct,
        "system_texts": [
            {"text": text, "examples": count, "with_instruction": instruction}
            for (instruction, text), count in ranked[:LISTED]
        ],
    }


def ways(told: Mapping[str, Any], own: str | None) -> dict[Way, int]:
    """The ways to ask that a record lists and how many examples had each, the most frequent first.

    `own` is the system text that stands before problems.
    """
    under, without = told["with_instruction"], told["without_system_text"]
    found = {Way(instruction=True, system=own): under}
    found[Way(instruction=False, system=None)] = without - (under if own is None else 0)
    for listed in told["system_texts"]:
        way = Way(instruction=listed["with_instruction"], system=listed["text"])
        found[way] = listed["examples"]
    ranked = sorted(found.items(), key=lambda item: -item[1])
    some = {way: count for way, count in ranked if count}
    # Where every text is rare, none may be listed; but then there is no instruction either.
    return some or ({Way(instruction=False, system=None): 0} if told["without_instruction"] else {})
