"""What a packed dataset holds, for people: report.json, report.html, and tables on the console.

files of the splits, counts, examples of what was dropped -> report -> report.json, report.html
"""

import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.table import Table

from mcore_sft.base.terminal import Console
from mcore_sft.data.errors import DataError
from mcore_sft.data.manifest import REPORTS
from mcore_sft.data.packs.dataset import Arrays
from mcore_sft.data.packs.proof import Proof, prove
from mcore_sft.data.packs.row_names import Shown
from mcore_sft.data.report.figures import summary
from mcore_sft.data.report.page import page
from mcore_sft.data.report.show import coloured
from mcore_sft.data.rows import num_trained
from mcore_sft.data.selection.contamination import Kind
from mcore_sft.data.text.prompt import Example, Prompt
from mcore_sft.data.text.tokenizer import Tokenizer
from mcore_sft.data.workers import Workers

FORMAT = 1
JSON, HTML = REPORTS

_PAIRS = 20
_EXAMPLES = 3
_BINS = 32
_LONGEST_EXAMPLE = 8192


def write_report(
    folder: Path,
    *,
    counts: Mapping[str, Mapping[str, Any]],
    inputs: Mapping[str, Any],
    sequence_length: int,
    dropped: Mapping[str, Mapping[str, Sequence[Shown]]],
    tokenizer: Tokenizer,
    prompt: Prompt,
    workers: Workers | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Prove what must hold of every example in `folder`, and write the report beside the files.

    counts: those of each split; dropped: for each split, some rows of each reason for dropping.
    The same dataset gives the same bytes. `DataError` names the first example that should not be.
    """
    report = {
        "format": FORMAT,
        "sequence_length": sequence_length,
        "inputs": inputs,
        "prompt": {"text": prompt.text("{problem}"), "stop_tokens": list(prompt.stop_tokens)},
        "splits": {
            split: _describe_split(
                Arrays.open(folder, split),
                counts[split],
                dropped=dropped.get(split, {}),
                sources=inputs["sources"].get(split, inputs["sources"]["train"]),
                tokenizer=tokenizer,
                stop_ids=prompt.stop_ids,
                sequence_length=sequence_length,
                workers=workers,
                advance=advance,
            )
            for split in counts
        },
    }
    _write(folder / JSON, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    _write(folder / HTML, page(report))


def _write(file: Path, text: str) -> None:
    """Rows may hold half of a surrogate pair, which JSON spells as an escape and HTML as it is."""
    file.write_bytes(text.encode(errors="backslashreplace"))


def _describe_split(
    arrays: Arrays,
    counts: Mapping[str, Any],
    *,
    dropped: Mapping[str, Sequence[Shown]],
    sources: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    stop_ids: Sequence[int],
    sequence_length: int,
    workers: Workers | None,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    ours = not counts["tokenized_elsewhere"]
    proof = prove(
        arrays,
        sequence_length=sequence_length,
        stop_ids=stop_ids if ours else None,
        bos_id=tokenizer.bos_id,
        vocab=tokenizer.vocab,
        workers=workers,
        advance=advance,
    )
    _require_counts(arrays, proof, counts)
    width = _bin_width(len(proof.lengths) - 1)
    return {
        "counts": dict(counts),
        "supervised_share": round(counts["supervised_tokens"] / counts["tokens"], 6),
        "sources": [_source(source, counts, index) for index, source in enumerate(sources)],
        "proof": {
            "examples": proof.examples,
            "stops": ours,
            "with_bos": proof.with_bos,
            "trained": dict(proof.parts),
        },
        "lengths": {
            "tokens": _distribution(proof.lengths, width),
            "supervised": _distribution(proof.supervised, width),
        },
        "dropped": {reason: dropped.get(reason, []) for reason in counts["dropped"]},
        "contamination": _contamination(Path(f"{arrays.prefix}.contamination.jsonl")),
        "examples": [
            _describe_example(arrays, index, tokenizer) for index in _spread(proof.examples)
        ],
    }


def _source(source: Mapping[str, Any], counts: Mapping[str, Any], index: int) -> dict[str, Any]:
    """What is called what the user called it, and what became of its rows."""
    parts = [str(source[key]) for key in ("name", "split") if source.get(key)]
    return {
        "source": source["path"] + (f" [{', '.join(parts)}]" if parts else ""),
        "rows": counts["source_rows"][index],
        "examples": counts["source_examples"][index],
        "visits": counts["source_visits"][index],
    }


def _require_counts(arrays: Arrays, proof: Proof, counts: Mapping[str, Any]) -> None:
    """Whether the counts are those of the files."""
    held = {
        "examples": proof.examples,
        "tokens": proof.tokens,
        "supervised_tokens": proof.supervised_tokens,
    }
    for name, number in held.items():
        if counts[name] != number:
            raise DataError(
                f"{arrays.prefix}: {counts[name]} {name} were counted, but the files hold "
                f"{number}; run preprocess again with --overwrite"
            )


def _distribution(having: npt.NDArray[np.int64], width: int) -> dict[str, Any]:
    """Of having[n], the number of examples that have n tokens: what is usual, and a histogram.

    Step i of the histogram counts those of i * width + 1 to (i + 1) * width tokens.
    """
    total = int(having.sum())
    below = np.cumsum(having)
    at = {"p5": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99}
    return {
        "shortest": int(np.flatnonzero(having)[0]),
        **{name: int(np.searchsorted(below, share * total)) for name, share in at.items()},
        "longest": int(np.flatnonzero(having)[-1]),
        "mean": round(float(np.arange(len(having)) @ having) / total, 1),
        "step": width,
        "histogram": np.add.reduceat(having[1:], np.arange(0, len(having) - 1, width)).tolist(),
    }


def _bin_width(longest: int) -> int:
    """The power of two that makes at most _BINS steps of lengths up to `longest`."""
    return 1 << ((longest - 1) // _BINS).bit_length()


def _contamination(file: Path) -> dict[str, Any]:
    """How many pairs of which kind were found, and the first, the strongest kinds before others."""
    if not file.is_file():
        return {"kinds": {}, "pairs": []}
    strength = {kind: place for place, kind in enumerate(get_args(Kind))}
    kinds: Counter[str] = Counter()

    def pairs() -> Iterator[dict[str, Any]]:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                pair: dict[str, Any] = json.loads(line)
                kinds[pair["kind"]] += 1
                yield pair

    strongest = heapq.nsmallest(_PAIRS, pairs(), key=lambda pair: strength[pair["kind"]])
    return {"kinds": {kind: kinds[kind] for kind in strength if kinds[kind]}, "pairs": strongest}


def _spread(count: int) -> list[int]:
    """Some of `count` examples, evenly spread."""
    some = min(_EXAMPLES, count)
    return [count * (2 * i + 1) // (2 * some) for i in range(some)]


def _describe_example(arrays: Arrays, index: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """One example as text, in runs of tokens that are alike: (text, trained, special)."""
    start, end = arrays.span_offsets[index : index + 2].tolist()
    tokens, spans = arrays.tokens[index], np.array(arrays.spans[start:end])
    shown = Example(tokens=tokens[:_LONGEST_EXAMPLE], spans=np.minimum(spans, _LONGEST_EXAMPLE))
    text = coloured(shown, tokenizer)
    return {
        "example": index,
        "tokens": len(tokens),
        "supervised": int(num_trained(spans).sum()),
        "runs": [
            [text.plain[run.start : run.end], "green" in str(run.style), "bold" in str(run.style)]
            for run in text.spans
        ],
    }


def show_manifest(manifest: Mapping[str, Any], folder: Path, *, console: Console) -> None:
    """Print what became of the rows of every split, the packs, and where they lie."""
    splits: Mapping[str, Mapping[str, Any]] = manifest["splits"]
    table = Table(title="packed dataset", title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("")
    for split in splits:
        table.add_column(split, justify="right")
    for title, section in summary(splits, manifest["sequence_length"]).items():
        table.add_row(title, style="bold")
        for label, figures in section.items():
            table.add_row(f"  {label}", *figures)
        table.add_section()
    console.print(table)
    console.print(f"\n{folder}  {manifest['fingerprint'][:12]}", soft_wrap=True)
    if (folder / HTML).is_file():
        console.print(f"{folder / HTML}: all of this, with examples", soft_wrap=True)
