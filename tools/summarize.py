"""All results under some folders side by side.

python tools/summarize.py results/
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from mcore_sft import command
from mcore_sft.base.terminal import Console, Parser
from mcore_sft.evaluation import comparison
from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.run import ANSWERS, REPORT, TEXT

# What is not a terminal wraps nothing.
_WIDE = 1000


def main() -> None:
    """Print what lies under the folders of the command line."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=command.path, metavar="DIR")
    folders: Sequence[Path] = parser.parse_args().folders
    # a dataset has a report.json too, and no report.txt
    results = [(folder, comparison.read_report(folder)) for folder in _found(folders, TEXT)]
    unfinished = [folder for folder in _found(folders, ANSWERS) if not (folder / TEXT).exists()]
    if not results and not unfinished:
        raise EvaluationError(
            f"{', '.join(map(str, folders))}: no {REPORT} of an evaluation there or below; "
            "tools/evaluate.py writes them"
        )
    console = Console(width=None if sys.stdout.isatty() else _WIDE)
    if results:
        console.print(_table(sorted(results, key=_order)))
        if warning := comparison.grader_warning([report for _, report in results]):
            console.print(warning, soft_wrap=True)
    for folder in unfinished:
        console.print(f"{folder}: not finished; evaluate again", soft_wrap=True)


def _found(folders: Sequence[Path], name: str) -> Iterator[Path]:
    for folder in folders:
        if not folder.is_dir():
            raise EvaluationError(f"{folder}: no such folder")
    yield from sorted({path.parent for folder in folders for path in folder.rglob(name)})


def _order(result: tuple[Path, Mapping[str, Any]]) -> tuple[str, float]:
    """By benchmark, the best first."""
    report = result[1]
    return report["benchmark"]["name"], -report["score"]["symbolic_correct"]["percent"]


def _table(results: Sequence[tuple[Path, Mapping[str, Any]]]) -> Table:
    """A line a result; every score that any of them has is a column."""
    scores = dict.fromkeys(name for _, report in results for name in report["score"])
    table = Table(box=SIMPLE)
    table.add_column("benchmark")
    table.add_column("folder", overflow="fold")
    for column in ("entries", *scores, "policy"):
        table.add_column(column, justify="right")
    for folder, report in results:
        benchmark = report["benchmark"]
        table.add_row(
            benchmark["name"],
            str(folder),
            str(benchmark["problems"]),
            *(_share(report["score"].get(name)) for name in scores),
            report["evaluation"]["policy"],
        )
    return table


def _share(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    low, high = figure.get("wilson95") or figure["interval95"]
    return f"{figure['percent']:.2f}% ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    command.run(main)
