import base64
import gzip
import json
import re
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mcore_sft.evaluation.scores import report_page
from mcore_sft.evaluation.scores.report_page import page
from tests.evaluation.browser import PROGRAM, Browser, launched

Open = Callable[..., str]
in_browser = pytest.mark.skipif(not PROGRAM, reason="no Chromium is installed")


def share(hits: int, total: int) -> dict[str, object]:
    return {"percent": 100 * hits / total, "hits": hits, "total": total, "wilson95": [10.0, 90.0]}


REPORT = {
    "benchmark": {"name": "tiny", "source": "a file", "problems": 6, "fingerprint": "f1"},
    "score": {"symbolic_correct": share(2, 6), "no_answer": share(1, 6)},
    "model": {"folder": "/models/small", "files": {"config.json": "c1"}},
}


def row(number: int, verdict: str = "equal", **fields: object) -> dict[str, object]:
    return {
        "id": f"p{number}",
        "sample": 0,
        "problem": "What is $1+1$?",
        "expected_answer": "2",
        "response": r"It is \boxed{2}.",
        "extracted": "2",
        "verdict": verdict,
        "rule": "number",
        "finish_reason": "stop",
        "num_tokens": 7,
        "subject": None,
        "level": None,
    } | fields


ROWS = [
    row(0, subject="Counting & Probability", level=3),
    row(1, "different", subject="Algebra", level=3),
    row(2, "no_answer", extracted=None, rule="truncated", finish_reason="length"),
    row(3, "different", disputed=True, second="equal", rule="text"),
    row(4, response="find ME"),
    row(5, "timeout", rule="deadline"),
    row(0, "different", sample=1),
]


# --- the file itself ---------------------------------------------------------------------------


def unpacked(made: str) -> dict[str, list[dict[str, object]]]:
    (packed,) = re.findall(r"id=rows>([A-Za-z0-9+/=]*)</script>", made)
    content: dict[str, list[dict[str, object]]] = json.loads(
        gzip.decompress(base64.b64decode(packed))
    )
    return content


def test_a_report_that_says_little_is_a_page() -> None:
    made = page(REPORT, [{"id": "p", "verdict": "equal"}])
    assert "33.33%" in made
    assert "By subject" not in made


def test_the_counts_are_shown_and_lead_to_their_answers() -> None:
    full = REPORT | {
        "text": "a <form>",
        "by": {"subject": {"A & B": share(1, 2)}, "level": {"5": share(1, 2)}},
        "by_subject_level": {"A & B": {"5": share(1, 2)}},
        "lengths": [{"from": 0, "to": 10, **share(1, 2)}, {"from": 10, "to": None, **share(1, 4)}],
        "rules": {"different": {"number": 7}},
        "missing": {"no_box": 3},
        "gold_defects": [{"id": "p1", "reason": "boxes differ"}],
        "by_k": {
            str(k): {f"pass@{k}": {"percent": 9.5, "total": 2, "interval95": [1.0, 20.0]}}
            for k in (1, 2)
        },
    }
    made = page(full, ROWS)
    assert "a &lt;form&gt;" in made
    assert '<a href="#filter=all&amp;subject=A+%26+B&amp;level=5">50.0' in made
    assert "0 to 9" in made
    assert "10 or more" in made
    assert '<a href="#filter=all&amp;verdict=different&amp;rule=number">7</a>' in made
    assert '<a href="#filter=all&amp;verdict=no_answer&amp;rule=no_box">3</a>' in made
    assert "pass@k" in made
    assert [p.get("defect") for p in unpacked(made)["problems"][:2]] == [None, "boxes differ"]


def test_a_score_that_is_a_mean_over_problems_has_its_interval() -> None:
    mean = {"percent": 41.5, "total": 30, "standard_error": 2.0, "interval95": [37.6, 45.4]}
    made = page(REPORT | {"score": {"symbolic_correct": mean}}, ROWS)
    assert "41.50% <small>95% interval 37.6 to 45.4%, over 30 problems" in made


