"""The history in, one HTML page out that needs nothing beside it: what broke, since when, where."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from mcore_sft.base import files
from mcore_sft.data.report.page import STYLE
from nightly import history
from nightly.curve import Curve, CurveError
from nightly.history import Record

_SHOWN = 100
"""The last records of a benchmark that are drawn."""
_MARKS = {"passed": "\u2713", "failed": "\u2717", "crashed": "!"}
_FIGURES = {
    "final_loss": "Final loss",
    "validation_loss": "Validation loss",
    "accuracy": "Accuracy, %",
    "tokens_per_second": "Tokens per second",
    "speed_ratio": "Speed, times the peer's",
    "step_seconds": "Mean step time, seconds",
    "peak_memory_gib": "Peak memory, GiB",
    "tests_passed": "Tests passed",
    "seconds": "Duration, seconds",
}
_STYLE = """
:root { --failed: #b3261e; --crashed: #8a5300; --ours: #1f5fbf; --theirs: #a9afb8; }
@media (prefers-color-scheme: dark) { :root { --failed: #ff9187; --crashed: #ffb951;
  --ours: #83b4ff; --theirs: #6b7179; } }
h1 .passed, h1 .failed, h1 .crashed { margin-right: .2rem; }
h2 a { color: inherit; }
.passed { color: var(--trained); } .failed { color: var(--failed); }
.crashed { color: var(--crashed); }
section.failed, section.crashed { border-left: .35rem solid; color: inherit; }
section.failed { border-left-color: var(--failed); }
section.crashed { border-left-color: var(--crashed); }
section { overflow-wrap: anywhere; }
.board td, .board th { text-align: left; white-space: nowrap; }
.board a { display: inline-block; max-width: min(24rem, 45vw); overflow: hidden;
  text-overflow: ellipsis; vertical-align: bottom; }
.strip { height: 14px; width: auto; }
.strip .passed { fill: var(--trained); opacity: .55; } .strip .failed { fill: var(--failed); }
.strip .crashed { fill: var(--crashed); }
@media (max-width: 40rem) { .board .commit { display: none; } .strip { height: 6px; }
  .board a { max-width: 35vw; } .board td, .board th { padding-right: .5rem; }
  .board td { white-space: normal; } }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
figure b { font-size: .9rem; } figure b span { color: var(--dim); font-weight: normal; }
svg .ours, svg .theirs { fill: none; stroke: var(--ours); stroke-width: 1.5; }
svg .theirs { stroke: var(--theirs); stroke-width: 5; }
svg circle { fill: var(--ours); } svg line.range { stroke: var(--ours); opacity: .45; }
svg .mark { fill: var(--failed); } svg .mark.crashed { fill: var(--crashed); }
svg line.departs { stroke: var(--failed); stroke-dasharray: 4 3; stroke-width: 1.5; }
svg text.departs { fill: var(--failed); font-weight: bold; }
.key i { display: inline-block; width: 1.2rem; vertical-align: middle; margin-right: .2rem;
  border-top: 2px solid var(--ours); } .key i.theirs { border-top: 5px solid var(--theirs); }
"""


def write(history_file: Path, html_file: Path) -> None:
    """Write the page of all that the history holds; raises OSError."""
    records, torn = history.read(history_file)
    files.make_folder(html_file.parent)
    files.replace(html_file, _page(records, torn, history_file.parent))


def _page(records: Sequence[Record], torn: str | None, folder: Path) -> str:
    kept: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        kept.setdefault((record.tier, record.benchmark), []).append(record)
    benchmarks = list(kept.values())
    broken = [nights for nights in benchmarks if nights[-1].outcome != "passed"]
    said = _headline([nights[-1] for nights in benchmarks])
    mark = _worst([nights[-1] for nights in benchmarks])
    body = [
        f"<h1>{mark} {said}</h1>",
        f"<p class=dim>{_when(records[-1])}" if records else "<p>The history holds no record yet.",
        f"<p class=failed>The history is damaged: {_text(torn)}" if torn else "",
        *(_broken(nights) for nights in broken),
        _board(benchmarks),
        *(_benchmark(nights, folder) for nights in benchmarks),
    ]
    return (
        "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
        "<meta http-equiv=Content-Security-Policy "
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>Nightly: {said}</title>\n<style>{STYLE}{_STYLE}</style>\n"
        + "\n".join(body)
        + "\n</html>\n"
    )


def _headline(newest: Sequence[Record]) -> str:
    """What the tab says too."""
    if not newest:
        return "No night yet"
    counts = {name: sum(r.outcome == name for r in newest) for name in ("failed", "crashed")}
    counts["not run at the newest commit"] = len(_stale(newest))
    bad = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    of = f"{len(newest)} benchmark{'s' * (len(newest) > 1)}"
    return f"{bad} of {of}" if bad else f"{of} passed" if len(newest) == 1 else f"All {of} passed"


def _worst(newest: Sequence[Record]) -> str:
    outcomes = {record.outcome for record in newest}
    if "failed" in outcomes:
        return _mark("failed")
    return _mark("crashed" if "crashed" in outcomes or _stale(newest) else "passed") * bool(newest)


def _stale(newest: Sequence[Record]) -> list[Record]:
    """Those that are not of the newest commit of their tier."""
    last = {r.tier: r.commit for r in sorted(newest, key=lambda record: record.date)}
    return [record for record in newest if record.commit != last[record.tier]]


def _when(record: Record) -> str:
    machine = ", ".join(f"{_text(name)} {_text(said)}" for name, said in record.machine.items())
    return (
        f"Last judged {_date(record.date)}: commit {_commit(record)} of "
        f"{_date(record.commit_time)}; {machine}"
    )


# --- what is not well --------------------------------------------------------------------------


def _broken(nights: Sequence[Record]) -> str:
    """Of a benchmark whose newest record did not pass: what, at which step, since which commits."""
    newest = nights[-1]
    sentences = [finding.sentence for finding in newest.findings if not finding.passed]
    steps = [f.step for f in newest.findings if not f.passed and f.step is not None]
    facts = {"since": _since(nights)}
    if steps:
        facts = {"first departs": f"<b>step {min(steps)}</b>"} | facts
    if newest.narrowed:
        facts["narrowed"] = _text(newest.narrowed)
    if newest.commits:
        facts["commits"] = _text(newest.commits)
    crash = f"<pre>{_text(newest.crash)}</pre>" if newest.crash else ""
    return (
        f"<section class={newest.outcome}>\n<h2>{_link(newest)} "
        f"<span class={newest.outcome}>{newest.outcome}</span></h2>"
        + "".join(f"<p>{_text(sentence)}" for sentence in sentences)
        + f"<dl>{''.join(f'<dt>{name}<dd>{fact}' for name, fact in facts.items())}</dl>"
        + f"{crash}</section>"
    )


def _since(nights: Sequence[Record]) -> str:
    """The first record of those that did not pass without one between that did."""
    passed = [place for place, record in enumerate(nights) if record.outcome == "passed"]
    if not passed:
        return f"{_commit(nights[0])}, its first; it never passed"
    good, first = nights[passed[-1]], nights[passed[-1] + 1]
    count = len(nights) - 1 - passed[-1]
    return (
        f"<b>{_commit(first)}</b> of {_date(first.commit_time)} ({count} in a row); "
        f"last passed {_commit(good)} of {_date(good.commit_time)}"
    )


def _board(benchmarks: Sequence[Sequence[Record]]) -> str:
    if not benchmarks:
        return ""
    stale = _stale([nights[-1] for nights in benchmarks])
    late = "<br><span class=crashed>not run again</span>"
    lines = "".join(
        f"<tr><th scope=row>{_mark(nights[-1].outcome)} {_link(nights[-1])}"
        f"<td class={nights[-1].outcome}>{nights[-1].outcome}{late * (nights[-1] in stale)}"
        f"<td>{_strip(nights[-30:])}"
        f"<td class=commit>{_commit(nights[-1])}"
        for nights in benchmarks
    )
    head = "<th scope=col>benchmark<th scope=col>newest<th scope=col>last 30"
    return (
        f"<section>\n<h2>All benchmarks</h2><div class=wide><table class=board><thead><tr>{head}"
        f"<th scope=col class=commit>commit<tbody>{lines}</table></div></section>"
    )


def _strip(nights: Sequence[Record]) -> str:
    """One box a record; what did not pass is higher."""
    boxes = "".join(
        f"<rect class={record.outcome} x={6 * place} width=5 "
        f"{'y=5 height=9' if record.outcome == 'passed' else 'y=0 height=14'}>"
        f"<title>{_said(record)}</title></rect>"
        for place, record in enumerate(nights)
    )
    passed = sum(record.outcome == "passed" for record in nights)
    label = f"{passed} of the last {len(nights)} passed"
    width = 6 * len(nights)
    return (
        f'<svg class=strip viewBox="0 0 {width} 14" width={width} role=img '
        f'aria-label="{label}">{boxes}</svg>'
    )


# --- one benchmark -----------------------------------------------------------------------------


def _benchmark(nights: Sequence[Record], folder: Path) -> str:
    newest, shown = nights[-1], nights[-_SHOWN:]
    charts = [
        _figure_chart(shown, key, title)
        for key, title in _FIGURES.items()
        if any(key in record.figures for record in shown)
    ]
    first = f"{len(shown)} of {len(nights)} records, {_date(shown[0].date)} to {_date(newest.date)}"
    findings = "".join(
        f"<li><span class={outcome}>{_MARKS[outcome]}</span> {_text(finding.sentence)}"
        for finding in newest.findings
        for outcome in ["passed" if finding.passed else "failed"]
    )
    return (
        f'<section id="{_name(newest)}">\n<h2>{_mark(newest.outcome)} {_name(newest)}</h2>'
        + _curves(nights, folder)
        + (f"<details><summary>what was asked of it</summary><ul>{findings}</ul></details>")
        * bool(findings)
        + f"<h3>Over commits</h3><p class=dim>{first}</p><div class=charts>{''.join(charts)}</div>"
        "</section>"
    )


def _figure_chart(nights: Sequence[Record], key: str, title: str) -> str:
    """A figure of each record; what failed is a diamond, what crashed stands at the bottom."""
    values = [(place, r.figures[key]) for place, r in enumerate(nights) if key in r.figures]
    ranges = [
        (place, r.figures[f"{key}_low"], r.figures[f"{key}_high"])
        for place, r in enumerate(nights)
        if {f"{key}_low", f"{key}_high"} <= r.figures.keys()
    ]
    every = [y for _, y in values] + [y for _, *ends in ranges for y in ends]
    plot = _Plot((0, len(nights) - 1), (min(every), max(every)))
    drawn = [plot.grid()]
    for place, low, high in ranges:
        x = plot.x(place)
        drawn.append(
            f"<line class=range x1={x:.1f} x2={x:.1f} y1={plot.y(low):.1f} y2={plot.y(high):.1f} />"
        )
    drawn.append(plot.line(values, "ours"))
    for place, record in enumerate(nights):
        told = f"<title>{_said(record)}"
        x, y = plot.x(place), plot.y(record.figures[key]) if key in record.figures else _BASE
        told += f": {_number(record.figures[key])}</title>" if key in record.figures else "</title>"
        if record.outcome != "passed":
            drawn.append(
                f'<path class="mark {record.outcome}" d="M{x:.1f} {y - 5:.1f}l5 5-5 5-5-5z">'
                f"{told}</path>"
            )
        elif key in record.figures:
            drawn.append(f"<circle cx={x:.1f} cy={y:.1f} r=2>{told}</circle>")
    drawn.append(plot.ends(_short(nights[0]), _short(nights[-1])))
    newest = _number(values[-1][1])
    return _figure(title, newest, f"{title}: {newest} at the newest record that has it", drawn)


def _curves(nights: Sequence[Record], folder: Path) -> str:
    """The newest curve over its reference, and how far they are apart."""
    newest = next((record for record in reversed(nights) if record.curve), None)
    if newest is None or newest.curve is None:
        return ""
    try:
        ours = Curve.read(folder / newest.curve)
        theirs = Curve.read(folder / newest.reference) if newest.reference else None
    except CurveError as error:
        return f"<p class=dim>The curve is not shown: {_text(error)}"
    if not ours.steps:
        return "<p class=dim>The run ended before its first step."
    steps = [f.step for f in newest.findings if not f.passed and f.step is not None]
    departs = min(steps, default=None)
    charts = [_curve_chart(ours, theirs, key, departs) for key in ("loss", "grad_norm")]
    if theirs:
        charts.append(_apart_chart(ours, theirs, departs))
    legend = "<i></i>this run" + (" &ensp; <i class=theirs></i>reference" if theirs else "")
    return (
        f"<h3>Curve of {_commit(newest)}</h3><p class='dim key'>{legend}</p>"
        f"<div class=charts>{''.join(charts)}</div>"
    )


def _curve_chart(ours: Curve, theirs: Curve | None, key: str, departs: int | None) -> str:
    title = {"loss": "Loss", "grad_norm": "Gradient norm"}[key]
    lines = [
        (kind, _finite(zip(curve.steps, getattr(curve, key), strict=True)))
        for kind, curve in (("theirs", theirs), ("ours", ours))
        if curve
    ]
    return _lines_chart(title, lines, departs, _extent(ours.steps))


def _apart_chart(ours: Curve, theirs: Curve, departs: int | None) -> str:
    """The relative difference of the losses; steps without one are left out."""
    reference = dict(zip(theirs.steps, theirs.loss, strict=True))
    apart = [
        (step, math.log10(share))
        for step, loss in zip(ours.steps, ours.loss, strict=True)
        if reference.get(step) and (share := abs(loss / reference[step] - 1)) > 0
    ]
    lines = [("ours", _finite(apart))]
    return _lines_chart("Losses apart, relative, log", lines, departs, _extent(ours.steps), "1e")


def _lines_chart(
    title: str,
    lines: Sequence[tuple[str, list[tuple[int, float]]]],
    departs: int | None,
    across: tuple[float, float],
    prefix: str = "",
) -> str:
    points = [point for _, line in lines for point in line]
    if not points:
        same = "the same at every step" if prefix else "no number at any step"
        return f"<figure><b>{title}</b><figcaption>{same}</figcaption></figure>"
    low, high = _extent(y for _, y in points)
    plot = _Plot(across, (math.floor(low), math.ceil(high)) if prefix else (low, high))
    drawn = [plot.grid(prefix), *(plot.line(line, kind) for kind, line in lines)]
    label = f"{title} of {len(lines[-1][1])} steps"
    if departs is not None and plot.first <= departs <= plot.last:
        x = plot.x(departs)
        side = "end" if x > _WIDTH / 2 else "start"
        drawn.append(
            f"<line class=departs x1={x:.1f} x2={x:.1f} y1={_TOP} y2={_BASE} />"
            f"<text class=departs x={x + (-5 if side == 'end' else 5):.1f} y={_TOP + 9} "
            f"text-anchor={side}>departs at step {departs}</text>"
        )
        label += f"; departs at step {departs}"
    drawn.append(plot.ends(f"step {plot.first:g}", f"{plot.last:g}"))
    return _figure(title, "", label, drawn)


# --- drawing -----------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP = 340, 150, 52, 10, 10
_BASE = _HEIGHT - 20


class _Plot:
    """Numbers to places in the picture."""

    def __init__(self, across: tuple[float, float], up: tuple[float, float]) -> None:
        self.first, self.last = across
        low, high = up
        pad = (high - low) * 0.08 or abs(high) * 0.02 or 1.0
        self.low, self.high = low - pad, high + pad

    def x(self, value: float) -> float:
        wide = _WIDTH - _LEFT - _RIGHT - 6
        return _LEFT + 3 + wide * ((value - self.first) / ((self.last - self.first) or 1))

    def y(self, value: float) -> float:
        return _BASE - (_BASE - _TOP) * (value - self.low) / (self.high - self.low)

    def grid(self, prefix: str = "") -> str:
        """Two to five round numbers and their lines; `prefix` 1e: whole exponents."""
        step = _round_step((self.high - self.low) / 5)
        step = max(1.0, step) if prefix else step
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        levels = range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        return "".join(
            f"<line x1={_LEFT} x2={_WIDTH - _RIGHT} y1={y:.1f} y2={y:.1f} />"
            f"<text x={_LEFT - 5} y={y + 4:.1f} text-anchor=end>"
            f"{prefix}{_level(level * step, digits)}</text>"
            for level in levels
            for y in [self.y(level * step)]
        )

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> str:
        """A line without the steps between that have no number."""
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return f'<polyline class={kind} points="{path}" />'

    def ends(self, first: str, last: str) -> str:
        """What stands at either end of the axis."""
        y = _HEIGHT - 5
        return (
            f"<text x={_LEFT} y={y}>{first}</text>"
            f"<text x={_WIDTH - _RIGHT} y={y} text-anchor=end>{last}</text>"
        )


def _level(value: float, digits: int) -> str:
    """A round number that fits beside its line."""
    return f"{value:.3g}" if abs(value) >= 1e6 else f"{value:,.{digits}f}"


def _round_step(least: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(least))
    return next(step for factor in (1, 2, 5, 10) if (step := factor * power) >= least * 0.999)


def _figure(title: str, newest: str, label: str, drawn: Sequence[str]) -> str:
    return (
        f"<figure><b>{title} <span>{newest}</span></b>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{label}">'
        f"{''.join(drawn)}</svg></figure>"
    )


def _extent(values: Iterable[float]) -> tuple[float, float]:
    every = list(values)
    return min(every), max(every)


def _finite(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _mark(outcome: str) -> str:
    return f"<span class={outcome} aria-hidden=true>{_MARKS[outcome]}</span>"


def _name(record: Record) -> str:
    return _text(f"{record.tier}/{record.benchmark}")


def _link(record: Record) -> str:
    return f'<a href="#{_name(record)}">{_name(record)}</a>'


def _said(record: Record) -> str:
    return f"{_short(record)}, {_date(record.date)}: {record.outcome}"


def _commit(record: Record) -> str:
    return f'<code title="{_text(record.commit)}">{_short(record)}</code>'


def _short(record: Record) -> str:
    return _text(record.commit[:9])


def _date(said: str) -> str:
    """ISO 8601, to the minute."""
    return _text(said[:16].replace("T", " "))


def _text(text: object) -> str:
    return escape(str(text))
