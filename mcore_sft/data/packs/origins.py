"""Where the examples of a split come from: one row for each, and what is true of all.

SPLIT.origins.npy    a row for each example, in order, too long ones included: Origin
SPLIT.systems.npy    uint64, which system text a conversation has; not there without conversations
SPLIT.origins.json   files and sources by number, system texts, what became of the rows read

With them, a dataset is packed anew for another sequence length, and any example is found in its
source again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.data.encode.collect import Collected, Ids
from mcore_sft.data.encode.prompt_record import SystemHashes
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import begin_array
from mcore_sft.data.packs.row_names import Shown, place

FORMAT = 1

ORIGIN = np.dtype(
    [
        ("problem", "<u8"),  # a hash of it
        ("number", "<u4"),  # line or row of `file`
        ("tokens", "<i4"),
        ("file", "<i4"),
        ("source", "<i2"),
        ("times", "<i2"),  # how often an epoch shows it
    ]
)

_AT_ONCE = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Origins:
    """Those of one split. R = its examples, too long ones included.

    rows [R]: ORIGIN; systems uint64 [R], or [0]; files: by number; kinds: of each source; texts:
    system texts by their hash; counts: of the rows that were read; dropped: some of each reason.
    """

    rows: npt.NDArray[Any]
    systems: SystemHashes
    files: Sequence[str]
    kinds: Mapping[int, str]
    texts: Mapping[int, str]
    counts: Mapping[str, Any]
    dropped: Mapping[str, Sequence[Shown]]

    def where(self, index: int) -> str:
        """FILE:NUMBER of an example."""
        return f"{self.files[self.rows['file'][index]]}:{self.rows['number'][index]}"


def write(
    prefix: Path,
    everything: Collected,
    rows: Ids,
    times: npt.NDArray[np.int16],
    *,
    counts: Mapping[str, Any],
    dropped: Mapping[str, Sequence[Shown]],
    root: Path,
) -> None:
    """Write those of the examples `rows`, in this order."""
    names = list(dict.fromkeys(part.name for part in everything.parts))
    numbers = np.empty(len(everything), np.uint32)
    for part in everything.parts:
        own = part.column("numbers")
        if own.max(initial=0) >= 2**32:
            raise DataError(f"{part.name}: more than {2**32 - 1} rows; divide it into several")
        numbers[part.start : part.stop] = own
    known = {name: number for number, name in enumerate(names)}
    of_parts = {
        "file": [known[part.name] for part in everything.parts],
        "source": [part.source for part in everything.parts],
    }
    starts = np.array([part.start for part in everything.parts], np.int64)
    begin_array(file := Path(f"{prefix}.origins.npy"), ORIGIN, (len(rows),))
    with file.open("ab") as out:
        for first in range(0, len(rows), _AT_ONCE):
            some = rows[first : first + _AT_ONCE]
            made = np.empty(len(some), ORIGIN)
            made["problem"] = everything.problems[some]
            made["number"] = numbers[some]
            made["tokens"] = everything.lengths[some]
            owners = np.searchsorted(starts, some, side="right") - 1
            for name, values in of_parts.items():
                made[name] = np.array(values)[owners]
            made["times"] = times[first : first + _AT_ONCE]
            made.tofile(out)
    if "conversations" in everything.kinds.values():
        systems = np.zeros(len(everything), np.uint64)
        systems[: len(everything.systems)] = everything.systems
        np.save(f"{prefix}.systems.npy", systems[rows], allow_pickle=False)
    told = {
        "format": FORMAT,
        "files": [place(name, root) for name in names],
        "kinds": {str(source): kind for source, kind in sorted(everything.kinds.items())},
        "system_texts": {str(key): text for key, text in everything.system_texts.items()},
        "counts": counts,
        "dropped": dropped,
    }
    Path(f"{prefix}.origins.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def read(prefix: Path) -> Origins | None:
    """Those of a split, memory-mapped; None if it has none of this format, as older ones have."""
    try:
        told = json.loads(Path(f"{prefix}.origins.json").read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            return None
    except FileNotFoundError:
        return None
    systems = Path(f"{prefix}.systems.npy")
    return Origins(
        rows=np.load(f"{prefix}.origins.npy", mmap_mode="r", allow_pickle=False),
        systems=np.load(systems) if systems.is_file() else np.zeros(0, np.uint64),
        files=told["files"],
        kinds={int(source): kind for source, kind in told["kinds"].items()},
        texts={int(key): text for key, text in told["system_texts"].items()},
        counts=told["counts"],
        dropped=told["dropped"],
    )
