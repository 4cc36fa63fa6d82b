import importlib
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mcore_sft import installed

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("python", "fitting", "other"),
    [
        ("3.11", ("2.9.0", "2.11.0"), ("2.8.0", "2.12.0")),
        ("3.12", ("2.9.0", "2.11.0", "2.20.2"), ("2.8.0", "2.21.0")),
        ("3.13", ("2.9.0", "2.11.0", "2.20.2"), ("2.8.0", "2.21.0")),
    ],
)
def test_one_range_of_transformer_engine_goes_with_each_python(
    python: str, fitting: tuple[str, ...], other: tuple[str, ...]
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = map(Requirement, project["optional-dependencies"]["gpu"])
    markers = {"python_version": python, "extra": "gpu"}
    (ours,) = (one for one in declared if one.marker and one.marker.evaluate(markers))
    assert ours.name == "transformer-engine"
    assert all(version in ours.specifier for version in fitting)
    assert not any(version in ours.specifier for version in other)


def test_the_transformer_engine_that_is_wanted_is_that_of_the_extra() -> None:
    wanted = installed.transformer_engine()
    assert wanted.name == "transformer-engine"
    assert "2.9.0" in wanted.specifier
    assert "2.8.0" not in wanted.specifier


def test_requirements_are_those_of_always_or_of_an_extra() -> None:
    always = {one.name for one in installed.requirements("mcore-sft")}
    assert {"torch", "megatron-core", "psutil"} <= always
    assert not {"matplotlib", "wandb", "pytest"} & always
    assert [one.name for one in installed.requirements("mcore-sft", "plot")] == ["matplotlib"]


def test_whatever_an_import_raises_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "an_odd_one.py").write_text("raise RuntimeError('no such\\nsymbol')")
    assert installed.import_error("an-odd-one") == "RuntimeError: no such symbol"
    assert "No module named" in (installed.import_error("not-there-at-all") or "")
    assert installed.import_error("pyyaml") is None
    assert installed.version("not-there-at-all") is None


def test_a_folder_that_was_left_behind_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    left = tmp_path / "was_here"
    assert installed.left_behind("was_here") is None
    (left / "__pycache__").mkdir(parents=True)
    importlib.invalidate_caches()
    assert installed.left_behind("was_here") == str(left)
    (left / "__init__.py").touch()
    importlib.invalidate_caches()
    assert installed.left_behind("was_here") is None
