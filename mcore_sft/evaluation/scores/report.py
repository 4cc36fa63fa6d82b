"""Verdicts in, the printed score out: NeMo-Skills' table and NeMo RL's block, in their very forms.

Each form stays as those tools print it; the 95 % interval stands on a line of its own after it.
What else report.json says follows as tables of the same form.
"""

from collections.abc import Iterable, Mapping, Sequence
from textwrap import fill
from typing import Any

from mcore_sft.evaluation.scores.statistics import Mean, Share

Cell = str | int | float


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


def nemo_skills_table(
    benchmark: str, modes: Mapping[str, tuple[Share | Mean, Share | Mean]], entries: int
) -> str:
    """The table of one benchmark of so many entries: by evaluation mode, right and no answer."""
    return table(
        benchmark,
        [
            {
                "evaluation_mode": mode,
                "num_entries": entries,
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
    num_tests_per_prompt: int = 1,
) -> str:
    """The block that NeMo RL's run_eval prints at its end, its blank lines included.

    `right` counts every answer; what is printed is of problems times tests.
    """
    bar = "=" * 60
    top_k = -1
    metric = "pass@1"
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


def interval_line(name: str, share: Share | Mean) -> str:
    """`symbolic_correct 60.00%, 95 % interval 55.65% to 64.20% (Wilson, 300 of 500)`."""
    low, high = share.interval
    said = f"{name} {share.percent:.2f}%, 95 % interval {low:.2f}% to {high:.2f}%"
    if isinstance(share, Share):
        return f"{said} (Wilson, {share.hits} of {share.total})\n"
    return f"{said} (over {len(share.values)} problems)\n"


def not_graded_line(count: int, total: int) -> str:
    """What is said where answers are in no score."""
    return (
        f"not graded {count} of {total} answers: the processes that graded them were killed, as "
        "happens where memory runs out, or got no processor time; they are in no score: run the "
        "command again\n"
    )


def details(said: Mapping[str, Any]) -> str:
    """What report.json says beside the scores: by what they split, who decided, and doubts."""
    answers = sum(said["verdicts"].values())
    return "".join(
        [
            *(_shares(name, shares) for name, shares in said["by"].items()),
            _grid(said["by_subject_level"]),
            _shares("tokens", {_tokens(part): part for part in said["lengths"]}),
            _counts(
                "verdicts",
                ("verdict", "rule"),
                (
                    (verdict, rule, count)
                    for verdict, rules in said["rules"].items()
                    for rule, count in rules.items()
                ),
            ),
            _counts("no answer", ("cause",), said["missing"].items()),
            interval_line("truncated", Share(hits=said["truncated"], total=answers)),
            interval_line("boxes differ", Share(hits=said["boxes_differ"], total=answers)),
            ""
            if said["mean_tokens"] is None
            else f"mean response {said['mean_tokens']:.1f} tokens\n",
            _named("disputed by math-verify", said["disputed"])
            if said["evaluation"]["second_opinion"]
            else "",
            *(
                _named(f"gold in doubt, {reason}", ids)
                for reason, ids in _by_reason(said["gold_defects"]).items()
            ),
        ]
    )


def _shares(name: str, shares: Mapping[str, Mapping[str, Any]]) -> str:
    if not shares:
        return ""
    rows: list[Mapping[str, Cell]] = []
    for value, share in shares.items():
        low, high = share["wilson95"]
        rows.append(
            {
                name: value,
                "num_entries": share["total"],
                "symbolic_correct": float(share["percent"]),
                "95 % interval": f"{low:.2f}% to {high:.2f}%",
            }
        )
    return table(f"by {name}", rows)


def _grid(by_subject: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Subjects down, levels across."""
    if not by_subject:
        return ""
    levels = sorted({level for by_level in by_subject.values() for level in by_level})
    return table(
        "by subject and level",
        [
            {"subject": subject}
            | {level: _of(by_level[level]) if level in by_level else "" for level in levels}
            for subject, by_level in by_subject.items()
        ],
    )


def _of(share: Mapping[str, Any]) -> str:
    return f"{share['percent']:.2f}% of {share['total']}"


def _tokens(part: Mapping[str, Any]) -> str:
    """`20 to 29`, which is from 20 and below 30."""
    start, end = part["from"], part["to"]
    return f"{start} or more" if end is None else f"{start} to {end - 1}"


def _counts(title: str, names: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    cells = [dict(zip([*names, "answers"], row, strict=True)) for row in rows]
    return table(title, cells) if cells else ""


def _by_reason(defects: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    made: dict[str, list[str]] = {}
    for defect in defects:
        made.setdefault(defect["reason"], []).append(defect["id"])
    return made


def _named(what: str, ids: Sequence[str]) -> str:
    listed = f": {', '.join(ids)}" if ids else ""
    return fill(f"{what} ({len(ids)}){listed}", 100, subsequent_indent="  ") + "\n"
