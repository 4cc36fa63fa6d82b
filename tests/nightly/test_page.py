"""The page says what is not well, since when and where; what is written into it stays text."""

import re
import time
from html.parser import HTMLParser

import pytest

from nightly import history, page
from tests.nightly import sample


def written(folder, *records):
    for record in records:
        history.append(folder / "history.jsonl", record)
    page.write(folder / "history.jsonl", folder / "page.html")
    return (folder / "page.html").read_text()


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nightly")
    sample.write(folder)
    return written(folder)


def test_what_broke_since_when_and_at_which_step_comes_first(shown):
    top = shown[: shown.index("All benchmarks")]
    assert "<title>Nightly: 1 failed, 1 crashed of 3 benchmarks</title>" in top
    assert "loss departs at step 13" in top
    assert "<b>step 13</b>" in top
    since, good = (sample.record(number).commit[:9] for number in (27, 26))
    assert top.index(since) < top.index("3 in a row") < top.index(good)
    assert "<dt>narrowed<dd>goes away in fp32, stays in one process<" in top
    assert "<dt>commits<dd>one of 4 commits after a" in top
    assert "train: exit code 1" in top
    assert "math_dp2" not in top


def test_curve_is_marked_where_it_departs(shown):
    assert shown.count(">departs at step 13</text>") == 3


def test_what_is_written_into_it_stays_text_and_nothing_is_loaded(tmp_path):
    evil = "</pre><script>alert(1)</script>\"'"
    text = written(
        tmp_path,
        sample.record(
            0,
            evil,
            tier=evil,
            commit=evil,
            date=evil,
            commit_time=evil,
            machine={evil: evil},
            outcome="crashed",
            crash=evil,
            narrowed=evil,
            commits=evil,
            findings=(sample.Finding(gate=evil, passed=False, sentence=evil),),
        ),
    )
    seen = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: seen.append((tag, dict(attributes)))
    parser.feed(text)
    assert "script" not in {tag for tag, _ in seen}
    assert not [found for _, found in seen if found.keys() & {"src", "onload", "style"}]
    assert all(found["href"].startswith("#") for tag, found in seen if tag == "a")
    assert all(found.get("aria-label") for tag, found in seen if tag == "svg")


def test_no_record_is_said(tmp_path):
    assert "holds no record yet" in written(tmp_path)


def test_one_record(tmp_path):
    text = written(tmp_path, sample.record(0))
    assert "<h1><span class=passed aria-hidden=true>\u2713</span> 1 benchmark passed" in text


def test_a_benchmark_that_was_not_run_again_is_not_passed_over(tmp_path):
    text = written(tmp_path, sample.record(0, "left"), sample.record(1, "other"))
    assert "<h1><span class=crashed" in text
    assert "1 not run at the newest commit of 2 benchmarks" in text


def test_numbers_beside_a_chart_fit_there(tmp_path):
    records = [sample.record(n, figures={"final_loss": 4.0 * 1000**n}) for n in range(12)]
    text = written(tmp_path, *records)
    levels = re.findall(r"text-anchor=end>([-0-9.,e+]+)</text>", text)
    assert "2e+33" in levels
    assert max(map(len, levels)) <= 8


def test_a_curve_that_is_gone_and_a_torn_line_are_said(tmp_path):
    night = sample.record(0, curve="gone.json")
    history.append(tmp_path / "history.jsonl", night)
    with (tmp_path / "history.jsonl").open("a") as stream:
        stream.write('{"tier"')
    text = written(tmp_path)
    assert "The curve is not shown" in text
    assert "history.jsonl:2 is ignored" in text


def test_of_many_records_the_last_hundred_are_drawn(tmp_path):
    lines = [sample.record(number).to_json() for number in range(2000)]
    (tmp_path / "history.jsonl").write_text("\n".join(lines) + "\n")
    began = time.monotonic()
    text = written(tmp_path)
    assert time.monotonic() - began < 5
    assert text.count("<circle") == 5 * 100
    assert "100 of 2000 records" in text
