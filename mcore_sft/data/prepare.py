"""Sources in, a packed dataset out: one folder, written beside its place and renamed when whole.

sources -> chunks -> (worker processes) -> encoded examples -> split files -> manifest
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mcore_sft.config import DataConfig, SourceConfig
from mcore_sft.data import manifest as manifests
from mcore_sft.data.conversation import Chunk, read_chunks, source_files
from mcore_sft.data.encode import Encoded, Recipe, encode_all
from mcore_sft.data.errors import DataError
from mcore_sft.data.progress import progress
from mcore_sft.data.prompt import Prompt
from mcore_sft.data.split import SplitWriter
from mcore_sft.data.tokenizer import Tokenizer

_ELSEWHERE = {"packed", "root", "workers"}
"""Keys of the data section that say where and how, and change no byte of the dataset."""


def prepare(
    config: DataConfig,
    folder: Path,
    *,
    prompt: Prompt,
    tokenizer: Tokenizer,
    console: Console,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the packed dataset of `config` to `folder` and return its manifest.

    A folder that already holds the same is left as it is; another one there is a `DataError`
    unless `overwrite`. Nothing is left behind where something fails.
    """
    if not config.train:
        raise DataError("data.train names no source; give at least one (path, problem, solution)")
    inputs = _describe_inputs(config, prompt, tokenizer, console)
    if _holds_dataset(folder) and not overwrite:
        return _reuse(folder, inputs, console)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        partial.chmod(0o755)
        counts = _write_splits(config, partial, prompt=prompt, tokenizer=tokenizer, console=console)
        files = manifests.describe_files(partial.iterdir())
        manifest = {
            "format": manifests.FORMAT,
            "fingerprint": manifests.digest_of(files),
            "sequence_length": config.sequence_length,
            "inputs": inputs,
            "splits": counts,
            "files": files,
        }
        manifests.write(partial, manifest)
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def check_fit(tokenizer: Tokenizer, model: Path) -> None:
    """`DataError` if `model` is a Hugging Face folder whose vocabulary the tokenizer exceeds."""
    file = model / "config.json"
    if not file.is_file():
        return
    vocab_size = json.loads(file.read_text(encoding="utf-8")).get("vocab_size")
    if isinstance(vocab_size, int) and tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{tokenizer.path}: the tokenizer has {tokenizer.vocab_size} tokens, but the model "
            f"{model} has a vocabulary of {vocab_size}; give the model's own tokenizer "
            "(model.tokenizer=PATH)"
        )


def _describe_inputs(
    config: DataConfig, prompt: Prompt, tokenizer: Tokenizer, console: Console
) -> dict[str, Any]:
    """All that decides the bytes of the dataset."""
    splits = {**_splits(config), "against": config.contamination.against}
    contaminated = config.filters.contamination_file
    return {
        "data": config.model_dump(mode="json", exclude=_ELSEWHERE),
        "prompt": {**prompt.describe(), "fingerprint": prompt.fingerprint},
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "pad_id": tokenizer.pad_id,
        },
        "sources": {
            split: [_describe_source(source, config.root, console) for source in sources]
            for split, sources in splits.items()
            if sources
        },
        "contamination_file": contaminated and manifests.sha256_of(config.root / contaminated),
    }


def _splits(config: DataConfig) -> dict[str, Sequence[SourceConfig]]:
    splits = {"train": config.train, "validation": config.validation}
    return {split: sources for split, sources in splits.items() if sources}


def _describe_source(source: SourceConfig, root: Path, console: Console) -> dict[str, Any]:
    """Checksums of the files of a source; a Hugging Face dataset is known by its name alone."""
    files = source_files(source, root=root)
    sums = []
    total = sum(file.stat().st_size for file in files)
    with progress(f"checksums of {source.path}", total=total, console=console) as advance:
        for file in files:
            sums.append({"name": file.name, "sha256": manifests.sha256_of(file)})
            advance(file.stat().st_size)
    return {"path": source.path, "files": sums}