def test_the_headline_leads_to_what_it_counts() -> None:
    counted = {"equal": 2, "different": 2, "timeout": 1, "no_answer": 1, "not_graded": 1}
    more = {"verdicts": counted, "not_graded": 1, "truncated": 1, "disputed": ["p3"]}
    headline = page(REPORT | more, ROWS).partition("<section")[0]
    assert re.findall(r"<dt>([^<]*)<dd><a href=\"#([^\"]*)\">([^<]*)", headline) == [
        ("wrong", "filter=wrong", "3"),
        ("no answer", "filter=no_answer", "16.67%"),
        ("not graded, in no score", "filter=all&amp;verdict=not_graded&amp;sample=any", "1"),
        ("truncated", "filter=truncated", "1"),
        ("disputed", "filter=disputed", "1"),
    ]


def test_what_it_was_made_of_comes_last_and_overwrites_nothing() -> None:
    made = page(
        REPORT
        | {
            "engine": {"engine": "server", "model": "served-name", "torch": "2.9+theirs"},
            "grader": {"kind": "mathematics", "version": 7},
            "versions": {"mcore_sft": "0.1", "torch": "2.13+ours"},
            "text": "the table",
            "configuration": "0123456789abcdef",
        },
        ROWS,
    )
    shown, _, last = made.partition("<h2>What it was made of</h2>")
    for said in (
        "/models/small",
        "served-name",
        "2.9+theirs",
        "2.13+ours",
        "<dt>mcore_sft",
        "<dd>7",
    ):
        assert said in last
    hashes = last.partition("<summary>hashes")[2].partition("</section>")[0]
    for digest in ("f1", "c1", "0123456789abcdef"):
        assert digest in hashes
        assert digest not in shown.rpartition("</style>")[2]
    assert "<h2>" not in last.partition("<script")[0]


UNSEEN = "\u202e\u2066\u2069\u200f\u061c\u200b\ufeff\x1b\x00\u2028\xad"


def test_characters_that_cannot_be_seen_are_shown_by_their_numbers() -> None:
    numbers = "".join(f"\u27e8U+{ord(sign):04X}\u27e9" for sign in UNSEEN)
    fields = ("problem", "expected_answer", "solution", "response", "extracted", "subject", "rule")
    odd = row(0, **dict.fromkeys(fields, f"a{UNSEEN}\tb\n"))
    benchmark = {"name": f"x{UNSEEN}", "source": UNSEEN, "problems": 1}
    by = {"subject": {f"a{UNSEEN}": share(1, 1)}}
    made = page(REPORT | {"benchmark": benchmark, "by": by}, [odd], [odd | {"verdict": "unsafe"}])
    told = unpacked(made)
    shown = made.rpartition("</style>")[2].partition("<script")[0]
    assert not set(UNSEEN) & set(shown)
    for part in (told["problems"][0], told["rows"][0], told["rows"][0]["other"]):
        assert not set(UNSEEN) & set("".join(map(str, part.values())))  # type: ignore[attr-defined]
    assert told["problems"][0]["solution"] == f"a{numbers}\tb\n"
    assert f"<title>x{numbers}: small" in made


def test_how_a_sampled_answer_was_drawn_is_shown() -> None:
    drawn = {"sample": 1, "temperature": 0.7, "top_p": 0.95, "seed": 2**62 + 1}
    greedy = {"temperature": 0.0, "top_p": 1.0, "seed": 0}
    told = unpacked(page(REPORT, [row(0, **greedy), row(0, **drawn)]))["rows"]
    assert [one.get("drawn") for one in told] == [
        None,
        "temperature 0.7, top_p 0.95, seed 4611686018427387905",
    ]


def test_text_of_a_model_stands_in_no_markup() -> None:
    evil = "</script><img src=x onerror=alert(1)>\ud800"
    made = page(
        REPORT, [row(0, response=evil, extracted=evil, problem=evil)], [row(0, "different")]
    )
    assert "onerror" not in made
    assert unpacked(made)["rows"][0]["response"] == evil
    made.encode()


