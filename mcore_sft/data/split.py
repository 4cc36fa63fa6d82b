"""Encoded examples in, the files of one split out: tokens as they come, packs at the end."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.config import FilterConfig
from mcore_sft.data.contamination import Finding
from mcore_sft.data.encode import Encoded
from mcore_sft.data.errors import DataError
from mcore_sft.data.filters import Seen, row_order
from mcore_sft.data.indexed import running_sum, token_type, write_index

Lengths = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int64]


DUPLICATE = "duplicate"
"""Why an example is dropped whose problem and solution came before."""

NOT_SAMPLED = "not sampled"
"""Why an example is dropped that downsampling leaves out."""


class SplitWriter:
    """Writes one split into `folder`; holds some 45 bytes an example until `finish`."""

    def __init__(self, folder: Path, split: str, *, vocab_size: int, filters: FilterConfig) -> None:
        self._filters = filters
        self._seen = Seen()
        self._pack = _packing_operator()
        self._prefix = folder / split
        self._split = split
        self._dtype = token_type(vocab_size)
        self._tokens = self._prefix.with_suffix(".bin").open("wb")
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._spans: list[npt.NDArray[np.int32]] = []
        self._span_counts: list[npt.NDArray[np.int32]] = []
        self._problems: list[npt.NDArray[np.uint64]] = []
        self._findings: set[Finding] = set()
        self._dropped: Counter[str] = Counter()
        self._rows = 0

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()

    def add(self, encoded: Encoded) -> None:
        """Append the examples of one chunk, but for those that came before."""
        if self._filters.deduplicate:
            new = self._seen.new(encoded.hashes)
            encoded = encoded if new.all() else encoded.keep(new, DUPLICATE)
        self._tokens.write(encoded.tokens.astype(self._dtype).tobytes())
        self._lengths.append(encoded.lengths)
        self._spans.append(encoded.spans)
        self._span_counts.append(encoded.span_counts)
        self._problems.append(encoded.problems)
        self._findings.update(encoded.findings)
        self._dropped.update(encoded.dropped)
        self._rows += encoded.rows

    def finish(self, *, sequence_length: int, seed: int) -> dict[str, Any]:
        """Pack, write all other files, and return the counts of the split."""
        self._tokens.close()
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        spans = np.concatenate([np.zeros((0, 2), np.int32), *self._spans])
        span_counts = np.concatenate([np.zeros(0, np.int32), *self._span_counts])
        problems = np.concatenate([np.zeros(0, np.uint64), *self._problems])
        rows = row_order(problems, self._filters)
        if not np.array_equal(rows, np.arange(len(problems))):
            self._reorder(rows, lengths)
            self._dropped[NOT_SAMPLED] += len(lengths) - len(rows)
            spans = spans[_ranges(running_sum(span_counts), rows)]
            lengths, span_counts = lengths[rows], span_counts[rows]
        self._write_findings()
        if len(lengths) == 0:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self._dropped.items()) or "empty"
            raise DataError(
                f"data.{self._split}: no example is left of {self._rows} rows ({reasons}); "
                "give other sources, or a longer data.sequence_length"
            )
        write_index(self._prefix.with_suffix(".idx"), lengths, self._dtype)
        span_offsets = running_sum(span_counts)
        self._save("spans", spans)
        self._save("span_offsets", span_offsets)
        order, pack_offsets = self._pack(lengths, sequence_length, seed)
        self._save("packs", order)
        self._save("pack_offsets", pack_offsets)
        # The first token of an example is predicted by nothing.
        trained = running_sum(spans[:, 1] - np.maximum(spans[:, 0], 1))[span_offsets]
        supervised = np.add.reduceat(np.diff(trained)[order], pack_offsets[:-1])
        self._save("supervised", supervised.astype(np.int32))
        tokens, packs = int(lengths.sum(dtype=np.int64)), len(pack_offsets) - 1
        return {
            "rows": self._rows,
            "examples": len(lengths),
            "dropped": dict(sorted((+self._dropped).items())),
            "contaminated_problems": len({finding.problem for finding in self._findings}),
            "tokens": tokens,
            "supervised_tokens": int(supervised.sum()),
            "longest": int(lengths.max()),
            "packs": packs,
            "packing_efficiency": round(tokens / (packs * sequence_length), 6),
            "examples_per_pack": round(len(lengths) / packs, 6),
        }

    def _reorder(self, rows: Ids, lengths: Lengths) -> None:
        """Write the tokens anew, those of `rows` alone and in this order."""
        file = self._prefix.with_suffix(".bin")
        offsets = running_sum(lengths)
        tokens = np.memmap(file, dtype=self._dtype, mode="r")
        aside = file.with_suffix(".reordered")
        with aside.open("wb") as out:
            for some in np.array_split(rows, len(rows) // 1024 + 1):
                out.write(tokens[_ranges(offsets, some)].tobytes())
        aside.replace(file)

    def _write_findings(self) -> None:
        """What training and benchmarks share, in an order that no worker decides."""
        if not self._findings:
            return
        lines = sorted(
            json.dumps(dataclasses.asdict(finding), ensure_ascii=False) + "\n"
            for finding in self._findings
        )
        file = self._prefix.with_suffix(".contamination.jsonl")
        file.write_text("".join(lines), encoding="utf-8")

    def _save(self, name: str, array: npt.NDArray[Any]) -> None:
        np.save(self._prefix.with_suffix(f".{name}.npy"), array, allow_pickle=False)


def _packing_operator() -> Callable[[Lengths, int, int], tuple[Ids, Ids]]:
    """`best_fit_pack` on arrays; found before anything is tokenized, or an error says how."""
    # Imported here, because the processes that tokenize load this module and need no torch.
    import torch

    from mcore_sft.ops.packing import best_fit_pack

    def pack(lengths: Lengths, capacity: int, seed: int) -> tuple[Ids, Ids]:
        order, offsets = best_fit_pack(torch.from_numpy(lengths), capacity, seed)
        return order.numpy(), offsets.numpy()

    return pack


def _ranges(offsets: Ids, which: Ids) -> Ids:
    """The numbers from offsets[i] to offsets[i + 1], for each i of `which`, end to end."""
    counts = offsets[which + 1] - offsets[which]
    before = np.cumsum(counts) - counts
    numbers: Ids = np.arange(counts.sum()) + np.repeat(offsets[which] - before, counts)
    return numbers
