"""Encoded examples in, the files of one split out: tokens as they come, packs at the end."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.data.encode import Encoded
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import token_type, write_index

Lengths = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int64]


class SplitWriter:
    """Writes one split into `folder`; holds 20 bytes an example until `finish`."""

    def __init__(self, folder: Path, split: str, *, vocab_size: int) -> None:
        self._pack = _packing_operator()
        self._prefix = folder / split
        self._split = split
        self._dtype = token_type(vocab_size)
        self._tokens = self._prefix.with_suffix(".bin").open("wb")
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._spans: list[npt.NDArray[np.int32]] = []
        self._span_counts: list[npt.NDArray[np.int32]] = []
        self._dropped: Counter[str] = Counter()
        self._rows = 0

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()

    def add(self, encoded: Encoded) -> None:
        """Append the examples of one chunk."""
        self._tokens.write(encoded.tokens.astype(self._dtype).tobytes())
        self._lengths.append(encoded.lengths)
        self._spans.append(encoded.spans)
        self._span_counts.append(encoded.span_counts)
        self._dropped.update(encoded.dropped)
        self._rows += encoded.rows

    def finish(self, *, sequence_length: int, seed: int) -> dict[str, Any]:
        """Pack, write all other files, and return the counts of the split."""
        self._tokens.close()
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        if len(lengths) == 0:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self._dropped.items()) or "empty"
            raise DataError(
                f"data.{self._split}: no example is left of {self._rows} rows ({reasons}); "
                "give other sources, or a longer data.sequence_length"
            )
        write_index(self._prefix.with_suffix(".idx"), lengths, self._dtype)
        span_offsets = _offsets(np.concatenate(self._span_counts))
        spans = np.concatenate(self._spans)
        self._save("spans", spans)
        self._save("span_offsets", span_offsets)
        order, pack_offsets = self._pack(lengths, sequence_length, seed)
        self._save("packs", order)
        self._save("pack_offsets", pack_offsets)
        # The first token of an example is predicted by nothing.
        trained = _offsets(spans[:, 1] - np.maximum(spans[:, 0], 1))[span_offsets]
        supervised = np.add.reduceat(np.diff(trained)[order], pack_offsets[:-1])
        self._save("supervised", supervised.astype(np.int32))
        tokens, packs = int(lengths.sum(dtype=np.int64)), len(pack_offsets) - 1
        return {
            "rows": self._rows,
            "examples": len(lengths),
            "dropped": dict(sorted(self._dropped.items())),
            "tokens": tokens,
            "supervised_tokens": int(supervised.sum()),
            "longest": int(lengths.max()),
            "packs": packs,
            "packing_efficiency": round(tokens / (packs * sequence_length), 6),
            "examples_per_pack": round(len(lengths) / packs, 6),
        }

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


def _offsets(counts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Running sum that begins with 0, one longer than `counts`."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets
