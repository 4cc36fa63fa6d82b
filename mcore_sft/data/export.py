"""Sources in, NeMo-Skills' plain JSON lines out: the rows of training, before they are tokens."""

from pathlib import Path

import numpy as np

from mcore_sft.base.files import end_of_links, rename, sync
from mcore_sft.base.progress import Course
from mcore_sft.data.encode.job import Job
from mcore_sft.data.encode.stage import benches, collect, encode
from mcore_sft.data.encode.store import Store
from mcore_sft.data.errors import DataError
from mcore_sft.data.finish import rules
from mcore_sft.data.packs.gather import Output, gather
from mcore_sft.data.packs.split import exported
from mcore_sft.data.staging import workspace

_BYTES = np.dtype(np.uint8)
_READING, _ENCODING, _WRITING = "checksums", "encoding", "writing"


def export_json_lines(job: Job, file: Path, *, overwrite: bool = False) -> int:
    """Write the rows of `data.train` as NeMo-Skills does: expected_answer, input and output.

    Returns how many. They are filtered, sampled, ordered and held out as for training, but none is
    too long, and no weight repeats them. A file that is there is a `DataError` unless `overwrite`.
    """
    file = end_of_links(file)
    _require_free(file, job, overwrite=overwrite)
    with (
        workspace(file) as partial,
        Course(job.console, {_READING: 5, _ENCODING: 75, _WRITING: 20}) as course,
        benches(job, as_json=True) as workers,
    ):
        with course.stage(_READING, total=job.bytes_of_sources) as advance:
            job.read_sources(advance)
        store = Store(partial / "blocks", {})
        with course.stage(_ENCODING, total=job.size("train") or None) as advance:
            blocks = encode(job, "train", store, workers, _BYTES)
            everything = collect(job, "train", blocks, workers, advance)
        rows, held = exported(everything, rules(job, "train"))
        with course.stage(_WRITING) as advance:
            gather(
                everything,
                [Output(rows=rows, tokens=partial / "lines")],
                token_bytes=_BYTES.itemsize,
                scratch=partial,
                workers=workers,
                advance=advance,
            )
        _require_free(file, job, overwrite=overwrite)
        sync(partial / "lines")
        rename(partial / "lines", file)
    if held:
        job.console.print(
            f"{held:,} more rows are held out for validation; "
            "data.holdout.fraction=0 writes them too"
        )
    return len(rows)


def _require_free(file: Path, job: Job, *, overwrite: bool) -> None:
    """`DataError` for an export that must not be written there."""
    if file.is_dir() or (file.exists() and not overwrite):
        what = "a folder" if file.is_dir() else "there already; replace it with --overwrite"
        raise DataError(f"{file}: it is {what}; give another name (--export-jsonl FILE)")
    if any(file.resolve() == source.resolve() for source in job.files):
        raise DataError(f"{file}: it is a source of this run; give another name")
