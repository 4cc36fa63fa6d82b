import json
import pickle

import pytest

from mcore_sft.config import ConfigError, parse_section
from mcore_sft.data.errors import DataError
from mcore_sft.data.selection.filters import FilterConfig, Filters, Row, trim_prefix, trim_solutions


def dropped_by(row, count_tokens=None, **options):
    """The filter that drops the row, or None."""
    made = Filters(FilterConfig(**options), count_tokens).apply([row])[0]
    assert isinstance(made, str | Row)
    return made if isinstance(made, str) else None


@pytest.mark.parametrize(
    ("solution", "by_nemo_skills", "balanced"),
    [
        (r"He had \boxed{3} and \boxed{2}", True, True),
        (r"\boxed{3} and again \boxed{3}", True, True),
        (r"She had \boxed{6}", False, False),
        (r"\boxed{\frac{1}{2}}", False, False),
        (r"\boxed{\frac{1}{2}} \boxed{\frac{1}{2}}", True, True),
        (r"\boxed{\boxed{3}}", False, False),
        ("boxed boxed 42", False, False),
        ("", False, False),
        (r"\boxed{\text{größe } x} \boxed{\text{größe } y}", True, True),
        # What NeMo-Skills' pattern sees otherwise.
        (r"\boxed{\text{a}, \boxed{3}}", True, False),
        (r"Put it in \boxed{}. It is \boxed{3}", True, False),
        (r"\boxed {3} and \boxed {4}", False, True),
        (r"\boxed{3 and \boxed{4}", False, False),
        (r"\boxed{3 and \boxed{4} and \boxed{5}", True, True),
        (r"\boxed{\{1, 2\}} \boxed{\}}", True, True),
        (r"\boxed{3\boxed{4", False, False),
        (r"\boxed 3 \boxed 4", False, False),
        (r"\boxed{3} for {x}, \boxed 4", False, False),
    ],
)
def test_drop_multi_boxed(solution, by_nemo_skills, balanced):
    row = Row("", solution)
    assert dropped_by(row, drop_multi_boxed=False) is None
    assert (dropped_by(row, drop_multi_boxed=True) == "drop_multi_boxed") is by_nemo_skills
    assert (dropped_by(row, drop_multi_boxed="balanced") == "drop_multi_boxed") is balanced


@pytest.mark.parametrize(
    ("solution", "expected"),
    [
        ("My solution:\nIt is 3", "It is 3"),
        ("My solution:\nMy solution:\nIt is 3", "My solution:\nIt is 3"),
        ("My solution: It is 3", "My solution: It is 3"),
        (" My solution:\nIt is 3", " My solution:\nIt is 3"),
        ("my solution:\nIt is 3", "my solution:\nIt is 3"),
        ("My solution:\r\nIt is 3", "My solution:\r\nIt is 3"),
        ("My solution:\n", ""),
        ("", ""),
    ],
)
def test_trim_prefix(solution, expected):
    assert trim_prefix(Row("p", solution)) == Row("p", expected)


SAME = ...


@pytest.mark.parametrize(
    ("solution", "by_nemo_skills", "balanced"),
    [
        ("Ends at \\boxed{0}\nThis is useless.", "Ends at \\boxed{0}", SAME),
        ("It is \\boxed{7} after all", "It is \\boxed{7} after all", SAME),
        ("So\n\n\\boxed{7}$ dollars. \n more\nand more", "So\n\n\\boxed{7}$ dollars. ", SAME),
        ("In \\boxed{7\n5} lines\nand after", "In \\boxed{7\n5} lines", SAME),
        ("\\boxed{\\frac{1}{2}} yes\nno", "\\boxed{\\frac{1}{2}} yes", SAME),
        ("\\boxed{1}\nor \\boxed{2}\nno", "\\boxed{1}\nor \\boxed{2}", SAME),
        ("\\boxed{\u00e9\u4e2d}\r\nno", "\\boxed{\u00e9\u4e2d}\r", SAME),
        ("\\boxed{3}\n", "\\boxed{3}", SAME),
        ("no box\nat all", "no box\nat all", SAME),
        ("boxed{3}\nno", "boxed{3}\nno", SAME),
        ("\\[\n x = \\boxed{4} \\]\nno", "\\[\n x = \\boxed{4} \\]", SAME),
        ("", "", SAME),
        # A formula that stands open.
        ("\\[\n\\boxed{4}\n\\]\nno", "\\[\n\\boxed{4}", "\\[\n\\boxed{4}\n\\]"),
        ("$$\n\\boxed{4}\n$$ end\nno", "$$\n\\boxed{4}", "$$\n\\boxed{4}\n$$ end"),
        ("$$\n\\boxed{4}\n$$", "$$\n\\boxed{4}", "$$\n\\boxed{4}\n$$"),
        (
            "\\[\\begin{aligned}a\\\\[2pt]\n\\boxed{4}\n\\end{aligned}\n\\]\nno",
            "\\[\\begin{aligned}a\\\\[2pt]\n\\boxed{4}",
            "\\[\\begin{aligned}a\\\\[2pt]\n\\boxed{4}\n\\end{aligned}\n\\]",
        ),
        ("\\[ \\boxed{4}\nnever closed", "\\[ \\boxed{4}", SAME),
        ("\\] \\[1\\] \\boxed{4}\nno \\[x\\]\nno", "\\] \\[1\\] \\boxed{4}", SAME),
        # A last box that is broken, spaced or empty.
        ("\\boxed{3}\nor \\boxed{4\nno", "\\boxed{3}\nor \\boxed{4\nno", "\\boxed{3}"),
        ("\\boxed {3}\nno", "\\boxed {3}\nno", "\\boxed {3}"),
        ("\\boxed{3}\nby \\boxed 4\nno", "\\boxed{3}\nby \\boxed 4\nno", "\\boxed{3}"),
        ("\\boxed{3}\nas \\boxed{}\nno", "\\boxed{3}\nas \\boxed{}", "\\boxed{3}"),
        ("\\boxed{\\{1, 2)}\nno}\nno", "\\boxed{\\{1, 2)}\nno}", "\\boxed{\\{1, 2)}"),
    ],
)
def test_trim_solutions(solution, by_nemo_skills, balanced):
    assert trim_solutions(Row("p", solution)) == Row("p", by_nemo_skills)
    expected = by_nemo_skills if balanced is SAME else balanced
    assert trim_solutions(Row("p", solution), way="balanced") == Row("p", expected)


