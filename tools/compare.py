"""Two evaluations of the same problems side by side: is one better, and where.

python tools/compare.py results/A/evaluation/math results/B/evaluation/math [--html FILE]
"""

import argparse
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

from mcore_sft import command
from mcore_sft.base.files import check_writable, write_named
from mcore_sft.base.terminal import Console, Parser, say
from mcore_sft.evaluation import comparison
from mcore_sft.evaluation.comparison import Comparison
from mcore_sft.evaluation.scores.report import interval_line
from mcore_sft.evaluation.scores.report_page import page
from mcore_sft.evaluation.scores.summary import Row, share


def main() -> None:
    """Compare the folders of the command line."""
    arguments = _arguments()
    if arguments.html:
        check_writable(arguments.html)
    a, b = comparison.read(arguments.a), comparison.read(arguments.b)
    found = comparison.compare(a, b)
    console = Console()
    console.print(f"{found.benchmark}, {found.paired.total} problems")
    for name, result in (("A", a), ("B", b)):
        line = interval_line(f"{name} symbolic_correct", share([*result.greedy.values()]))
        console.print(f"{line[:-1]}  {result.folder}", soft_wrap=True)
    if found.warning:
        console.print(found.warning, soft_wrap=True)
    if found.not_graded:
        console.print(f"{found.not_graded} problems are left out: an answer is not graded")
    _print_pairs(console, found)
    for title, pairs in (("A alone was right", found.lost), ("B alone was right", found.won)):
        _print_flipped(console, title, pairs, arguments.show)
    if arguments.html:
        write_named(arguments.html, page(b.report, b.rows, a.rows))
        say(f"B's report, with what flipped against A, is in {arguments.html}")


def _arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "a", type=command.path, metavar="A", help="folder that tools/evaluate.py wrote"
    )
    parser.add_argument("b", type=command.path, metavar="B", help="another, of the same problems")
    parser.add_argument("--show", type=int, default=20, metavar="N", help="flipped problems listed")
    parser.add_argument(
        "--html", type=command.path, metavar="FILE", help="B's report, flips marked"
    )
    return parser.parse_args()


def _print_pairs(console: Console, found: Comparison) -> None:
    paired = found.paired
    table = Table(box=SIMPLE)
    for column in ("both right", "only A", "only B", "neither"):
        table.add_column(column, justify="right")
    table.add_row(*map(str, (paired.both, paired.only_a, paired.only_b, paired.neither)))
    console.print(table)
    low, high = paired.interval
    console.print(
        f"B less A: {paired.difference:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}; "
        f"McNemar's exact p = {paired.p_value:.3g}",
        soft_wrap=True,
    )


def _print_flipped(
    console: Console, title: str, pairs: Sequence[tuple[Row, Row]], limit: int
) -> None:
    if not pairs:
        return
    table = Table(box=SIMPLE, title=f"{title}: {len(pairs)}", title_justify="left")
    for column in ("problem", "right answer", "A", "B"):
        table.add_column(column, overflow="fold")
    for left, right in pairs[:limit]:
        cells = (left["id"], left["expected_answer"], _said(left), _said(right))
        table.add_row(*cells)
    console.print(table)
    if len(pairs) > limit:
        console.print(f"and {len(pairs) - limit} more: --show {len(pairs)}, or --html FILE")


def _said(row: Row) -> str:
    return str(row["extracted"] if row["extracted"] is not None else f"({row['rule']})")


if __name__ == "__main__":
    command.run(main)
