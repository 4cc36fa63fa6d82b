import ast
from pathlib import Path

import mutants
import pytest
from mutants import equivalent, mutants_of

from mcore_sft.base.errors import UserError

SOURCE = '''
"""A docstring of 5 words."""

LIMIT: "int" = 3


def size(number, more=False):
    """Another, of 6."""
    if number < LIMIT and not more:
        raise ValueError(number + 1)
    while True:
        number -= 1
        if number in {2}:
            break
    return -number if more else number * 2
'''


def test_each_node_has_its_mutants() -> None:
    made = mutants_of("m.py", SOURCE)
    changes = {mutant.change for mutant in made}
    assert {
        "3 -> 4",
        "False -> True",
        "number < LIMIT -> number <= LIMIT",
        "number < LIMIT and (not more) -> number < LIMIT or not more",
        "not more -> more",
        "number -= 1 -> pass",
        "number in {2} -> number not in {2}",
        "break -> continue",
        "-number -> number",
        "number * 2 -> number + 2",
        "-number if more else number * 2 -> -number if not more else number * 2",
        "return -number if more else number * 2 -> return None",
        "2 -> 3",
        "2 -> 3 #2",
    } <= changes
    # nothing of annotations, docstrings and errors
    assert not any("5" in change or "6" in change or "number + 1" in change for change in changes)
    assert {mutant.where for mutant in made} == {"module", "size"}
    assert len({mutant.name for mutant in made}) == len(made)


def test_a_mutant_is_the_source_with_one_change() -> None:
    plain = ast.unparse(ast.parse(SOURCE)).splitlines()
    for mutant in mutants_of("m.py", SOURCE):
        changed = mutant.source.splitlines()
        assert 1 <= sum(a != b for a, b in zip(plain, changed, strict=True)) <= 2


def test_equivalent_mutants_have_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "mutants.txt"
    assert equivalent(file) == {}
    file.write_text("# said above\nm.py:f: 1 -> 2  # any number will do\n\n")
    assert equivalent(file) == {"m.py:f: 1 -> 2": "any number will do"}
    file.write_text("m.py:f: 1 -> 2\n")
    with pytest.raises(UserError, match=r"mutants\.txt:1: no reason"):
        equivalent(file)


@pytest.mark.slow
def test_what_no_test_notices_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package and a test of our own, which looks at one of two functions."""
    package, tests = tmp_path / "mcore_sft", tmp_path / "tests"
    package.mkdir()
    tests.mkdir()
    for folder in (package, tests):
        (folder / "__init__.py").touch()
    (package / "m.py").write_text(
        "def seen(x):\n    return -x\n\n\ndef unseen(x):\n    return x\n\n\n"
        "def ends(x):\n    while x:\n        x -= x\n"
    )
    (tests / "test_m.py").write_text(
        "from mcore_sft.m import ends, seen\n\n\ndef test_m():\n"
        "    assert seen(1) == -1\n    ends(1)\n"
    )
    (tests / "mutants.txt").write_text("mcore_sft/m.py:seen: -x -> x  # not true, but a reason\n")
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "COVERED", {"mcore_sft/m.py": ("tests/test_m.py",)})
    monkeypatch.setattr(mutants, "_SHARED", ())
    monkeypatch.setattr(mutants, "_LEAST_SECONDS", 6.0)
    monkeypatch.setattr("sys.argv", ["mutants.py", "--count", "99"])
    with pytest.raises(SystemExit) as ended:
        mutants.main()
    assert ended.value.code == 1
    told = capsys.readouterr().out
    survived = [line for line in told.splitlines() if line.startswith("survived")]
    assert len(survived) == 1
    assert survived[0].endswith("line 6: mcore_sft/m.py:unseen: return x -> return None")
    assert "mcore_sft/m.py: 2 of 3 caught, 1 equivalent" in told
