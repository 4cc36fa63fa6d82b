"""Small changes of the code in, those that no test notices out.

python tools/mutants.py --seed 1 --count 200 [--module number]

A mutant is a copy of the tree in which one node of one module's syntax tree is another: a
comparison, an operator, a number, a condition turned round, a statement or a value left out. The
tests that cover the module run on it, each mutant in a process of its own, and a mutant that they
all pass has survived. Those that mean the same as the code stand in tests/mutants.txt, each with
the reason, and do not count. The exit status is 1 if less than 95 % of the others are caught.
"""

import argparse
import ast
import copy
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mcore_sft import command
from mcore_sft.base.errors import UserError
from mcore_sft.base.terminal import Parser, say

ROOT = Path(__file__).parents[1]
EQUIVALENT = "tests/mutants.txt"
COVERED: Mapping[str, tuple[str, ...]] = {
    "mcore_sft/evaluation/grading/read/number.py": ("tests/evaluation/test_number.py",),
    "mcore_sft/evaluation/scores/statistics.py": ("tests/evaluation/test_statistics.py",),
    "mcore_sft/data/selection/arithmetic.py": ("tests/data/test_arithmetic.py",),
    "mcore_sft/data/selection/filters.py": ("tests/data/test_filters.py",),
    "mcore_sft/data/sources/columns.py": (
        "tests/data/test_columns.py",
        "tests/data/test_known_columns.py",
    ),
    "mcore_sft/data/packs/loader.py": ("tests/data/test_loader.py",),
    "mcore_sft/data/packs/batch.py": ("tests/data/test_batch.py",),
}
WANTED = 0.95
# A mutant may take so many times as long as the code itself, and at least so many seconds.
_SLOWER, _LEAST_SECONDS = 5.0, 20.0
# What the tests import and no mutant changes: imported once, before the first fork.
_SHARED = ("pytest", "numpy", "pyarrow", "torch", "awkward", "transformers", "datasets", "regex")


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change of one module."""

    module: str
    where: str
    """The function around it, with its class."""
    change: str
    """`old -> new`, and its number where the function has several alike."""
    line: int
    tree: ast.Module
    node: ast.AST
    other: ast.AST

    @property
    def name(self) -> str:
        """What it is called in tests/mutants.txt."""
        return f"{self.module}:{self.where}: {self.change}"

    @property
    def source(self) -> str:
        """The module with the change."""
        place = next(place for place, each in enumerate(ast.walk(self.tree)) if each is self.node)
        changed = copy.deepcopy(self.tree)
        twin = next(each for number, each in enumerate(ast.walk(changed)) if number == place)
        other = ast.copy_location(copy.deepcopy(self.other), twin)

        class Swap(ast.NodeTransformer):
            def visit(self, node: ast.AST) -> ast.AST:
                return other if node is twin else super().visit(node)

        return ast.unparse(ast.fix_missing_locations(Swap().visit(changed)))


# --- the changes ---------------------------------------------------------------------------------

_COMPARISONS: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_OPERATORS: Mapping[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
}  # fmt: skip


def mutants_of(module: str, source: str) -> list[Mutant]:
    """Every mutant of `source`, in the order of the text."""
    tree = ast.parse(source)
    made: list[Mutant] = []
    seen: Counter[tuple[str, str]] = Counter()
    for node, where in _nodes(tree, ""):
        for other in _others(node):
            old, new = (
                ast.unparse(node),
                "pass" if isinstance(other, ast.Pass) else ast.unparse(other),
            )
            change = f"{_short(old)} -> {_short(new)}"
            seen[where, change] += 1
            if seen[where, change] > 1:
                change += f" #{seen[where, change]}"
            made.append(
                Mutant(
                    module=module,
                    where=where or "module",
                    change=change,
                    line=node.lineno,
                    tree=tree,
                    node=node,
                    other=other,
                )
            )
    return made


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."


def _nodes(node: ast.AST, where: str) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """What may be changed, with the function around it: no annotations, docstrings and errors."""
    for name, value in ast.iter_fields(node):
        if name in {
            "annotation",
            "returns",
            "decorator_list",
            "exc",
            "cause",
            "type_params",
            "bases",
        }:
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Import | ast.ImportFrom):
                continue
            inner = where
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{where}.{child.name}".lstrip(".")
            if isinstance(child, ast.expr | ast.stmt):
                yield child, where
            yield from _nodes(child, inner)


def _others(node: ast.expr | ast.stmt) -> Iterator[ast.expr | ast.stmt]:
    """What `node` becomes in each of its mutants."""
    yield from _other_values(node) if isinstance(node, ast.expr) else _other_statements(node)


def _other_values(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.Compare(ops=[op]) if type(op) in _COMPARISONS:
            yield ast.Compare(node.left, [_COMPARISONS[type(op)]()], node.comparators)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            yield ast.BinOp(left, _OPERATORS[type(op)](), right)
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(ast.And() if isinstance(op, ast.Or) else ast.Or(), values)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.IfExp(test=test):
            yield ast.IfExp(ast.UnaryOp(ast.Not(), test), node.body, node.orelse)


def _other_statements(node: ast.stmt) -> Iterator[ast.stmt]:
    match node:
        case ast.If(test=test) if not isinstance(test, ast.Compare | ast.BoolOp):
            yield ast.If(ast.UnaryOp(ast.Not(), test), node.body, node.orelse)
        case ast.Return(value=ast.expr() as value) if not _is_none(value):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=value) if not isinstance(value, ast.Constant | ast.Yield):
            yield ast.Pass()
        case ast.AugAssign():
            yield ast.Pass()
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


# --- the tests on them ---------------------------------------------------------------------------


def copy_tree(to: Path) -> None:
    """The parts of the tree that tests need, without what Python has compiled."""
    for name in ("mcore_sft", "tests", "tools", "benchmarks", "configs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", to)


def passes(tree: Path, tests: Sequence[str], seconds: float) -> bool:
    """Whether the tests pass in a fork of this process that imports from `tree`; what takes longer
    than `seconds` does not."""
    child = os.fork()
    if child == 0:
        _run_and_exit(tree, tests)
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.05)


def _run_and_exit(tree: Path, tests: Sequence[str]) -> None:
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.chdir(tree)
    sys.dont_write_bytecode = True
    sys.path = [str(tree), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] in {"mcore_sft", "tests"}]:
        del sys.modules[name]
    import pytest

    options = ["-x", "-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:randomly"]
    os._exit(pytest.main([*options, *tests]))


def _share() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in _SHARED:
        with suppress(ImportError):
            importlib.import_module(name)


def equivalent(path: Path) -> dict[str, str]:
    """The mutants that mean the same as the code, each with the reason."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, mark, reason = line.partition("  # ")
        if not mark or not reason.strip():
            raise UserError(
                f"{path}:{number}: no reason (got {line!r}, expected MUTANT  # REASON). "
                "Fix: say why no test can tell it from the code"
            )
        found[name.strip()] = reason.strip()
    return found