def test_names_are_escaped_and_the_page_is_utf8() -> None:
    odd = REPORT | {"benchmark": REPORT["benchmark"] | {"name": "<b>\ud800"}}  # type: ignore[operator]
    made = page(odd, ROWS)
    assert "<title>&lt;b&gt;?: small</title>" in made
    made.encode()


def test_long_responses_keep_their_ends_and_all_keep_to_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report_page, "_ALL", 1_000)
    responses = ["short", "a" * 700 + "z" * 700, "b" * 600]
    made = page(REPORT, [row(i, response=text) for i, text in enumerate(responses)])
    kept = [str(answer["response"]) for answer in unpacked(made)["rows"]]
    assert kept[0] == "short"
    assert kept[1].startswith("aaa")
    assert kept[1].endswith("zzz")
    assert "903 characters are in verdicts.jsonl" in kept[1]
    assert sum(len(text) for text in kept) < 1_000 + 2 * 70


# --- in a browser ------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with launched(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Open:
    """Opens a page at `#location`; what it is after its scripts ran, they themselves apart."""

    def opened(made: str, location: str = "") -> str:
        file = tmp_path / "report.html"
        file.write_text(made, encoding="utf-8")
        browser.open(f"{file.as_uri()}#{location}")
        shown: str = browser.evaluate("document.documentElement.outerHTML")
        return shown.partition("<script type=")[0]

    return opened


def listed(shown: str) -> list[str]:
    return re.findall(r"<b>(p\d+)</b>", shown)


@in_browser
@pytest.mark.parametrize(
    ("location", "found"),
    [
        ("", ["p1", "p3", "p5"]),
        ("filter=all", ["p0", "p1", "p2", "p3", "p4", "p5"]),
        ("filter=right", ["p0", "p4"]),
        ("filter=wrong", ["p1", "p3", "p5"]),
        ("filter=no_answer", ["p2"]),
        ("filter=truncated", ["p2"]),
        ("filter=disputed", ["p3"]),
        ("filter=flipped", ["p1", "p4"]),
        ("filter=wrong&sample=any", ["p1", "p3", "p5", "p0"]),
        ("sample=1", ["p0"]),
        ("verdict=different&rule=text", ["p3"]),
        ("subject=Algebra", ["p1"]),
        ("verdict=timeout", ["p5"]),
        ("filter=all&subject=Counting+%26+Probability&level=3", ["p0"]),
        ("filter=all&find=find+me", ["p4"]),
        ("filter=constructor", ["p1", "p3", "p5"]),
    ],
)
def test_the_location_chooses_what_is_listed(opened: Open, location: str, found: list[str]) -> None:
    other = [row(0), row(1), row(4, "different"), row(3, "no_answer")]
    assert listed(opened(page(REPORT, ROWS, other), location)) == found


@in_browser
def test_ten_answers_are_a_page(opened: Open) -> None:
    made = page(REPORT, [row(number) for number in range(12)])
    assert listed(opened(made, "page=2")) == ["p10", "p11"]


@in_browser
def test_mathematics_is_typeset_and_what_cannot_be_stays_source(opened: Open) -> None:
    response = "\n".join(
        [
            r"$\frac{1}{2}$ and \(x_1\), \[y^2\] and $$z$$",
            r"\begin{align*} a &= b \\ c &= d \end{align*}",
            r"so \boxed{\frac{3}{4}}",
            r"costs $5 and $6, or \$7",
            r"$\frac{1}{$ and $\undefined{1}$ and $\def\a{1}\a$",
            r"$2\\cdot 3$",
            "```python\nprint('$1$')\n```",
        ]
    )
    shown = opened(page(REPORT, [row(0, response=response)]))
    said = shown.partition("<h3>Response</h3>")[2]
    assert said.count("<math") == 6
    assert "<mfrac><mn>1</mn><mn>2</mn></mfrac>" in said
    for source in ("costs $5 and $6, or $7", r"$\frac{1}{$", r"$\undefined{1}$", r"$\def\a"):
        assert source in said
    assert r"$2\\cdot 3$" in said
    assert "print('$1$')" in said
    assert "<math" not in opened(page(REPORT, [row(0, response=response)]), "source=1")


