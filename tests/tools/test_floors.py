"""Small packages made by hand in; their floors, arrows and circles out."""

import subprocess
import sys
from pathlib import Path

import floors
import pytest

FLAT = {
    "__init__.py": "",
    "base.py": "import os",
    "left.py": "from house.base import a\nfrom house.base import b",
    "right.py": "import house.base as base",
    "roof.py": "from house import left, right",
    "alone.py": "from other.roof import x\nimport houses.roof",
}


def make(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def count(folder: Path) -> list[tuple[str, int, int, int, int]]:
    return [
        (x.folder.name, len(x.modules), x.floors, x.arrows, len(x.circles))
        for x in floors.rooms(folder)
    ]


def call(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, floors.__file__, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_arrow_is_a_pair_and_a_floor_a_step_of_the_longest_chain(tmp_path):
    assert count(make(tmp_path / "house", FLAT)) == [("house", 5, 3, 4, 0)]


@pytest.mark.parametrize(
    "text",
    [
        "from house import roof",
        "from house.roof import x",
        "import house.roof",
        "from . import roof",
        "from .roof import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.roof import x",
        "def late():\n    try:\n        from house.roof import x\n    finally:\n        pass",
    ],
)
def test_every_way_to_import_is_an_arrow(tmp_path, text):
    folder = make(tmp_path / "house", FLAT | {"base.py": text})
    [found] = floors.rooms(folder)
    assert ("base", "roof") in found.imports
    assert [sorted(circle) for circle in found.circles] == [["base", "left", "right", "roof"]]
    assert (found.floors, found.arrows) == (1, 5)  # a circle is one floor


def test_packages_are_rooms_and_modules_of_the_room_around_them(tmp_path):
    files = {
        "__init__.py": "",
        "top.py": "import house.inner.deep.two",
        "inner/__init__.py": "",
        "inner/one.py": "from .deep import two\nfrom .. import low",
        "inner/deep/__init__.py": "",
        "inner/deep/two.py": "from .three import x\nfrom ...low import x",
        "inner/deep/three.py": "",
        "low.py": "",
        "data/words.txt": "",
    }
    folder = make(tmp_path / "house", files)
    rooms = [("house", 3, 3, 2, 0), ("inner", 2, 2, 1, 0), ("deep", 2, 2, 1, 0)]
    assert count(folder) == rooms
    assert count(folder / "inner") == rooms[1:]


def test_what_a_package_exports_closes_a_circle(tmp_path):
    files = {"__init__.py": "from house.a import x", "a.py": "", "b.py": "from house import x"}
    assert count(make(tmp_path / "house", files)) == [("house", 2, 1, 0, 0)]
    make(tmp_path / "house", {"a.py": "from house import y"})
    assert count(tmp_path / "house") == [("house", 2, 1, 0, 1)]


def test_programs_side_by_side_import_one_another_by_bare_names(tmp_path):
    files = {"a.py": "import b", "b.py": "import json", "c/d.py": ""}
    assert count(make(tmp_path / "tools", files))[0] == ("tools", 3, 2, 1, 0)


def test_a_room_in_a_circle_ends_with_one(tmp_path):
    folder = make(tmp_path / "house", FLAT)
    fine = call(folder)
    assert (fine.returncode, fine.stderr) == (0, "")
    assert fine.stdout.split()[:5] == ["room", "modules", "floors", "arrows", "circles"]
    assert fine.stdout.split()[5:] == [str(folder), "5", "3", "4", "0"]
    make(folder, {"base.py": "import os\nimport house.left"})
    broken = call(folder)
    assert broken.returncode == 1
    assert broken.stdout.split()[5:] == [str(folder), "5", "3", "5", "1"]
    assert "base, left import each other" in broken.stderr
    assert f"{folder}/base.py:2: base imports left" in broken.stderr
    assert f"{folder}/left.py:1: left imports base" in broken.stderr


@pytest.mark.parametrize("limit", ["modules", "floors"])
def test_limits_are_of_each_room(tmp_path, limit):
    folder = make(tmp_path / "house", FLAT)
    made = {"modules": 5, "floors": 3}[limit]
    assert call(folder, f"--max-{limit}", made).returncode == 0
    over = call(folder, f"--max-{limit}", made - 1)
    assert over.returncode == 1
    assert f"{folder}: too many {limit} (got {made}, expected at most {made - 1})" in over.stderr


def test_what_is_no_package_is_named(tmp_path):
    empty = call(tmp_path)
    assert empty.returncode == 2
    assert f"{tmp_path}: no Python files" in empty.stderr
    folder = make(tmp_path / "house", {"__init__.py": "", "torn.py": "x = 1\nimport ("})
    torn = call(folder)
    assert torn.returncode == 2
    assert f"{folder}/torn.py:2: not valid Python" in torn.stderr


def test_without_a_folder_all_rooms_of_the_package(tmp_path):
    house = Path("mcore_sft")
    named = [line.split()[0] for line in call().stdout.splitlines()[1:]]
    made = {str(file.parent) for file in house.rglob("__init__.py")}
    assert set(named) == made
