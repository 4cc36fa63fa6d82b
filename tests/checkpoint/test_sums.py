"""SHA-256 of the files of weights: shared, remembered, and waited for at the first save alone."""

import contextlib
import hashlib
import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_sft.base import files
from mcore_sft.base.model_folder import INDEX, SINGLE
from mcore_sft.checkpoint import sums
from mcore_sft.checkpoint.safetensors_folder import SafetensorsFolder
from mcore_sft.checkpoint.sharded import Progress
from mcore_sft.checkpoint.sums import Sums
from mcore_sft.config import ParallelConfig, RunConfig
from mcore_sft.runtime.mesh import connect
from mcore_sft.training import loop
from tests import runs
from tests.distributed import run_ranks


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the cache, which is this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mcore_sft" / "sha256.json"


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Path]:
    """Five files, by name."""
    paths = {name: tmp_path / f"weights-{name}" for name in "abcde"}
    for name, path in paths.items():
        path.write_bytes(name.encode() * 1000)
    return paths


def expected(paths: dict[str, Path]) -> dict[str, str]:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}


def _waited(paths: dict[str, Path], changed: str = "") -> tuple[dict[str, str], list[str], str]:
    """The sums, the files of which this rank has computed one, and what it says."""
    said, computed, sha256_of = io.StringIO(), [], files.sha256_of

    def counted(path: Path) -> str:
        found = sha256_of(path)
        computed.append(path.name)
        if path.name == changed:
            path.write_bytes(b"another")
        return found

    files.sha256_of = counted
    with connect(ParallelConfig()) as mesh, contextlib.redirect_stdout(said):
        made = Sums(paths, mesh)
        assert made.wait() == made.wait()
        return made.wait(), computed, said.getvalue()


def test_each_rank_computes_a_part_and_all_know_all(weights: dict[str, Path]) -> None:
    first, second = run_ranks(2, _waited, weights)
    assert first[0] == second[0] == expected(weights)
    assert first[1] == ["weights-a", "weights-c", "weights-e"]
    assert second[1] == ["weights-b", "weights-d"]


def test_what_was_computed_once_is_remembered_until_the_file_changes(
    weights: dict[str, Path], tmp_path: Path
) -> None:
    run_ranks(2, _waited, weights)
    link = tmp_path / "link"
    link.symlink_to(weights["c"])
    ((found, computed, _),) = run_ranks(1, _waited, weights | {"c": link})
    assert found == expected(weights)
    assert computed == []
    weights["b"].write_bytes(b"longer" * 1000)
    os.utime(weights["d"], ns=(1, 1))
    ((found, computed, _),) = run_ranks(1, _waited, weights)
    assert found == expected(weights)
    assert computed == ["weights-b", "weights-d"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', '{"a": [1, 2]}', "\udcff"])
def test_a_cache_that_cannot_be_read_is_made_anew(
    weights: dict[str, Path], cache: Path, content: str
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content, errors="surrogateescape")
    assert run_ranks(1, _waited, weights)[0][0] == expected(weights)
    assert run_ranks(1, _waited, weights)[0][1] == []


def test_a_cache_that_cannot_be_written_is_no_error(
    weights: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "cache").touch()
    for _ in range(2):
        ((found, computed, said),) = run_ranks(1, _waited, weights)
        assert (found, len(computed), said) == (expected(weights), 5, "")


def test_a_user_without_a_home_is_no_error(
    weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert run_ranks(1, _waited, weights)[0][0] == expected(weights)


def test_the_cache_keeps_what_came_last(
    weights: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "_REMEMBERED", 3)
    run_ranks(1, _waited, weights)
    kept = json.loads(cache.read_text())
    assert list(kept) == [str(weights[name]) for name in "cde"]
    run_ranks(1, _waited, {"a": weights["a"]})
    assert list(json.loads(cache.read_text())) == [str(weights[name]) for name in "dea"]


def test_a_file_that_goes_or_changes_meanwhile_has_no_sum_and_that_is_said(
    weights: dict[str, Path], cache: Path
) -> None:
    weights["b"].unlink()
    for found, _, said in run_ranks(1, _waited, weights, "weights-d"):
        assert found.keys() == {"a", "c", "e"}
        assert said.count("warning: ") == 2
        assert f"warning: {weights['b']} could not be read as a whole, or was changed" in said
        assert f"warning: {weights['d']} could not be" in said
    assert len(json.loads(cache.read_text())) == 3


def sharded_base(model: Path, folder: Path) -> Path:
    """The model in three files."""
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = load_file(model / SINGLE)
    where = {name: f"model-{n % 3}.safetensors" for n, name in enumerate(tensors)}
    for file in set(where.values()):
        part = {name: one for name, one in tensors.items() if where[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


def _late(config: RunConfig) -> None:
    """The sums of weights are there only after a second step."""
    torch.set_num_threads(1)
    sha256_of, advance, second = files.sha256_of, loop.advance, threading.Event()

    def late(path: Path) -> str:
        assert path.suffix != ".safetensors" or second.wait(20), "training waits"
        return sha256_of(path)

    def counted(progress: Progress, result: Any) -> None:
        advance(progress, result)
        if progress.step == 2:
            second.set()

    files.sha256_of, loop.advance = late, counted
    loop.train(config)


def _hashes_nothing(config: RunConfig) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a file of weights is hashed")

    sums._sum = refuse
    loop.train(config)


def test_the_first_checkpoint_records_the_weights_of_the_base_and_the_others_keep_that(
    model: Path, tmp_path: Path
) -> None:
    base = sharded_base(model, tmp_path / "base")
    changes: dict[str, Any] = {"data__packed": str(model / "packed"), "checkpoint__every": 3}
    config = runs.experiment(tmp_path / "run", base, train__steps=6, **changes)
    run_ranks(2, _late, config)
    record = config.folder / "step_3" / "model" / "mcore_sft.json"
    told = json.loads(record.read_text())["base"]
    assert told["sha256"] == {
        "config.json": hashlib.sha256((base / "config.json").read_bytes()).hexdigest(),
        **{k: v for k, v in told["sha256"].items() if k.startswith("token")},
        **expected(SafetensorsFolder(base).files()),
    }
    assert len([name for name in told["sha256"] if name.endswith(".safetensors")]) == 3
    assert (config.folder / "step_6/model/mcore_sft.json").read_bytes() == record.read_bytes()
    run_ranks(
        2, _hashes_nothing, runs.experiment(tmp_path / "run", base, train__steps=9, **changes)
    )
    assert (config.folder / "step_9/model/mcore_sft.json").read_bytes() == record.read_bytes()
