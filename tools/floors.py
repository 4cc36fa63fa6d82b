"""Packages in; for each room its modules, floors, arrows and circles out.

    python3 tools/floors.py [FOLDER ...] [--max-modules N] [--max-floors N]

A room is a package; its modules are the files and packages directly in it. An arrow is a pair of
modules of which one imports the other, in a function or under TYPE_CHECKING too. Floors are the
modules on the longest chain of arrows. A circle is a set of modules that all reach each other; it
counts as one floor. `__init__` is no module, but can be in a circle. Without FOLDER: all rooms of
mcore_sft. Exit code 1: a room has a circle, or is over a limit. It needs nothing but Python.
"""

import argparse
import ast
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HOUSE = Path(__file__).resolve().parent.parent / "mcore_sft"
INIT = "__init__"

Arrow = tuple[str, str]
"""A module of a room, and another that it imports."""


@dataclass(frozen=True)
class Room:
    """One package: its modules, the place of the first import of each arrow, floors and circles."""

    folder: Path
    modules: frozenset[str]
    imports: Mapping[Arrow, str]
    floors: int
    circles: tuple[frozenset[str], ...]

    @property
    def arrows(self) -> int:
        """Pairs of modules of which one imports the other."""
        return sum(INIT not in arrow for arrow in self.imports)


def rooms(folder: Path, package: tuple[str, ...] | None = None) -> Iterator[Room]:
    """The room of `folder`, whose dotted name is `package`, then those of the packages in it."""
    package = package or _name(folder.resolve())
    yield room(folder, package)
    for inner in sorted(folder.iterdir()):
        if _is_package(inner):
            yield from rooms(inner, (*package, inner.name))


def room(folder: Path, package: tuple[str, ...]) -> Room:
    """What `folder` holds directly; imports within a package in it are that room's own."""
    files = {file.stem for file in folder.glob("*.py")} - {INIT}
    modules = files | {inner.name for inner in folder.iterdir() if _is_package(inner)}
    # Programs that lie side by side import one another without their folder's name.
    are_programs = not (folder / f"{INIT}.py").exists()
    imports: dict[Arrow, str] = {}
    for file in sorted(folder.rglob("*.py")):
        within = file.relative_to(folder).with_suffix("").parts
        for line, target in _imports(file, (*package, *within)):
            if target[: len(package)] == package:
                rest = target[len(package) :]
                imported = rest[0] if rest and rest[0] in modules else INIT
            elif are_programs and target[0] in modules:
                imported = target[0]
            else:
                continue
            if imported != within[0]:
                imports.setdefault((within[0], imported), f"{file}:{line}")
    nodes = frozenset(modules | {INIT})
    reach = _reachable(nodes, imports)
    circles = {_circle(module, reach) for module in nodes}
    return Room(
        folder=folder,
        modules=frozenset(modules),
        imports=imports,
        floors=_longest_chain(frozenset(modules), imports),
        circles=tuple(sorted((x for x in circles if len(x) > 1), key=sorted)),
    )


def _is_package(folder: Path) -> bool:
    return folder.is_dir() and next(folder.rglob("*.py"), None) is not None


def _name(folder: Path) -> tuple[str, ...]:
    """Its dotted name in parts, from the topmost package that it is in."""
    above = _name(folder.parent) if (folder.parent / f"{INIT}.py").exists() else ()
    return (*above, folder.name)


def _imports(file: Path, name: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The line and the dotted target of each import in `file`, whose module is `name`."""
    for node in ast.walk(ast.parse(file.read_bytes(), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            start = name[: len(name) - node.level] if node.level else ()
            base = (*start, *(node.module or "").split(".")) if node.module else start
            for alias in node.names:
                yield node.lineno, (*base, alias.name)


def _reachable(nodes: frozenset[str], imports: Mapping[Arrow, str]) -> Mapping[str, frozenset[str]]:
    """What each node reaches over one arrow or more."""
    reach = {node: {end for start, end in imports if start == node} for node in nodes}
    for middle in nodes:
        for node in nodes:
            if middle in reach[node]:
                reach[node] |= reach[middle]
    return {node: frozenset(ends) for node, ends in reach.items()}


def _circle(node: str, reach: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """`node`, and all that it reaches and is reached by."""
    return frozenset({node, *(end for end in reach[node] if node in reach[end])})


def _longest_chain(modules: frozenset[str], imports: Mapping[Arrow, str]) -> int:
    """Modules on the longest chain of arrows; a circle counts as one."""
    inner = {arrow: place for arrow, place in imports.items() if INIT not in arrow}
    reach = _reachable(modules, inner)

    @cache
    def height(circle: frozenset[str]) -> int:
        below = {_circle(end, reach) for node in circle for end in reach[node]} - {circle}
        return 1 + max(map(height, below), default=0)

    return max((height(_circle(module, reach)) for module in modules), default=0)


def problems(found: Room, max_modules: int | None, max_floors: int | None) -> Iterator[str]:
    """A line for each circle, which names the imports in it, and for each limit that is passed."""
    for circle in found.circles:
        yield f"{found.folder}: {', '.join(sorted(circle))} import each other in a circle"
        for (start, end), place in sorted(found.imports.items()):
            if {start, end} <= circle:
                yield f"  {place}: {start} imports {end}"
    limits = (("modules", len(found.modules), max_modules), ("floors", found.floors, max_floors))
    for name, number, most in limits:
        if most is not None and number > most:
            yield f"{found.folder}: too many {name} (got {number}, expected at most {most})"


def table(found: Sequence[Room]) -> str:
    """One line a room, under a header."""
    width = max(len(str(x.folder)) for x in found)
    lines = [f"{'room':<{width}}  modules  floors  arrows  circles"]
    lines += [
        f"{x.folder!s:<{width}}  {len(x.modules):7}  {x.floors:6}  {x.arrows:6}  {len(x.circles):7}"
        for x in found
    ]
    return "\n".join(lines)


def main() -> None:
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="packages")
    parser.add_argument("--max-modules", type=int, metavar="N", help="most modules of a room")
    parser.add_argument("--max-floors", type=int, metavar="N", help="most floors of a room")
    arguments = parser.parse_args()
    folders = arguments.folders or [Path(os.path.relpath(HOUSE))]
    for folder in folders:
        if not _is_package(folder):
            parser.error(f"{folder}: no Python files (expected the folder of a package)")
    try:
        found = [x for folder in folders for x in rooms(folder)]
    except SyntaxError as error:
        parser.error(f"{error.filename}:{error.lineno}: not valid Python ({error.msg})")
    print(table(found))
    lines = [
        line
        for each in found
        for line in problems(each, arguments.max_modules, arguments.max_floors)
    ]
    print("".join(f"{line}\n" for line in lines), end="", file=sys.stderr)
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