SOLVED = [
    row(
        number,
        "different",
        problem=r"What is $\sqrt{9800}$ and $\left(\frac{\frac12}{3}\right)$? " + "Think. " * 200,
        expected_answer=r"70\sqrt{2}",
        extracted=r"\left(\frac{1}{2}, \sqrt[3]{\frac45}\right)",
        solution=r"As $\left[\frac12\right]$ is $\begin{pmatrix} 1 \\ 2 \end{pmatrix}$. " * 30,
        response="It is. " * 300,
    )
    for number in range(3)
]


@in_browser
def test_roots_and_brackets_are_drawn_whatever_fonts_are_installed(
    opened: Open, browser: Browser
) -> None:
    """The page brings the font: a system has none by a known name, or an old one."""
    opened(page(REPORT, SOLVED))
    browser.evaluate("document.fonts.ready.then(() => 0)")
    roots = browser.evaluate(
        "[...document.querySelectorAll('msqrt, mroot')].map((root) => [root, root.children[0]]"
        ".map((each) => each.getBoundingClientRect().width))"
    )
    assert len(roots) == 9
    assert all(root > content + 4 for root, content in roots)
    brackets = browser.evaluate(
        "[...document.querySelectorAll('mo[stretchy=true]')].filter((mo) => '([)]'.includes("
        "mo.textContent)).map((mo) => [mo, mo.parentElement.querySelector('mfrac, mtable')]"
        ".map((each) => each.getBoundingClientRect().height))"
    )
    assert len(brackets) > 100
    assert all(bracket > 0.8 * content for bracket, content in brackets)
    browser.call("DOM.enable")
    browser.call("CSS.enable")
    document = browser.call("DOM.getDocument")["root"]["nodeId"]
    numbers = browser.call("DOM.querySelectorAll", nodeId=document, selector="mn")["nodeIds"]
    for number in numbers[:20]:
        used = browser.call("CSS.getPlatformFontsForNode", nodeId=number)["fonts"]
        assert used
        assert all(font["isCustomFont"] for font in used)


@in_browser
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (375, 800)])
def test_the_first_screen_shows_what_is_wrong_with_its_gold_and_solution(
    opened: Open, browser: Browser, width: int, height: int
) -> None:
    more = {"verdicts": {"different": 3}, "not_graded": 1, "truncated": 1, "mean_tokens": 300.0}
    browser.resize(width, 20_000)
    opened(page(REPORT | more | {"disputed": ["p1"], "text": "the table"}, SOLVED))
    browser.resize(width, height)
    tops = browser.evaluate(
        "Object.fromEntries([...document.querySelector('article').querySelectorAll('h3')]"
        ".map((each) => [each.textContent, each.getBoundingClientRect().bottom]))"
    )
    browser.resize(1000, 20_000)
    assert list(tops) == [
        "Gold answer", "Extracted answer", "Problem", "Gold solution", "Response"
    ]  # fmt: skip
    assert all(tops[name] < height - 40 for name in list(tops)[:4])


