"""Blocks in, their files out: what the processes of a run do, and what they find done.

    Block -> Encoder -> FILE.block        what they ask that benchmarks ask too -> findings

A run that was killed leaves its files behind; the next one takes those over that were made of the
same, and makes the others.
"""

import hashlib
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from mcore_sft.base import files
from mcore_sft.data.encode import block_files
from mcore_sft.data.encode.block import Encoder, Recipe
from mcore_sft.data.encode.block_files import BlockFile
from mcore_sft.data.errors import DataError
from mcore_sft.data.manifest import digest_of
from mcore_sft.data.selection.asked import Met
from mcore_sft.data.selection.contamination import Contamination, Finding
from mcore_sft.data.sources import table_blocks, text_blocks
from mcore_sft.data.sources.blocks import Block

_MADE_OF = "made_of.json"
_DECIDE = ("numpy", "pyarrow", "tokenizers", "gigatoken", "sentencepiece", "tiktoken", "jinja2")


class Store:
    """A folder for the files of a run's blocks; those of other settings, or code, are removed."""

    def __init__(self, folder: Path, made_of: Mapping[str, Any]) -> None:
        """`made_of`: all that decides what is in a block, but for the block and the code."""
        self.folder = folder
        said = digest_of({**made_of, "cut": cut(), "code": code()})
        file = folder / _MADE_OF
        if not file.is_file() or file.read_text() != said:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            files.write(file, said)
        for half in folder.glob("*.partial"):
            half.unlink()

    def file(self, split: str, number: int) -> Path:
        """Where block `number` of a split lies."""
        return self.folder / block_name(split, number)

    @property
    def size(self) -> int:
        """Bytes of all that are there."""
        return sum(file.stat().st_size for file in self.folder.glob("*.block"))


def block_name(split: str, number: int) -> str:
    """What the file of block `number` of a split is called."""
    return f"{split}.{number:08}.block"


def cut() -> list[int]:
    """What decides where blocks begin: those that were cut otherwise do not fit together."""
    return [text_blocks.BLOCK_BYTES, table_blocks.TABLE_BYTES]


def code() -> str:
    """A checksum that stands for the code that makes a block, the packages it calls included."""
    digest = hashlib.sha256(platform.python_version().encode())
    package = Path(__file__).parents[2]
    for room in ("base", "data"):
        for file in sorted((package / room).rglob("*.py")):
            digest.update(file.read_bytes())
    for name in _DECIDE:
        try:
            digest.update(f"{name} {version(name)}".encode())
        except PackageNotFoundError:
            digest.update(f"no {name}".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Bench:
    """What a process needs for the blocks of a run.

    benchmark: the problems that training must not hold, and where each stands; threshold: the share
    of such a problem's 8-grams that makes a training problem the same.
    """

    recipe: Recipe
    benchmark: Mapping[str, str]
    threshold: float

    @cached_property
    def encoder(self) -> Encoder:
        """Encodes blocks."""
        return Encoder(self.recipe)

    @cached_property
    def contamination(self) -> Contamination:
        """Knows the benchmark."""
        return Contamination(self.benchmark, threshold=self.threshold)

    @cached_property
    def met(self) -> Met:
        """Texts that this process has met."""
        return Met()


def ready_bench(recipe: Recipe, benchmark: Mapping[str, str], threshold: float) -> Bench:
    """A bench with all that it needs at hand, for several processes to share."""
    bench = Bench(recipe, benchmark, threshold)
    bench.encoder.load()
    if benchmark:
        assert bench.contamination
    return bench


def encode(
    bench: Bench,
    block: Block,
    source: int,
    file: Path,
    tokens: np.dtype[Any],
    compared: bool,
) -> Path:
    """Make the file of a block, unless it is there; returns it.

    tokens: in which type they are kept; compared: whether texts are, with benchmarks.
    """
    of = _identity(block, source)
    if not _is_whole(file, of):
        encoded = bench.encoder.encode(block, source, compared=compared)
        encoded = replace(encoded, asked=encoded.asked.new_to(bench.met))
        block_files.write(file, encoded, tokens, of=of)
    return file


def size(bench: Bench, block: Block, source: int, tokens: np.dtype[Any]) -> int:
    """How many bytes the file of a block will have."""
    return block_files.size_of(bench.encoder.encode(block, source), tokens)


def compare(bench: Bench, file: Path, which: npt.NDArray[np.int64]) -> list[Finding]:
    """What the benchmark shares with some of the texts of a block."""
    block = BlockFile(file)
    texts, numbers = block.asked_texts(), block.column("asked_text_numbers")
    where = {texts[index]: f"{block.name}:{numbers[index]}" for index in which.tolist()}
    return [
        replace(
            found, where=where[found.problem], benchmark=bench.benchmark[found.benchmark_problem]
        )
        for found in bench.contamination.check(where)
    ]


def _identity(block: Block, source: int) -> str:
    """What stands for a block: where its rows lie and how they are read, or these rows."""
    digest = xxhash.xxh3_128(f"{type(block).__name__} {source}".encode())
    for field in fields(block):
        value = getattr(block, field.name)
        digest.update(value if isinstance(value, bytes) else repr(value).encode(errors="replace"))
    return digest.hexdigest()


def _is_whole(file: Path, of: str) -> bool:
    """Whether a run that was killed left the file, made of the same and undamaged."""
    if not file.is_file():
        return False
    try:
        block = BlockFile(file)
        block.check()
    except DataError:
        return False
    return block.of == of