def _holds_dataset(folder: Path) -> bool:
    """Whether a packed dataset lies there; a `DataError` if something else does."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / manifests.NAME).is_file():
        raise DataError(
            f"{folder}: it is not empty and holds no packed dataset; "
            "give another folder (data.packed=DIR)"
        )
    return True


def _reuse(folder: Path, inputs: Mapping[str, Any], console: Console) -> dict[str, Any]:
    manifest = manifests.read(folder)
    if manifest.get("inputs") != inputs:
        there = manifest.get("inputs", {})
        other = ", ".join(key for key in inputs if inputs[key] != there.get(key))
        raise DataError(
            f"{folder}: a packed dataset of other inputs lies here (differs in: {other}); "
            "give another folder (data.packed=DIR), or replace it with --overwrite"
        )
    manifests.check_files(folder, manifest["files"], verify=True)
    console.print(f"{folder}: a packed dataset of the same inputs is there already; it is reused")
    return manifest


def _write_splits(
    config: DataConfig, folder: Path, *, prompt: Prompt, tokenizer: Tokenizer, console: Console
) -> dict[str, Any]:
    try:
        return {
            split: _write_split(config, folder, split, prompt, tokenizer, console)
            for split in _splits(config)
        }
    except _GigatokenDiffers:
        # All or nothing, so that the bytes do not depend on which process noticed.
        tokenizer.gigatoken = False
        console.print("starting again with `tokenizers` for every text")
        return _write_splits(config, folder, prompt=prompt, tokenizer=tokenizer, console=console)


def _recipe(config: DataConfig, split: str, prompt: Prompt, tokenizer: Tokenizer) -> Recipe:
    """How the rows of `split` become examples; only training is compared with benchmarks."""
    filters = config.filters
    if filters.contamination_file is not None:
        file = config.root / filters.contamination_file
        filters = filters.model_copy(update={"contamination_file": file})
    return Recipe(
        tokenizer=tokenizer.path,
        gigatoken=tokenizer.gigatoken,
        prompt=prompt.describe(),
        sequence_length=config.sequence_length,
        filters=filters,
        benchmark=_benchmark(config) if split == "train" else (),
        threshold=config.contamination.threshold,
        remove=config.contamination.remove,
    )


def _benchmark(config: DataConfig) -> tuple[str, ...]:
    """The problems of all benchmarks that training must not hold."""
    problems: dict[str, None] = {}
    for source in config.contamination.against:
        for chunk in read_chunks(source, root=config.root):
            problems.update(dict.fromkeys(chunk.problems()))
    return tuple(problems)


class _GigatokenDiffers(Exception):
    """A sample did not bear out that gigatoken gives the tokenizer's ids."""


def _write_split(
    config: DataConfig,
    folder: Path,
    split: str,
    prompt: Prompt,
    tokenizer: Tokenizer,
    console: Console,
) -> dict[str, Any]:
    sources = _splits(config)[split]
    recipe = _recipe(config, split, prompt, tokenizer)
    files = [file for source in sources for file in source_files(source, root=config.root)]
    total = sum(file.stat().st_size for file in files)
    rows: dict[int, int] = {}
    workers = config.workers or os.cpu_count() or 1
    encoded = encode_all(_chunks(sources, config.root, rows), recipe, workers=workers)
    filters = config.filters
    if split != "train":  # a validation set is taken as it is
        whole = {"downsampling_method": None, "num_output_samples": None}
        filters = filters.model_copy(update=whole)
    with (
        SplitWriter(folder, split, vocab_size=tokenizer.vocab_size, filters=filters) as writer,
        progress(f"tokenizing {split}", total=total or None, console=console) as advance,
    ):
        for chunk in encoded:
            _add(writer, chunk, recipe, advance)
    counts = writer.finish(sequence_length=config.sequence_length, seed=config.seed)
    return {**counts, "source_rows": [rows.get(i, 0) for i in range(len(sources))]}


def _add(
    writer: SplitWriter, chunk: Encoded, recipe: Recipe, advance: Callable[[int], None]
) -> None:
    if recipe.gigatoken and not chunk.gigatoken:
        raise _GigatokenDiffers
    writer.add(chunk)
    advance(chunk.size)


def _chunks(sources: Sequence[SourceConfig], root: Path, rows: dict[int, int]) -> Iterator[Chunk]:
    """Chunks of all sources in order; counts each source's rows into `rows` on the way."""
    for index, source in enumerate(sources):
        for chunk in read_chunks(source, root=root):
            rows[index] = rows.get(index, 0) + len(chunk.rows)
            yield chunk


def _put_in_place(partial: Path, folder: Path) -> None:
    """Make the files durable, then give the folder its name; what it replaces goes last."""
    for file in [*partial.iterdir(), partial]:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if not _holds_dataset(folder):
        partial.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old)
