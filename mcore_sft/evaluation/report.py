"""Verdicts in, the printed score out: NeMo-Skills' table and NeMo RL's block, in their very forms.

Each form stays as those tools print it; the 95 % interval stands on a line of its own after it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

Cell = str | int | float


@dataclass(frozen=True, kw_only=True)
class Share:
    """`hits` of `total`, with its Wilson interval."""

    hits: int
    total: int

    @property
    def percent(self) -> float:
        """The share in percent; 0 of nothing is 0."""
        return 100.0 * self.hits / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, in percent."""
        return wilson(self.hits, self.total)


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of `hits` out of `total`, in percent."""
    if total == 0:
        return 0.0, 100.0
    z = 1.959963984540054
    share = hits / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    low = 0.0 if hits == 0 else 100 * (centre - half)
    return low, 100.0 if hits == total else 100 * (centre + half)


def table(title: str, rows: Sequence[Mapping[str, Cell]]) -> str:
    """Rows in the form of NeMo-Skills, which ends in two blank lines; all have the same columns.

    A float is a percentage. Column widths count its percent sign, so that no value overflows.
    """
    headers = list(rows[0])
    cells = [[_cell(row[header]) for header in headers] for row in rows]
    widths = [
        max(len(header), *(len(line[place]) for line in cells))
        for place, header in enumerate(headers)
    ]
    total = sum(widths) + 3 * (len(widths) - 1)
    lines = [f" {title} ".center(total, "-")]
    for line in [headers, *cells]:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        lines.append(" | ".join(padded))
    return "\n".join(lines) + "\n\n\n"


def _cell(value: Cell) -> str:
    return f"{value:.2f}%" if isinstance(value, float) else str(value)


def nemo_skills_table(benchmark: str, modes: Mapping[str, tuple[Share, Share]]) -> str:
    """The table of one benchmark: by evaluation mode, what is right and what has no answer."""
    return table(
        benchmark,
        [
            {
                "evaluation_mode": mode,
                "num_entries": right.total,
                "symbolic_correct": right.percent,
                "no_answer": silent.percent,
            }
            for mode, (right, silent) in modes.items()
        ],
    )


def nemo_rl_block(
    *,
    model_name: str,
    dataset_name: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    right: Share,
) -> str:
    """The block that NeMo RL's run_eval prints at its end, its blank lines included."""
    bar = "=" * 60
    top_k = -1
    metric = "pass@1"
    num_tests_per_prompt = 1
    share = right.hits / right.total if right.total else 0.0
    return "\n".join(
        [
            "",
            bar,
            f"{model_name=} {dataset_name=}",
            f"{max_new_tokens=} {temperature=} {top_p=} {top_k=}",
            "",
            f"{metric=} {num_tests_per_prompt=}",
            "",
            f"score={share:.4f} ({float(right.hits)}/{right.total})",
            bar,
            "",
            "",
        ]
    )


def interval_line(name: str, share: Share) -> str:
    """`symbolic_correct 60.00%, 95 % interval 55.65% to 64.20% (Wilson, 300 of 500)`."""
    low, high = share.interval
    return (
        f"{name} {share.percent:.2f}%, 95 % interval {low:.2f}% to {high:.2f}% "
        f"(Wilson, {share.hits} of {share.total})\n"
    )
