from pathlib import Path

import newest_python
import pytest


def program(folder: Path, name: str, code: int = 0) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\nexit {code}\n")
    (folder / name).chmod(0o755)
    return str(folder / name)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    path, versions = tmp_path / "path", tmp_path / "pyenv" / "versions"
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setenv("PYENV_ROOT", str(versions.parent))
    monkeypatch.setattr(newest_python, "supported", lambda: [(3, 13), (3, 12), (3, 11)])
    return path, versions


def test_supported_are_those_of_pyproject() -> None:
    assert newest_python.supported() == [(3, 13), (3, 12), (3, 11)]


def test_the_newest_that_starts_is_found_on_path_and_among_pyenvs(
    places: tuple[Path, Path],
) -> None:
    path, versions = places
    assert newest_python.newest() is None
    ours = program(path, "python3.11")
    program(path, "python3.14")
    program(path, "python3.13", code=127)  # as a shim of pyenv for a version that is not chosen
    assert newest_python.newest() == ours
    assert newest_python.newest(above=(3, 11)) is None
    second = program(versions / "3.12.1" / "bin", "python3.12")
    assert newest_python.newest(above=(3, 11)) == second
    first = program(versions / "3.13.0" / "bin", "python3.13")
    assert newest_python.newest(above=(3, 11)) == first