@pytest.mark.parametrize("way", [True, "balanced"])
@pytest.mark.parametrize(
    "text", ["\\boxed{" * 50_000, "\\boxed{a " * 20_000 + "}" * 20_000, "{" * 200_000 + "\\boxed{"]
)
def test_boxes_without_end_come_to_an_end(text, way):
    made = Filters(FilterConfig(drop_multi_boxed=way, trim_solutions=way)).apply([Row("", text)])
    assert made == [Row("", text)]


@pytest.mark.parametrize(
    ("votes", "total", "options", "kept"),
    [
        (3, 8, {}, True),
        (3, 8, {"min_majority_votes": 3}, True),
        (2, 8, {"min_majority_votes": 3}, False),
        (4, 8, {"min_majority_percentage": 0.5}, True),
        (3, 8, {"min_majority_percentage": 0.5}, False),
        (0, 0, {"min_majority_percentage": 0.5}, True),
        (None, 8, {"min_majority_votes": 3}, True),
        (2, None, {"min_majority_votes": 3}, True),
    ],
)
def test_majority_filter(votes, total, options, kept):
    row = Row("p", "s", votes, total)
    reason = None if kept else "majority_filter"
    assert dropped_by(row, majority_filter=True, **options) == reason


@pytest.mark.parametrize(
    ("solution", "contains", "missing"),
    [
        ("My solution\nSyntaxError", True, True),
        ("Timed out <think> </think>", True, False),
        ("<think>only one", False, True),
        ("<think></think>", False, False),
        ("Timed.out", False, True),
        ("", False, True),
    ],
)
def test_plain_strings(solution, contains, missing):
    row = Row("Timed out <think> </think>", solution)
    strings = ("Timed out", "SyntaxError")
    assert (dropped_by(row, drop_if_contains=strings) == "drop_if_contains") is contains
    strings = ("<think>", "</think>")
    assert (dropped_by(row, drop_if_missing=strings) == "drop_if_missing") is missing


def words(texts):
    return [len(text.split()) for text in texts]


@pytest.mark.parametrize(
    ("problem", "solution", "reason"),
    [
        ("one two", "one two three", None),
        ("one", "one two three", "remove_len_outlier_problems"),
        ("", "one two three", "remove_len_outlier_problems"),
        ("one two three four", "one two three", "remove_len_outlier_problems"),
        ("one two three", "one two", "remove_len_outlier_solutions"),
        ("one two three", "one two three four", None),
        ("one two three", "one two three four five", "remove_len_outlier_solutions"),
    ],
)
def test_len_outliers(problem, solution, reason):
    options = {
        "remove_len_outlier_problems": True,
        "min_problem_length": 2,
        "max_problem_length": 3,
        "remove_len_outlier_solutions": True,
        "min_solution_length": 3,
        "max_solution_length": 4,
    }
    assert dropped_by(Row(problem, solution), words, **options) == reason