@in_browser
@pytest.mark.parametrize("width", [1280, 375])
def test_bars_are_never_cut(opened: Open, browser: Browser, width: int) -> None:
    shares = (60, 83, 100, 0)
    lengths = [
        {"from": 1_000 * n, "to": 1_000 * n + 1_000, **share(hits, 100)}
        for n, hits in enumerate(shares)
    ]
    browser.resize(width, 20_000)
    opened(page(REPORT | {"lengths": lengths}, ROWS))
    boxes = browser.evaluate(
        "[...document.querySelectorAll('td.bar')].map((cell) => ["
        "cell.querySelector('rect'), cell.querySelector('svg'), cell.closest('.wide')]"
        ".map((each) => each.getBoundingClientRect()).map(({ left, right }) => [left, right]))"
    )
    sideways = browser.evaluate(
        "[document.documentElement, ...document.querySelectorAll('.wide')]"
        ".map((each) => each.scrollWidth - each.clientWidth)"
    )
    browser.resize(1000, 20_000)
    assert sideways == [0] * len(sideways)
    assert len(boxes) == len(shares)
    for hits, ((start, end), (left, right), (_, edge)) in zip(shares, boxes, strict=True):
        assert right <= edge
        assert right - left >= 40
        assert abs((end - start) / (right - left) - hits / 100) < 0.01


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and what was asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@in_browser
def test_hostile_answers_are_inert(opened: Open, listener: tuple[str, list[str]]) -> None:
    address, asked = listener
    payloads = [
        f"</script><script>document.title='owned'; fetch('{address}/script')</script>",
        f"<img src={address}/image onerror=\"document.title='owned'\"><iframe src={address}/frame>",
        f"<style>@import '{address}/style';</style><link rel=stylesheet href={address}/link>",
        r"$\href{javascript:document.title='owned'}{x}$",
        rf"$\url{{{address}/url}}$ $\includegraphics{{{address}/graphics}}$",
        rf"$\style{{background:url({address}/css)}}{{x}}$ $\htmlId{{rows}}{{x}}$",
        rf"$\html{{<img src={address}/html>}}$ $\text{{<img src={address}/text onerror=1>}}$",
        rf"$\color{{red;background:url({address}/color)}} x$ $\textcolor{{url({address})}}{{x}}$",
        "[click](javascript:alert(1)) <a href='javascript:alert(1)' onclick=alert(1)>x</a>",
    ]
    rows = [
        row(i, problem=evil, response=evil, extracted=evil, expected_answer=evil, rule=evil)
        for i, evil in enumerate(payloads)
    ]
    shown = opened(page(REPORT, rows))
    found = Elements(shown)
    assert listed(shown) == [f"p{i}" for i in range(len(payloads))]
    assert "<title>tiny: small</title>" in shown
    assert not found.tags & {"script", "img", "iframe", "link", "object", "embed", "image"}
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert all((value or "").startswith("#") for name, value in found.attributes if name == "href")
    assert not [name for name, _ in found.attributes if name in ("src", "srcdoc", "action")]
    assert asked == []


@in_browser
def test_the_policy_holds_even_where_markup_would_get_through(
    opened: Open, listener: tuple[str, list[str]]
) -> None:
    address, asked = listener
    injected = (
        f"<img src={address}/image onerror=\"document.title='owned'\">"
        f"<script>document.title='owned'; fetch('{address}/script')</script>"
        f"<script src={address}/file></script><style>@import '{address}/style';</style>"
        f"<link rel=stylesheet href={address}/link><iframe src={address}/frame></iframe><h1>"
    )
    made = page(REPORT, ROWS).replace("<h1>", injected)
    shown = opened(made)
    assert "<title>tiny: small</title>" in shown
    assert asked == []
    # without the policy the same page is heard: the listener listens
    policy = re.compile(r"<meta http-equiv=Content-Security-Policy[^>]*>")
    opened(policy.sub("", made))
    assert "/image" in asked


@in_browser
def test_formulas_without_end_do_not_stop_the_page(opened: Open) -> None:
    bombs = [
        "$" * 50_000,
        r"\[" * 25_000,
        r"\boxed{" * 7_000,
        r"\boxed{{a" * 5_000,
        "$" + r"\frac{" * 400 + "$",
        "$" + "{" * 2_900 + "$",
        "$" + r"\left(" * 480 + "$",
        r"$\newcommand\a{xx}" + r"\a" * 1_000 + "$",
        r"$\kern-99999em x \rule{1e9em}{1e9em}$",
        "```" * 10_000,
        r"\begin{align}" * 3_000,
    ]
    rows = [row(i, response=bomb, extracted=bomb[:3_000]) for i, bomb in enumerate(bombs)]
    made = page(REPORT, rows)
    assert listed(opened(made)) == [f"p{i}" for i in range(10)]
    assert listed(opened(made, "page=2")) == ["p10"]
