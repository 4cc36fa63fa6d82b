"""report.json and the rows of verdicts.jsonl in, one HTML page out that needs nothing beside it.

    headline  ->  links into the list of answers, which begins with the wrong ones
    rows      ->  base64 of gzipped JSON, which page/browse.js filters and shows
    counts    ->  tables, whose figures link into the list; what it was made of, hashes last

Responses are hostile. None stands in the page as markup: the script sets each as text, or as MathML
that the vendored Temml builds node by node in the reader's browser, for the answers in view only.
Should either be mistaken, the page's own policy lets no other script run, and nothing be loaded or
sent. Characters that turn text around or cannot be seen are shown by their numbers.
"""

import base64
import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from mcore_sft.data.report.page import STYLE

Row = Mapping[str, Any]

_ASSETS = Path(__file__).with_name("page")
# Characters of response that the page holds: of one answer, and of all (10 to 15 MB).
_LONGEST, _ALL = 50_000, 40_000_000
_LONGEST_ANSWER, _LONGEST_SOLUTION = 2_000, 10_000
# What turns text around, has no width, or controls a terminal; no tab and no end of a line.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def page(report: Mapping[str, Any], rows: Sequence[Row], other: Sequence[Row] | None = None) -> str:
    """The whole page of one benchmark; `other` are the rows of a run to compare with.

    A section that `report` lacks is left out. Of `rows`, `id` and `verdict` must be there.
    """
    report, rows, other = _visible(report), _visible(rows), _visible(other)
    benchmark, model = report["benchmark"]["name"], Path(report["model"]["folder"]).name
    title = _text(f"{benchmark}: {model}")
    style = "\n".join([STYLE, _math_style(), _asset("browse.css")])
    # each in an element of its own: "use strict" is for ours
    scripts = [_licensed("temml.min.js"), _asset("browse.js")]
    body = [
        f"<h1>{title}</h1>",
        _headline(report),
        _browser(bool(other)),
        *_sections(report),
        f"<script type=application/octet-stream id=rows>{_packed(report, rows, other)}</script>",
        *(f"<script>{script}</script>" for script in scripts),
    ]
    whole = (
        "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
        f'<meta http-equiv=Content-Security-Policy content="{_policy(style, scripts)}">\n'
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{style}</style>\n" + "\n".join(body) + "\n</html>\n"
    )
    # half a surrogate pair, which JSON can bring, has no UTF-8
    return whole.encode("utf-8", "replace").decode("utf-8")


