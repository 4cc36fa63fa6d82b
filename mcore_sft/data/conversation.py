"""Sources in, conversations out: JSON lines, Parquet, and Hugging Face datasets by name.

files -> Chunk of rows -> Conversation
"""

import difflib
import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from mcore_sft.config import SourceConfig
from mcore_sft.data.errors import DataError

VOTES = ("majority_votes", "total_votes")
"""Columns of a conversation's votes, as NeMo-Skills names them."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """What one side said."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Who said what; `where` names the row it came from, for messages to the user.

    votes: how many of how many sampled solutions gave this one's answer, where the row says so.
    """

    messages: tuple[Message, ...]
    where: str = ""
    votes: tuple[float, float] | None = None

    @classmethod
    def of(
        cls,
        problem: str,
        solution: str,
        *,
        where: str = "",
        votes: tuple[float, float] | None = None,
    ) -> "Conversation":
        """A problem and its solution."""
        said = (Message(role="user", content=problem), Message(role="assistant", content=solution))
        return cls(messages=said, where=where, votes=votes)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some rows of one source as they were read, cheap to hand to another process.

    rows: (number within its file, one line of JSON or the columns); size: bytes of the source.
    """

    source: SourceConfig
    name: str
    rows: list[tuple[int, bytes | Mapping[str, Any]]]
    size: int

    def conversations(self) -> Iterator[Conversation]:
        """Its conversations in order; `DataError` names the bad row."""
        for number, raw in self.rows:
            where = f"{self.name}:{number}"
            row = raw if isinstance(raw, Mapping) else _object(raw, where)
            problem = _text(row, self.source.problem, "problem", where)
            solution = _text(row, self.source.solution, "solution", where)
            yield Conversation.of(problem, solution, where=where, votes=_votes(row))

    def problems(self) -> Iterator[str]:
        """Its problems in order; no solution is needed."""
        for number, raw in self.rows:
            where = f"{self.name}:{number}"
            row = raw if isinstance(raw, Mapping) else _object(raw, where)
            yield _text(row, self.source.problem, "problem", where)


def read_source(source: SourceConfig, *, root: Path) -> Iterator[Conversation]:
    """Conversations of one source in the order of its rows; `DataError` names the bad row."""
    for chunk in read_chunks(source, root=root):
        yield from chunk.conversations()


def read_chunks(source: SourceConfig, *, root: Path, rows: int = 1024) -> Iterator[Chunk]:
    """The source in pieces of at most `rows` rows, `source.limit` rows in all."""
    files = source_files(source, root=root)
    left = source.limit
    for chunk in (
        _chunks_of_files(source, files, rows) if files else _chunks_of_dataset(source, rows)
    ):
        yield chunk if left is None else replace(chunk, rows=chunk.rows[:left])
        if left is not None:
            left -= len(chunk.rows)
            if left <= 0:
                return


def source_files(source: SourceConfig, *, root: Path) -> list[Path]:
    """Files of a source, in order of name; none if it is the name of a Hugging Face dataset."""
    path = root / source.path
    if path.is_file():
        return [path]
    if path.is_dir():
        raise DataError(
            f"source {source.path!r}: {path} is a folder; name its files, such as "
            f"{source.path.rstrip('/')}/*.jsonl"
        )
    absolute = Path(source.path).is_absolute()
    pattern = source.path if absolute else os.path.join(glob.escape(str(root)), source.path)
    found = sorted(
        Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()
    )
    if not found and _looks_like_files(source.path):
        raise DataError(
            f"source {source.path!r}: no such file under {root.resolve()}; "
            "mend data.root or the source's path"
        )
    return found


def _looks_like_files(path: str) -> bool:
    """Whether `path` cannot be the name of a dataset, which is `owner/name` or `name`."""
    endings = (".jsonl", ".json", ".parquet", ".ndjson")
    return path.endswith(endings) or path.startswith(("/", ".")) or bool(set(path) & set("*?["))


def _chunks_of_files(source: SourceConfig, files: Sequence[Path], rows: int) -> Iterator[Chunk]:
    for file in files:
        read = _parquet if file.suffix == ".parquet" else _json_lines
        yield from read(source, file, rows)


def _json_lines(source: SourceConfig, file: Path, rows: int) -> Iterator[Chunk]:
    with file.open("rb") as opened:
        lines = enumerate(opened, start=1)
        while some := list(islice(lines, rows)):
            yield Chunk(
                source=source,
                name=str(file),
                rows=[(number, line) for number, line in some if line.strip()],
                size=sum(len(line) for _, line in some),
            )


def _parquet(source: SourceConfig, file: Path, rows: int) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            there = opened.schema_arrow.names
            needed = {source.problem, source.solution}
            # Where one is missing, all columns are read, so that the error can name them.
            wanted = needed | set(VOTES) if needed <= set(there) else set(there)
            columns = [name for name in there if name in wanted]
            size_of_row = file.stat().st_size / max(opened.metadata.num_rows, 1)
            first = 1
            for batch in opened.iter_batches(batch_size=rows, columns=columns):
                numbered = list(enumerate(batch.to_pylist(), start=first))
                first += len(numbered)
                size = round(size_of_row * len(numbered))
                yield Chunk(source=source, name=str(file), rows=numbered, size=size)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a Parquet file that can be read ({error})") from None


def _chunks_of_dataset(source: SourceConfig, rows: int) -> Iterator[Chunk]:
    import datasets

    name = f"{source.path}[{source.split}]"
    try:
        opened = datasets.load_dataset(source.path, split=source.split, streaming=True)
        lines = enumerate(opened, start=1)
        while some := list(islice(lines, rows)):
            yield Chunk(source=source, name=name, rows=some, size=0)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"source {source.path!r}: neither a file nor a Hugging Face dataset that can be read "
            f"(split {source.split}): {first}"
        ) from None


def _object(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{where}: broken JSON ({error}); expected one JSON object a line"
        ) from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _text(row: Mapping[str, Any], column: str, role: str, where: str) -> str:
    if column not in row:
        raise DataError(_missing_column(row, column, role, where))
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        found = (
            "nothing" if text is None else "only blanks" if isinstance(text, str) else repr(text)
        )
        raise DataError(
            f"{where}: column {column!r} holds {found}, expected the text of the {role}; "
            "mend or remove the row"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: column {column!r} is not valid Unicode (position {error.start}); "
            "mend or remove the row"
        ) from None
    return text


def _votes(row: Mapping[str, Any]) -> tuple[float, float] | None:
    majority, total = (row.get(column) for column in VOTES)
    if isinstance(majority, int | float) and isinstance(total, int | float):
        return majority, total
    return None


def _missing_column(row: Mapping[str, Any], column: str, role: str, where: str) -> str:
    names = list(map(str, row))
    near = difflib.get_close_matches(column, names, n=1) or [
        name for name in names if name in column or column in name
    ]
    hint = f"; did you mean {role}: {near[0]}?" if near else f"; name it with {role}: COLUMN"
    return (
        f"{where}: no column {column!r} for the {role}; columns: {', '.join(names) or 'none'}{hint}"
    )
