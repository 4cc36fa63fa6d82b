"""A cluster, and what can lie on its nodes."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mcore_sft import config as configuration
from tests import runs, tiny
from tests.machines.cluster import Cluster, Experiment, Machines, Refused


@functools.cache
def _machines() -> Machines | str:
    """Or why there are none."""
    if shutil.which("ip") is None:
        return "tests/machines needs ip (Debian, Ubuntu: apt install iproute2)"
    try:
        return Machines()
    except Refused as refused:
        return f"tests/machines needs root and namespaces: {refused}"


def pytest_runtest_setup(item: pytest.Function) -> None:
    """Here, so that pytest tells one reason in one line."""
    if "cluster" in item.fixturenames and isinstance(reason := _machines(), str):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def machines() -> Iterator[Machines]:
    made = _machines()
    assert isinstance(made, Machines)
    yield made
    made.close()


@pytest.fixture
def cluster(machines: Machines, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(machines, tmp_path)
    yield made
    made.end()


@pytest.fixture
def experiment(model: Path, tmp_path: Path) -> Callable[..., Experiment]:
    """A run of the tiny model in an empty folder, with changes as `runs.experiment` takes them."""

    def made(**changes: Any) -> Experiment:
        (tmp_path / "run").mkdir(exist_ok=True)
        config = runs.experiment(tmp_path / "run", model, log__every=1, **changes)
        file = tmp_path / "experiment.yaml"
        file.write_text(configuration.dump(config))
        return Experiment(config=config, arguments=("--config", str(file)))

    return made


@pytest.fixture
def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    """Empty ones, such as a local disk of each node."""
    made = tmp_path / "disk0", tmp_path / "disk1"
    for folder in made:
        folder.mkdir()
    return made


@pytest.fixture(scope="session")
def begun(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that has saved step_2 and step_4."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    runs.train(runs.experiment(folder, model, train__steps=4, checkpoint__every=2), "dp2")
    return folder


@pytest.fixture(scope="session")
def other_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights, and a config.json with another epsilon."""
    folder = tiny.make_model(tmp_path_factory.mktemp("other") / "tiny", vocab_size=703, seed=7)
    content = tiny.hf_config(model) | {"rms_norm_eps": 0.5}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def other_dataset(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in another order, packed by the same configuration."""
    root = tmp_path_factory.mktemp("rows")
    rows = (runs.FIXTURES / "rows.jsonl").read_text().splitlines(keepends=True)
    (root / "rows.jsonl").write_text("".join(reversed(rows)))
    packed = root / "packed"
    runs.pack_rows(runs.experiment(root, model, data__root=str(root), data__packed=str(packed)))
    return packed
