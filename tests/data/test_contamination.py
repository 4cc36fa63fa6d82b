import json
import pickle
import re

import pytest

from mcore_sft.config import SourceConfig
from mcore_sft.data.errors import DataError
from mcore_sft.data.selection import contamination
from mcore_sft.data.selection.contamination import Contamination, read_benchmarks
from mcore_sft.data.sources.survey import survey

WORDS = [chr(ord("a") + i) * 3 for i in range(14)]
"""aaa, bbb, ccc, ..."""


def kinds(benchmark, problem, **settings):
    found = Contamination([benchmark], **settings).check([problem])
    return [(finding.kind, round(finding.overlap, 3)) for finding in found]


def text(*changed, count=14):
    """`count` words; those at the positions `changed` are others."""
    return " ".join("other" if i in changed else word for i, word in enumerate(WORDS[:count]))


@pytest.mark.parametrize(
    ("benchmark", "problem", "expected"),
    [
        ("What is $1+1$?", "What is $1+1$?", [("exact", 1)]),
        ("What is $1+1$?", " what is\n $1 + 1$ ?\n", [("normalized", 1)]),
        ("What is $1+1$?", "What is $1-1$?", []),  # three words: no n-gram
        (text(count=7), "Now, " + text(count=7) + " more", [("contained", 1)]),
        ("What is $2+2$?", "Solve this.\n\nWHAT is $2 + 2$ ? Explain.", [("contained", 1)]),
        ("What is $2+2$?", "What is $2-2$?", []),  # the same words, another sign
        ("What is $2+2$?", "What is $2+2$, and then?", []),
        ("Is $12+3$ even?", "Is $12+34$ even?", []),
        ("Is 2+2=4", "Is 2+2=4?", [("contained", 1)]),  # six words and signs
        ("2+2=4", "Is 2+2=4?", []),  # five
        ("$+-*/=$", "Is $+-*/=$ fine?", []),  # no word
        (text(count=8), text(count=8) + " more", [("8-gram", 1)]),
        (text(count=8) + " more", text(count=8), []),  # one 8-gram of two
        (text(count=12), "Now, " + text(count=12).upper() + "?", [("8-gram", 1)]),
        (text(13), text(), [("13-gram", 0.5)]),  # six 8-grams of seven
        (text(0, 13), text(), []),  # twelve words in a row
        ("", "", [("exact", 1)]),
    ],
)
def test_kinds(benchmark, problem, expected):
    assert kinds(benchmark, problem) == expected


def test_threshold_is_a_share_of_the_benchmark_problems_own_eight_grams():
    benchmark, problem = text(count=12), "before " * 20 + text(11, count=12)
    assert kinds(benchmark, problem, threshold=0.8) == [("8-gram", 0.8)]
    assert kinds(benchmark, problem, threshold=0.81) == []
    assert kinds(problem, benchmark, threshold=0.8) == []


def test_a_repeated_n_gram_counts_once():
    chant = "la " * 30  # one 8-gram; with a word after it, two
    assert kinds(chant + "end", "la " * 8, threshold=0.5) == [("8-gram", 0.5)]
    assert kinds(chant + "end", "la " * 8, threshold=0.51) == []


@pytest.mark.parametrize(
    "written",
    ["x_1 + 22y = \\frac{3}{4}", "Ünïcode Straße 5", "".join(map(chr, range(128))), "a\x1cb", ""],
)
def test_words_of_ascii_are_those_of_any_text(written):
    anywhere = re.findall(contamination._WORD, written.casefold())
    words, end = [word.encode() for word in anywhere], contamination._END
    assert contamination._words([written, written + " é"]) == [
        *words,
        end,
        *words,
        "é".encode(),
        end,
    ]


def test_chinese_has_no_spaces_and_has_n_grams_all_the_same():
    asked = "已知函数在区间上单调递增求实数的取值范围"
    assert kinds(asked, f"例题 {asked}。") == [("8-gram", 1)]


def test_one_finding_for_each_pair_with_both_texts():
    benchmark = [text(), text() + " more", "something else", text()]
    check = Contamination(benchmark).check
    found = check(["nothing", text(), text()])
    assert {finding.problem for finding in found} == {text()}
    assert [(finding.benchmark_problem, finding.kind) for finding in found] == [
        (text(), "exact"),
        (text() + " more", "13-gram"),
    ]
    assert check([]) == []


def test_a_pickled_copy_finds_the_same():
    made = Contamination([text(), "What is $1+1$?"])
    copy = pickle.loads(pickle.dumps(made))
    problems = [text(13), "what is $1 + 1$?"]
    assert copy.check(problems) == made.check(problems) != []


def surveyed(file, problems):
    """A benchmark of these problems, as a source."""
    file.write_text("".join(json.dumps({"problem": problem}) + "\n" for problem in problems))
    source = SourceConfig(path=file.name, problem="problem")
    return survey(source, root=file.parent, alone=True)


def test_benchmarks_are_read_with_the_place_of_each_problem(tmp_path):
    one = surveyed(tmp_path / "one.jsonl", ["a", "b", "a"])
    two = surveyed(tmp_path / "two.jsonl", ["b", "c"])
    assert read_benchmarks([one, two]) == {
        "a": f"{tmp_path}/one.jsonl:1",
        "b": f"{tmp_path}/one.jsonl:2",
        "c": f"{tmp_path}/two.jsonl:2",
    }


@pytest.mark.parametrize("others", [[], ["a"]])
def test_benchmark_without_a_problem_is_an_error(others, tmp_path):
    some = [surveyed(tmp_path / f"{name}.jsonl", [name]) for name in others]
    empty = surveyed(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match=r"'empty\.jsonl': it holds no"):
        read_benchmarks([*some, empty])