def _visible(content: Any) -> Any:
    """The same, in whose texts every character can be seen: U+202E is ⟨U+202E⟩."""
    if isinstance(content, str):
        return _UNSEEN.sub(lambda found: f"\u27e8U+{ord(found[0]):04X}\u27e9", content)
    if isinstance(content, Mapping):
        return {_visible(name): _visible(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_visible(value) for value in content]
    return content


def _policy(style: str, scripts: Iterable[str]) -> str:
    """No network, no script or style but these, and the font that the style holds."""
    allowed = " ".join(map(_source, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_source(style)}; font-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8").strip()


def _licensed(name: str) -> str:
    return f"/*\n{_asset('temml.LICENSE')}\n*/\n{_asset(name)}"


def _math_style() -> str:
    """Temml's rules without what they would load, and a font that can draw roots and brackets.

    Few systems have one by a name that is known, and a browser that finds none, or an old one,
    leaves roots out.
    """
    rules = re.sub(r"@font-face \{[^}]*\}|[-\w]*mask-image: url\(.*?\);", "", _asset("temml.css"))
    rules = re.sub(r"font-family: [^;}]*", "font-family: 'Report Math', math", rules)
    font = base64.b64encode((_ASSETS / "math.woff2").read_bytes()).decode()
    return (
        f"/*\n{_asset('math.LICENSE')}\n*/\n@font-face {{ font-family: 'Report Math'; "
        f"src: url(data:font/woff2;base64,{font}) format('woff2'); }}\n{rules}"
    )


# --- the counts --------------------------------------------------------------------------------


def _headline(report: Mapping[str, Any]) -> str:
    (_, first), *others = report["score"].items()
    counted = (
        f"{first['hits']:,} of {first['total']:,} right"
        if "hits" in first
        else f"over {first['total']:,} problems"
    )
    score = f"<p class=score>{first['percent']:.2f}% <small>{_interval(first)}, {counted}</small>"
    facts = {}
    verdicts = dict(report.get("verdicts") or {})
    known = {name: verdicts.pop(name, 0) for name in ("equal", "no_answer", "not_graded")}
    if wrong := sum(verdicts.values()):
        facts["wrong"] = _link(f"{wrong:,}", filter="wrong")
    for name, share in others:
        figure = f"{share['percent']:.2f}%"
        shown = _link(figure, filter=name) if name in known else figure
        facts[name.replace("_", " ")] = f"{shown} <small>{_interval(share)}</small>"
    if report.get("not_graded"):
        chosen = {"filter": "all", "verdict": "not_graded", "sample": "any"}
        facts["not graded, in no score"] = _link(f"{report['not_graded']:,}", **chosen)
    counts = {"truncated": report.get("truncated"), "disputed": len(report.get("disputed") or ())}
    for name, count in counts.items():
        if count:
            facts[name] = _link(f"{count:,}", filter=name)
    if report.get("mean_tokens") is not None:
        facts["mean length"] = f"{report['mean_tokens']:,.0f} tokens"
    return score + _facts(facts, "headline")


def _sections(report: Mapping[str, Any]) -> list[str]:
    made = {
        "By number of samples": _by_k(report.get("by_k") or {}),
        "By subject and level": _by_subject_and_level(report),
        "By length of the response": _lengths(report.get("lengths") or ()),
        "Verdicts, and the rules that decided": _rules(report),
        "Gold answers to doubt": _gold_defects(report.get("gold_defects") or ()),
        "As NeMo-Skills and NeMo RL print it": _form(report.get("text") or ""),
        "What it was made of": _made_of(report),
    }
    return [
        f"<section>\n<h2>{heading}</h2>\n{content}\n</section>"
        for heading, content in made.items()
        if content
    ]


def _form(text: str) -> str:
    return text and f"<pre class=form>{_text(text.strip())}</pre>"


def _by_k(by_k: Mapping[str, Mapping[str, Any]]) -> str:
    if len(by_k) < 2:
        return ""
    most = list(by_k)[-1]
    names = (mode.replace(f"@{most}", "@k").replace(f"[{most}]", "[k]") for mode in by_k[most])
    head = "<tr><th scope=col>k" + "".join(f"<th scope=col>{_text(name)}" for name in names)
    lines = (
        f"<tr><th scope=row>{_text(k)}"
        + "".join(f'<td title="{_interval(of)}">{of["percent"]:.1f}%' for of in modes.values())
        for k, modes in by_k.items()
    )
    return _table(head, "".join(lines))


def _by_subject_and_level(report: Mapping[str, Any]) -> str:
    """Subjects down, levels across, each with its total; either alone where only one is known."""
    by = report.get("by") or {}
    subjects, levels = by.get("subject") or {}, by.get("level") or {}
    cells = report.get("by_subject_level") or {}
    across: dict[str, Mapping[str, Any]] = {str(level): share for level, share in levels.items()}
    if not subjects and not across:
        return ""
    head = "".join(f"<th scope=col>{_text(_level(level))}" for level in across)
    lines = []
    for subject, total in subjects.items():
        own = {str(level): share for level, share in cells.get(subject, {}).items()}
        lines.append(
            f"<tr><th scope=row>{_text(subject)}"
            + "".join(_cell(own.get(level), subject=subject, level=level) for level in across)
            + _cell(total, subject=subject)
        )
    lines.append(
        "<tr><th scope=row>all"
        + "".join(_cell(share, level=level) for level, share in across.items())
        + _cell(next(iter(report["score"].values())))
    )
    return _table(f"<tr><th>{head}<th scope=col>all", "".join(lines)) + (
        "<p class=dim>Percent right of how many; a figure leads to its answers.</p>"
    )


def _level(level: str) -> str:
    return f"level {level}" if level.isdigit() else level


def _cell(share: Mapping[str, Any] | None, **chosen: str) -> str:
    if not share or not share["total"]:
        return "<td>"
    figure = f"{share['percent']:.1f} <span class=dim>{share['total']:,}</span>"
    return f'<td title="{_interval(share)}">' + _link(figure, filter="all", **chosen)


def _lengths(bins: Sequence[Mapping[str, Any]]) -> str:
    lines = "".join(
        f"<tr><th scope=row>{_range(share)}<td>{share['total']:,}<td>{share['percent']:.1f}%"
        f"<td class=bar>{_bar(share)}"
        for share in bins
        if share["total"]
    )
    head = "<tr><th scope=col>tokens<th scope=col>answers<th scope=col>right<th>"
    told = "<p class=dim>The bar is the share right, from 0 to 100%; the line its 95% interval.</p>"
    return lines and _table(head, lines, "figures bars") + told


def _range(share: Mapping[str, Any]) -> str:
    if share.get("to") is None:
        return f"{share['from']:,} or more"
    return f"{share['from']:,} to {share['to'] - 1:,}"


def _bar(share: Mapping[str, Any]) -> str:
    """A share as a bar from 0 to 100 %, its interval as a line over it."""
    low, high = share.get("wilson95") or share["interval95"]
    return (
        '<svg viewBox="0 0 100 10" preserveAspectRatio=none role=img '
        f'aria-label="{_interval(share)}"><rect y=1 width={share["percent"]:.1f} height=8 />'
        f"<line x1={low:.1f} x2={high:.1f} y1=5 y2=5 /></svg>"
    )


def _rules(report: Mapping[str, Any]) -> str:
    """Verdict, rule, count; for want of an answer, the cause is the rule."""
    rules = dict(report.get("rules") or {})
    if report.get("missing"):
        rules["no_answer"] = report["missing"]
    lines = [
        f"<tr><th scope=row>{'' if place else _text(verdict.replace('_', ' '))}"
        f"<th scope=row>{_text(rule)}<td>"
        + _link(f"{count:,}", filter="all", verdict=verdict, rule=rule)
        for verdict, counts in rules.items()
        for place, (rule, count) in enumerate(counts.items())
    ]
    head = "<tr><th scope=col>verdict<th scope=col>rule or cause<th scope=col>answers"
    return _table(head, "".join(lines), "words") if lines else ""


def _gold_defects(defects: Sequence[Mapping[str, str]]) -> str:
    if not defects:
        return ""
    lines = "".join(
        f"<tr><th scope=row>{_link(_text(defect['id']), filter='all', find=defect['id'])}"
        f"<th scope=row>{_text(defect['reason'])}"
        for defect in defects
    )
    told = "<p class=dim>These problems are counted as they are; a wrong verdict may be theirs.</p>"
    return told + _table("", lines, "words")


def _made_of(report: Mapping[str, Any]) -> str:
    """By whom each thing is said, as names repeat: vLLM has a torch of its own. Hashes last."""
    benchmark, model = report["benchmark"], report["model"]
    groups = {
        "asked": {
            "benchmark": f"{benchmark.get('source')}, {benchmark.get('problems'):,} problems",
            "model": model["folder"],
        },
        "what answered": report.get("engine"),
        "what graded": {
            **{f"grader's {name}": said for name, said in report.get("grader", {}).items()},
            **report.get("versions", {}),
        },
    }
    details = {
        "settings": report.get("evaluation"),
        "prompt": report.get("prompt"),
        "hashes": {
            "benchmark": benchmark.get("fingerprint"),
            "prompt": report.get("prompt", {}).get("fingerprint"),
            "tokenizer": report.get("tokenizer", {}).get("fingerprint"),
            "configuration": report.get("configuration"),
            "model": model.get("files"),
        },
    }
    return "".join(
        f"<h3>{name}</h3>" + _facts({key: _text(fact) for key, fact in facts.items()})
        for name, facts in groups.items()
        if facts
    ) + "".join(
        f"<details><summary>{name}</summary><pre>{_text(_yaml(part))}</pre></details>"
        for name, part in details.items()
        if part
    )


def _yaml(part: object) -> str:
    return yaml.safe_dump(part, sort_keys=False, allow_unicode=True, width=100)


def _facts(facts: Mapping[str, str], kind: str = "facts") -> str:
    """Names, which are text, and what is said of them, which is HTML."""
    listed = (f"<div><dt>{_text(name)}<dd>{fact}</div>" for name, fact in facts.items())
    return f"<dl class={kind}>{''.join(listed)}</dl>"


def _interval(share: Mapping[str, Any]) -> str:
    low, high = share.get("wilson95") or share["interval95"]
    return f"95% interval {low:.1f} to {high:.1f}%"


def _link(figure: str, **chosen: str) -> str:
    """`figure`, which is HTML, as a link to the answers that it counts."""
    return f'<a href="#{_text(urlencode(chosen))}">{figure}</a>'


def _table(head: str, body: str, kind: str = "figures") -> str:
    return f'<div class=wide><table class="{kind}"><thead>{head}<tbody>{body}</table></div>'


def _text(text: object) -> str:
    return escape(str(text))


# --- the answers -------------------------------------------------------------------------------


def _browser(compared: bool) -> str:
    subject, verdict, *others = (
        f"<label>{name} <select id={name}><option value=any>any</select></label>"
        for name in ("subject", "verdict", "level", "rule", "sample")
    )
    flipped = (
        "<p class=dim>Flipped are the answers that are right in one run and wrong in the other.</p>"
    )
    return (
        "<section id=browse>\n<h2>Answers</h2>\n"
        "<noscript><p>The list of answers needs JavaScript; it loads and sends nothing.</noscript>"
        f"{flipped if compared else ''}<div class=controls><div id=filters></div>"
        f"<div>{subject}{verdict}<details id=more><summary>more</summary>{''.join(others)}"
        "<label>text <input id=find type=search></label>"
        "<label><input id=source type=checkbox> as source</label></details></div></div>"
        "<nav class=pager></nav><div id=answers></div><nav class=pager></nav>\n</section>"
    )


def _packed(report: Mapping[str, Any], rows: Sequence[Row], other: Sequence[Row] | None) -> str:
    """All that the list shows, as base64 of gzipped JSON."""
    limit = _limit([len(row.get("response") or "") for row in rows])
    before = {(row["id"], row.get("sample", 0)): row for row in other or ()}
    defects = {defect["id"]: defect["reason"] for defect in report.get("gold_defects") or ()}
    problems: dict[str, dict[str, Any]] = {}
    numbers: dict[str, int] = {}
    for row in rows:
        if row["id"] not in problems:
            numbers[row["id"]] = len(numbers)
            problems[row["id"]] = _problem(row, defects.get(row["id"]))
    shown = [
        _answer(row, before.get((row["id"], row.get("sample", 0))), limit)
        | {"problem": numbers[row["id"]]}
        for row in rows
    ]
    data = {
        "problems": list(problems.values()),
        "rows": shown,
        # what the counts are of: the greedy answers, and all where there are none
        "sample": "0" if any(row.get("sample", 0) == 0 for row in rows) else "any",
        "compared": bool(other),
    }
    packed = gzip.compress(json.dumps(data, separators=(",", ":")).encode(), 6, mtime=0)
    return base64.b64encode(packed).decode()


def _limit(lengths: Iterable[int]) -> int:
    """The most characters that each response may keep for all to keep `_ALL` or fewer."""
    ordered, left = sorted(min(length, _LONGEST) for length in lengths), _ALL
    for place, length in enumerate(ordered):
        even = left // (len(ordered) - place)
        if length > even:
            return even
        left -= length
    return _LONGEST


def _problem(row: Row, defect: str | None) -> dict[str, Any]:
    return _told(
        id=str(row["id"]),
        text=row.get("problem"),
        gold=_cut(row.get("expected_answer"), _LONGEST_ANSWER),
        solution=_cut(row.get("solution"), _LONGEST_SOLUTION),
        subject=row.get("subject"),
        level=None if row.get("level") is None else str(row["level"]),
        defect=defect,
    )


def _answer(row: Row, other: Row | None, limit: int) -> dict[str, Any]:
    known = other and "not_graded" not in (other["verdict"], row["verdict"])
    flipped = known and other and (other["verdict"] == "equal") != (row["verdict"] == "equal")
    return _told(
        sample=row.get("sample", 0),
        drawn=_drawn(row),
        verdict=row["verdict"],
        rule=row.get("rule"),
        extracted=_cut(row.get("extracted"), _LONGEST_ANSWER),
        response=_cut(row.get("response"), limit),
        tokens=row.get("num_tokens"),
        second=row.get("second"),
        truncated=row.get("finish_reason") == "length" or None,
        disputed=row.get("disputed") or None,
        boxes_differ=row.get("boxes_differ") or None,
        other=_answer(other, None, limit) if other and flipped else None,
    )


def _drawn(row: Row) -> str | None:
    """How a sampled answer was drawn; its seed has more digits than JavaScript keeps."""
    if not row.get("temperature"):
        return None
    return f"temperature {row['temperature']}, top_p {row.get('top_p')}, seed {row.get('seed')}"


def _told(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _cut(text: str | None, limit: int) -> str | None:
    """The beginning and the end of a longer text; the end has the answer."""
    if text is None or len(text) <= limit:
        return text
    end = limit * 2 // 3
    gap = f"\n\n[... {len(text) - limit:,} characters are in verdicts.jsonl alone ...]\n\n"
    return text[: limit - end] + gap + text[len(text) - end :]
