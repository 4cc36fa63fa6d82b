"""The data section of an experiment in, what it names out: sources, blocks, the recipe, inputs."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mcore_sft.base.files import sha256_of
from mcore_sft.base.terminal import Console
from mcore_sft.config import DataConfig, SourceConfig
from mcore_sft.data.encode.block import Recipe
from mcore_sft.data.errors import DataError
from mcore_sft.data.selection.contamination import read_benchmarks
from mcore_sft.data.sources.blocks import Block
from mcore_sft.data.sources.find_files import find_files
from mcore_sft.data.sources.source_file import SourceFile, changed
from mcore_sft.data.sources.survey import Looks, Survey, source_size, survey
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import Tokenizer, load_tokenizer

_ELSEWHERE = {"packed", "root", "workers", "gigatoken"}
"""Keys of the data section that say where and how, and change no byte of the dataset."""

_ROW = 2048  # bytes, as a guess


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be prepared: the configuration, and all that it names, loaded."""

    config: DataConfig
    prompt: Prompt
    tokenizer: Tokenizer
    console: Console
    unfed: int | None = None
    """The id that no example may hold (`check_fit`)."""

    def __post_init__(self) -> None:
        if not self.config.train:
            raise DataError(
                "data.train names no source; give at least one (path, problem, solution)"
            )

    @property
    def num_workers(self) -> int:
        """Processes that work on the data."""
        return self.config.workers or len(os.sched_getaffinity(0))

    @cached_property
    def sources(self) -> dict[str, tuple[SourceConfig, ...]]:
        """The sources of each split that is read."""
        splits = {"train": self.config.train, "validation": self.config.validation}
        return {split: sources for split, sources in splits.items() if sources}

    def read_sources(self, advance: Callable[[int], None]) -> None:
        """Read every file for its checksum, once, counting the bytes on `advance`."""
        self._looks.advance = advance
        assert self.surveys is not None
        assert self.against is not None

    @property
    def bytes_of_sources(self) -> int:
        """Bytes that `read_sources` reads."""
        its = [source for sources in self.sources.values() for source in sources]
        return source_size(*its, *self.config.contamination.against, root=self.config.root)

    def guessed_size(self, split: str) -> int:
        """About how many bytes of its sources `split` has, before they are looked at."""
        return sum(
            min(source_size(source, root=self.config.root), (source.limit or 2**40) * _ROW)
            for source in self.sources[split]
        )

    @cached_property
    def _looks(self) -> Looks:
        return Looks()

    @cached_property
    def surveys(self) -> dict[str, list[Survey]]:
        """What the sources hold."""
        return {
            split: [self._survey(source) for source in sources]
            for split, sources in self.sources.items()
        }

    @cached_property
    def against(self) -> list[Survey]:
        """What the benchmarks hold; of their rows the problem alone is read."""
        sources = self.config.contamination.against
        return [self._survey(source, alone=True) for source in sources]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the bytes of the dataset, but for the sources."""
        return {
            "data": self.config.model_dump(mode="json", exclude=_ELSEWHERE),
            "prompt": {**self.prompt.describe(), "fingerprint": self.prompt.fingerprint},
            "tokenizer": {
                "fingerprint": self.tokenizer.fingerprint,
                "vocab_size": self.tokenizer.vocab_size,
                "pad_id": self.tokenizer.pad_id,
            },
            "contamination_file": self._contamination and self._contamination[1],
        }

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """All that decides the bytes of the dataset."""
        described = {split: [s.description for s in some] for split, some in self.surveys.items()}
        if self.against:
            described["against"] = [surveyed.description for surveyed in self.against]
        return {**self.settings, "sources": described}

    def blocks(self, split: str) -> Iterator[tuple[int, Block]]:
        """The blocks of all sources of `split` in order, each with the index of its source."""
        for source, surveyed in enumerate(self.surveys[split]):
            for block in surveyed.blocks():
                yield source, block

    @property
    def files(self) -> list[Path]:
        """Every file of the sources."""
        sources = (source for sources in self.sources.values() for source in sources)
        return [file for one in sources for file in find_files(one.path, root=self.config.root)]

    def size(self, split: str) -> int:
        """Bytes of all sources of `split`; 0 where that is not known."""
        return sum(surveyed.size for surveyed in self.surveys[split])

    def require_unchanged(self) -> None:
        """`DataError` if what the workers read of `settings` is no longer what it was."""
        if self._contamination is not None:
            self._contamination[0].require_unchanged()
        path = self.tokenizer.path
        if load_tokenizer(path, gigatoken=False).fingerprint != self.tokenizer.fingerprint:
            raise changed(path)

    def recipe(self, *, as_json: bool = False) -> Recipe:
        """How rows become examples."""
        config, filters = self.config, self.config.filters
        if filters.contamination_file is not None:
            file = config.root / filters.contamination_file
            filters = filters.model_copy(update={"contamination_file": file})
        return Recipe(
            tokenizer=self.tokenizer.path,
            gigatoken=self.tokenizer.gigatoken,
            prompt=self.prompt.describe(),
            train_on=config.train_on,
            skip_bad=config.on_bad_row == "skip",
            filters=filters,
            as_json=as_json,
            unfed=self.unfed,
        )

    @cached_property
    def benchmark(self) -> dict[str, str]:
        """The problems of all benchmarks that training must not hold, and where they stand."""
        return read_benchmarks(self.against)

    @cached_property
    def _contamination(self) -> tuple[SourceFile, str] | None:
        """The contamination file as it is now, and its checksum."""
        named = self.config.filters.contamination_file
        try:
            if named is None:
                return None
            file = SourceFile.of(self.config.root / named)
            return file, sha256_of(file.path)
        except OSError as error:
            raise DataError(
                f"{error.filename}: cannot be read ({error.strerror}); "
                "mend data.filters.contamination_file"
            ) from None

    def _survey(self, source: SourceConfig, *, alone: bool = False) -> Survey:
        surveyed = survey(source, root=self.config.root, alone=alone, looks=self._looks)
        if surveyed.using:
            self.console.print(f"{source.path}: {surveyed.using}", soft_wrap=True)
        return surveyed