def test_min_length_in_characters_is_for_solutions_alone():
    options = {
        "remove_len_outlier_problems": True,
        "min_problem_length": 2,
        "remove_len_outlier_solutions": True,
        "min_solution_length": 5,
        "use_chars_for_min_length": True,
    }
    assert dropped_by(Row("a b", "12345"), words, **options) is None
    assert dropped_by(Row("a b", "1 3 "), words, **options) == "remove_len_outlier_solutions"
    assert dropped_by(Row("abcdef", "12345"), words, **options) == "remove_len_outlier_problems"


def test_tokens_are_counted_once_for_all_rows_that_are_left():
    asked = []

    def count(texts):
        asked.append(list(texts))
        return words(texts)

    config = FilterConfig(
        drop_if_contains=("bad",),
        remove_len_outlier_problems=True,
        max_problem_length=2,
        remove_len_outlier_solutions=True,
        max_solution_length=1,
    )
    rows = [Row("a", "b"), Row("c", "bad"), Row("a b c", "d"), Row("e", "f g")]
    assert Filters(config, count).apply(rows) == [
        Row("a", "b"),
        "drop_if_contains",
        "remove_len_outlier_problems",
        "remove_len_outlier_solutions",
    ]
    assert asked == [["a", "a b c", "e"], ["b", "f g"]]
    assert Filters(config, count).apply([]) == []


def contamination_file(tmp_path, *rows):
    file = tmp_path / "contamination.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def test_remove_contaminated(tmp_path):
    file = contamination_file(
        tmp_path,
        {"problem": "What is 1 + 1?", "contaminated": True, "candidates": []},
        {"problem": "What is 2 + 2?", "contaminated": False},
        {"problem": "W\u00e9?", "contaminated": True},
    )
    options = {"remove_contaminated": True, "contamination_file": file}
    for problem in ("What is 1 + 1?", "W\u00e9?"):
        assert dropped_by(Row(problem, "s"), **options) == "remove_contaminated"
    for problem in ("What is 2 + 2?", "What is 1 + 1? ", "what is 1 + 1?", ""):
        assert dropped_by(Row(problem, "s"), **options) is None


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (b'{"problem": "p", "contaminated": true}\n{"problem": "p"}\n', ":2: expected an object"),
        (b'{"problem": 1, "contaminated": true}\n', ":1: expected an object"),
        (b'{"problem": "p", "contaminated": "no"}\n', ":1: expected an object"),
        (b'["p"]\n', ":1: expected an object"),
        (b'{"problem"\n', ":1: the contamination file is not valid JSON"),
        (b"\xff\n", ":1: the contamination file is not valid JSON"),
        (None, ": the contamination file cannot be read"),
    ],
)
def test_contamination_file_that_cannot_be_used(tmp_path, lines, said):
    file = tmp_path / "contamination.jsonl"
    if lines is not None:
        file.write_bytes(lines)
    with pytest.raises(DataError, match=f"contamination.jsonl{said}"):
        Filters(FilterConfig(remove_contaminated=True, contamination_file=file))


def test_chain_is_in_order_and_the_first_that_drops_is_named(tmp_path):
    config = FilterConfig(
        drop_multi_boxed=True,
        drop_if_contains=("no",),
        trim_prefix=True,
        trim_solutions=True,
        drop_incorrect_arithmetic=True,
        split_arithmetic=True,
    )
    config = pickle.loads(pickle.dumps(config))
    kept = Row("p", "My solution:\n1 + 2 + 3 = 6, \\boxed{6}\n1 + 2 + 3 = 7", 3, 4)
    rows = [
        kept,
        Row("p", "no \\boxed{1} \\boxed{2}"),
        Row("p", "no 1 + 2 + 3 = 7"),
        Row("p", "1 + 2 + 3 = 7 \\boxed{7}"),
    ]
    assert Filters(config).apply(rows) == [
        Row("p", "1 + 2 + 3 = 3 + 3 = 6, \\boxed{6}", 3, 4),
        "drop_multi_boxed",
        "drop_if_contains",
        "drop_incorrect_arithmetic",
    ]
    assert Filters(FilterConfig()).apply(rows) == rows


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"remove_contaminated": True}, "remove_contaminated needs contamination_file"),
        ({"downsampling_method": "fair"}, "need each other"),
        ({"num_output_samples": 3}, "need each other"),
        ({"min_solution_length": 9, "max_solution_length": 8}, "min_solution_length 9 is above"),
        ({"min_problem_length": 9, "max_problem_length": 8}, "min_problem_length 9 is above"),
        ({"trim_solutions": "ballanced"}, "trim_solutions: input should be True, False or"),
        ({"drop_multi_box": True}, "did you mean drop_multi_boxed"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(ConfigError, match=said):
        parse_section(FilterConfig, options)


def test_options_from_a_file():
    options = {"trim_solutions": "balanced", "drop_multi_boxed": True, "split_arithmetic": False}
    config = parse_section(FilterConfig, options)
    assert (config.trim_solutions, config.drop_multi_boxed) == ("balanced", True)
