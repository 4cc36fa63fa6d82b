"""The report of a packed dataset in, one HTML page out that needs nothing beside itself.

Texts are those of rows, which nobody has vouched for: every one is escaped, and there are no
scripts. Colours follow the reader's light or dark setting.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from mcore_sft.data.encode.block import UNTRAINED
from mcore_sft.data.packs.trained_parts import ANSWERS, STOPPED, TAGS
from mcore_sft.data.report.figures import summary

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #fff; --ink: #1d1f21; --dim: #666a70;
  --line: #dddfe2; --trained: #12692e; --trained-back: #e2f4e6; --bar: #7d8794; }
@media (prefers-color-scheme: dark) { :root { --page: #131416; --card: #1c1e21; --ink: #e6e7e9;
  --dim: #9ba0a8; --line: #34373c; --trained: #74d68c; --trained-back: #17301e; --bar: #7b8592; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  margin-top: 1rem; padding: 1rem; }
.dim, summary span, figcaption { color: var(--dim); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .2rem 1.5rem .2rem 0; text-align: left; vertical-align: top; }
td, th + th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tbody + tbody tr:first-child > * { border-top: 1px solid var(--line); padding-top: .5rem; }
tbody tr:last-child > * { padding-bottom: .5rem; }
th[scope=row] { font-weight: normal; }
ul { list-style: none; margin: .3rem 0; padding: 0; }
.proof li { padding-left: 1.6rem; text-indent: -1.6rem; }
.proof li::before { color: var(--trained); content: "\\2713"; display: inline-block;
  font-weight: bold; text-indent: 0; width: 1.6rem; }
dl { display: grid; gap: .2rem 1.5rem; grid-template-columns: max-content 1fr; margin: .5rem 0; }
dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
pre, code { font: .85rem/1.5 ui-monospace, monospace; }
pre { border: 1px solid var(--line); border-radius: .4rem; margin: .4rem 0; max-height: 30rem;
  overflow: auto; overflow-wrap: anywhere; padding: .6rem .8rem; white-space: pre-wrap; }
pre.text { color: var(--dim); }
b { color: inherit; }
ins { background: var(--trained-back); color: var(--trained); text-decoration: none; }
details { margin: .4rem 0; }
summary { cursor: pointer; }
.charts, .pair { display: grid; gap: .5rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
figure { margin: .6rem 0 0; }
svg { display: block; font: 11px system-ui, sans-serif; width: 100%; }
svg text { fill: var(--dim); }
svg line { stroke: var(--line); }
@media (max-width: 40rem) { th, td { padding-right: .7rem; }
  td, th + th { white-space: normal; } th[scope=row] { overflow-wrap: anywhere; } }
.tokens rect { fill: var(--bar); }
.supervised rect { fill: var(--trained); }
"""