def main() -> None:
    """Try mutants and report."""
    arguments = _arguments()
    modules = [module for module in COVERED if arguments.module in (None, Path(module).stem)]
    found = [
        mutant
        for module in modules
        for mutant in mutants_of(module, (ROOT / module).read_text(encoding="utf-8"))
    ]
    same = equivalent(ROOT / EQUIVALENT)
    if unknown := sorted(same.keys() - {mutant.name for mutant in _all_mutants()}):
        say(f"{EQUIVALENT}: no such mutant any more: {unknown[0]}", error=True)
    chosen = random.Random(arguments.seed).sample(found, min(arguments.count, len(found)))
    chosen.sort(key=lambda mutant: (mutant.module, mutant.line))
    _share()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        limits = {module: _limit(tree, module) for module in sorted({m.module for m in chosen})}
        survived = []
        for number, mutant in enumerate(chosen, start=1):
            if mutant.name in same:
                continue
            original = (tree / mutant.module).read_bytes()
            (tree / mutant.module).write_text(mutant.source, encoding="utf-8")
            if passes(tree, COVERED[mutant.module], limits[mutant.module]):
                survived.append(mutant)
                say(f"survived {number}/{len(chosen)}: line {mutant.line}: {mutant.name}")
            (tree / mutant.module).write_bytes(original)
    _report(chosen, survived, same)


def _all_mutants() -> Iterator[Mutant]:
    for module in COVERED:
        yield from mutants_of(module, (ROOT / module).read_text(encoding="utf-8"))


def _limit(tree: Path, module: str) -> float:
    """Seconds that the tests of a module may take; raises `UserError` where they fail as it is."""
    start = time.monotonic()
    if not passes(tree, COVERED[module], 600):
        raise UserError(
            f"{module}: its tests fail without any change. Fix: python -m pytest --noconftest "
            + " ".join(COVERED[module])
        )
    return max(_LEAST_SECONDS, _SLOWER * (time.monotonic() - start))


def _report(chosen: Sequence[Mutant], survived: Sequence[Mutant], same: Mapping[str, str]) -> None:
    for module in sorted({mutant.module for mutant in chosen}):
        of_module = [mutant for mutant in chosen if mutant.module == module]
        counted = [mutant for mutant in of_module if mutant.name not in same]
        lost = sum(mutant.module == module for mutant in survived)
        say(
            f"{module}: {len(counted) - lost} of {len(counted)} caught, "
            f"{len(of_module) - len(counted)} equivalent"
        )
    total = sum(mutant.name not in same for mutant in chosen)
    share = 1 - len(survived) / total if total else 1.0
    caught = f"{total - len(survived)} of {total} caught"
    say(f"{caught} ({100 * share:.1f} %, wanted {100 * WANTED:.0f} %)")
    raise SystemExit(int(share < WANTED))


def _arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="which are chosen")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="how many")
    parser.add_argument(
        "--module",
        choices=[Path(module).stem for module in COVERED],
        help="of one module only",
    )
    return parser.parse_args()


if __name__ == "__main__":
    command.run(main)