def page(report: Mapping[str, Any]) -> str:
    """The whole page of a report as `write_report` makes it."""
    splits: Mapping[str, Mapping[str, Any]] = report["splits"]
    body = [
        "<h1>Packed dataset</h1>",
        "<p class=dim>What went in, what came out, and what was found to hold for every example.",
        _section(
            "What the files prove", *(_proof(name, split, report) for name, split in splits.items())
        ),
        _section("Rows, and what an epoch shows", _counts(report)),
        _section("Sources", _sources(splits)),
        *(_lengths(name, split) for name, split in splits.items()),
        _section("What a model is asked", _prompt(report)),
        *(_examples(name, split) for name, split in splits.items()),
        *(_dropped(name, split) for name, split in splits.items()),
        _contamination(report),
        _section("What it was made of", _inputs(report["inputs"])),
    ]
    return (
        "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>Packed dataset</title>\n<style>{STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


def _section(title: str, *parts: str) -> str:
    return "\n".join([f"<section>\n<h2>{escape(title)}</h2>", *parts, "</section>"])


def _list(name: str, items: Iterable[str]) -> str:
    return f"<ul class={name}>" + "".join(f"<li>{item}" for item in items) + "</ul>"


def _proof(name: str, split: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    proof, supervised = split["proof"], split["lengths"]["supervised"]
    stops = ", ".join(f"<code>{_text(token)}</code>" for token in report["prompt"]["stop_tokens"])
    counts, trained = split["counts"], proof["trained"]
    without = counts["dropped"].get(UNTRAINED, 0)
    if not proof["stops"]:
        ends = "some examples were tokenized elsewhere; how they begin and end was not looked at"
    else:
        ends = (
            f"every example ends with a stop token that is trained: {stops}; so do "
            f"{trained[STOPPED]:,} of {trained[ANSWERS]:,} answers"
        )
    found = [
        f"every example has supervised tokens, at least {supervised['shortest']:,}; they are "
        f"{split['supervised_share']:.1%} of an epoch, and {without:,} rows had none",
        ends,
        *([_bos(proof)] if proof["stops"] else []),
        *(_kind(trained, kind) for kind in TAGS),
        f"every example is in a pack, whole, and no pack is longer than "
        f"{report['sequence_length']:,} tokens",
    ]
    return (
        f"<h3>{_text(name)}: all {proof['examples']:,} examples, read back from the files</h3>"
        + _list("proof", found)
    )


def _bos(proof: Mapping[str, Any]) -> str:
    if proof["with_bos"] is None:
        return "the tokenizer has no BOS token; none was looked for"
    without = proof["examples"] - proof["with_bos"]
    return (
        f"BOS is as the template writes it: {proof['with_bos']:,} examples begin with one, "
        f"{without:,} with none, and none with two"
    )


def _kind(trained: Mapping[str, int], kind: str) -> str:
    if kind not in trained:
        return f"{kind}: the tokenizer has no token that opens them, so they were not counted"
    return f"{kind}: {trained[kind]:,} trained tokens"


def _counts(report: Mapping[str, Any]) -> str:
    splits = {name: split["counts"] for name, split in report["splits"].items()}
    head = "".join(f"<th scope=col>{_text(name)}" for name in splits)
    bodies = (
        f"<tr><th scope=rowgroup colspan={len(splits) + 1}>{_text(title)}"
        + "".join(
            f"<tr><th scope=row>{_text(label)}" + "".join(f"<td>{figure}" for figure in figures)
            for label, figures in section.items()
        )
        for title, section in summary(splits, report["sequence_length"]).items()
    )
    return _table(f"<tr><th>{head}", "<tbody>".join(bodies))


def _table(head: str, body: str) -> str:
    return f"<div class=wide><table><thead>{head}<tbody>{body}</table></div>"


def _sources(splits: Mapping[str, Mapping[str, Any]]) -> str:
    keys = {"rows": "rows", "examples": "examples", "visits": "shown in an epoch"}
    head = "<tr><th>" + "".join(f"<th scope=col>{label}" for label in keys.values())
    bodies = (
        f"<tr><th scope=rowgroup colspan={len(keys) + 1}>{_text(name)}"
        + "".join(
            f"<tr><th scope=row>{_text(source['source'])}"
            + "".join(f"<td>{source[key]:,}" for key in keys)
            for source in split["sources"]
        )
        for name, split in splits.items()
    )
    return _table(head, "<tbody>".join(bodies))


def _lengths(name: str, split: Mapping[str, Any]) -> str:
    titles = {"tokens": "Tokens of an example", "supervised": "Supervised tokens of an example"}
    figures = []
    for kind, title in titles.items():
        of = split["lengths"][kind]
        usual = (
            f"median {of['median']:,}, mean {of['mean']:,}, {of['shortest']:,} to "
            f"{of['longest']:,}; 5% have {of['p5']:,} or fewer, 5% more than {of['p95']:,}"
        )
        chart = _chart(of["histogram"], of["step"], title)
        figures.append(
            f"<figure class={kind}><b>{title}</b>{chart}<figcaption>{usual}</figcaption></figure>"
        )
    return _section(f"Lengths: {name}", f"<div class=charts>{''.join(figures)}</div>")


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 170, 36, 20, 10, 20


def _chart(histogram: Sequence[int], step: int, title: str) -> str:
    """A histogram as SVG: bars that say what they count, and round numbers along both axes."""
    top, wide = max(histogram), (_WIDTH - _LEFT - _RIGHT) / len(histogram)
    high = _HEIGHT - _TOP - _BOTTOM
    total = sum(histogram)
    drawn = []
    grid = _grid_step(top)
    for level in range(0, top + 1, grid):
        y = _TOP + high * (1 - level / top)
        drawn.append(
            f"<line x1={_LEFT} x2={_WIDTH - _RIGHT} y1={y:.1f} y2={y:.1f} />"
            f"<text x={_LEFT - 5} y={y + 4:.1f} text-anchor=end>{_short(level)}</text>"
        )
    for i, count in enumerate(histogram):
        if count:
            tall = max(high * count / top, 1)
            drawn.append(
                f"<rect x={_LEFT + i * wide:.1f} y={_TOP + high - tall:.1f} "
                f"width={max(wide - 1, 0.5):.1f} height={tall:.1f}><title>{i * step + 1:,} to "
                f"{(i + 1) * step:,} tokens: {count:,} ({count / total:.1%})</title></rect>"
            )
    every = -(-len(histogram) // 4)
    for i in range(0, len(histogram) + 1, every):
        drawn.append(
            f"<text x={_LEFT + i * wide:.1f} y={_HEIGHT - 5} text-anchor=middle>{i * step:,}</text>"
        )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{escape(title)}">'
        + "".join(drawn)
        + "</svg>"
    )


def _grid_step(top: int) -> int:
    """A round step of which two to five make `top`."""
    power = int("1" + "0" * (len(str(top)) - 1))
    steps = (max(power // 5, 1), max(power // 2, 1), power, 2 * power)
    return next(step for step in steps if top < 5 * step)


def _short(number: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return str(number)


def _prompt(report: Mapping[str, Any]) -> str:
    prompt, stops = report["prompt"], " or ".join(map(_text, report["prompt"]["stop_tokens"]))
    return (
        f"<pre>{_text(prompt['text'])}</pre>"
        f"<p class=dim>The solution follows, then <code>{stops}</code>. Evaluation sends the same "
        "text, with a problem in place of <code>{problem}</code>.</p>"
    )


def _examples(name: str, split: Mapping[str, Any]) -> str:
    shown = (
        f"<h3>Example {one['example']:,}: {one['tokens']:,} tokens, "
        f"{one['supervised']:,} supervised</h3><pre class=text>"
        + "".join(_run(*run) for run in one["runs"])
        + "</pre>"
        for one in split["examples"]
    )
    legend = "<p class=dim><ins>What is learned</ins> is green, special tokens are <b>bold</b>.</p>"
    return _section(f"Whole examples: {name}", legend, *shown)


def _run(text: str, trained: bool, special: bool) -> str:
    shown = f"<b>{_text(text)}</b>" if special else _text(text)
    return f"<ins>{shown}</ins>" if trained else shown


def _dropped(name: str, split: Mapping[str, Any]) -> str:
    """Why rows were dropped, and some rows of each reason; nothing where none was."""
    counts = split["counts"]
    parts = []
    for reason, number in counts["dropped"].items():
        said = f"{_text(reason)} <span>{number:,} rows, {number / counts['rows']:.2%}</span>"
        shown = "".join(
            f"<p class=dim>{_text(_place_of(sample))}</p>"
            + (f"<pre>{_text(sample['text'])}</pre>" if sample["text"] else "")
            for sample in split["dropped"].get(reason, ())
        )
        parts.append(f"<details><summary>{said}</summary>{shown}</details>")
    return _section(f"Rows dropped: {name}", *parts) if parts else ""


def _place_of(sample: Mapping[str, str]) -> str:
    same_as = sample.get("same_as")
    return sample["where"] + (f", the same as {same_as}" if same_as else "")


def _contamination(report: Mapping[str, Any]) -> str:
    """What training was compared with, and the pairs that were found."""
    title, inputs = "Compared with benchmarks", report["inputs"]
    settings, found = inputs["data"]["contamination"], report["splits"]["train"]["contamination"]
    if not inputs["sources"].get("against"):
        return _section(title, "<p>Nothing: data.contamination.against names no benchmark.")
    names = ", ".join(_text(source["path"]) for source in inputs["sources"]["against"])
    what_then = (
        "Rows with such problems were dropped, but for those of a 13-gram alone"
        if settings["remove"]
        else "Nothing was dropped"
    )
    rules = (
        f"<p>Every training problem, and of a conversation every message of its user, with {names}."
        f"<p class=dim>Alike is: the same text (exact), the same but for case and white space "
        f"(normalized), a benchmark problem of fewer than 8 words as a part (contained), "
        f"{settings['threshold']:.0%} of a benchmark problem's 8-grams, or any 13-gram. "
        f"{what_then}.</p>"
    )
    if not found["pairs"]:
        return _section(title, rules, "<p>None is alike.")
    kinds = ", ".join(f"{number:,} {_text(kind)}" for kind, number in found["kinds"].items())
    told = f"<p>Pairs: {kinds}. The strongest {len(found['pairs'])}:</p>"
    return _section(title, rules, told, *map(_pair, found["pairs"]))


def _pair(pair: Mapping[str, Any]) -> str:
    sides = (
        ("in the data", pair["where"], pair["problem"]),
        ("in the benchmark", pair["benchmark"], pair["benchmark_problem"]),
    )
    shown = "".join(
        f"<div><p class=dim>{side}: {_text(where)}</p><pre>{_text(text)}</pre></div>"
        for side, where, text in sides
    )
    return (
        f"<details><summary>{_text(pair['kind'])} <span>{pair['overlap']:.0%} of "
        f"{_text(pair['benchmark'])} is in {_text(pair['where'])}</span></summary>"
        f"<div class=pair>{shown}</div></details>"
    )


def _inputs(inputs: Mapping[str, Any]) -> str:
    prompts, tokenizer = inputs["prompt"], inputs["tokenizer"]
    named = {
        key: prompts[key] if isinstance(prompts[key], str) else "(a file of its own)"
        for key in ("template", "instruction")
        if prompts.get(key) is not None
    }
    facts = {
        "tokenizer": f"{tokenizer['fingerprint']} ({tokenizer['vocab_size']:,} tokens)",
        **named,
        "prompt": prompts["fingerprint"],
    }
    listed = "".join(f"<dt>{_text(key)}<dd>{_text(value)}" for key, value in facts.items())
    rest = {key: value for key, value in inputs.items() if key not in ("prompt", "tokenizer")}
    dump = yaml.safe_dump(rest, sort_keys=False, allow_unicode=True, width=100)
    return (
        f"<dl>{listed}</dl><details><summary>sources and settings</summary>"
        f"<pre>{_text(dump)}</pre></details>"
    )


def _text(text: str) -> str:
    return escape(str(text))
