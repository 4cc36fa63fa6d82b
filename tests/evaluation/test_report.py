from mcore_sft.evaluation.scores.report import (
    details,
    interval_line,
    nemo_rl_block,
    nemo_skills_table,
    table,
)
from mcore_sft.evaluation.scores.statistics import Mean, Share


def test_nemo_skills_table_byte_for_byte() -> None:
    made = nemo_skills_table(
        "math", {"greedy": (Share(hits=2954, total=5000), Share(hits=272, total=5000))}, 5000
    )
    assert made == (
        "--------------------------- math ---------------------------\n"
        "evaluation_mode | num_entries | symbolic_correct | no_answer\n"
        "greedy          | 5000        | 59.08%           | 5.44%    \n"
        "\n"
        "\n"
    )


def test_a_hundred_percent_keeps_the_columns() -> None:
    row: dict[str, str | int | float] = {
        "evaluation_mode": "greedy",
        "n": 1,
        "ok": 100.0,
        "no": 0.0,
    }
    assert table("math", [row]).splitlines()[:3] == [
        "---------------- math ---------------",
        "evaluation_mode | n | ok      | no   ",
        "greedy          | 1 | 100.00% | 0.00%",
    ]


def test_nemo_rl_block_byte_for_byte() -> None:
    made = nemo_rl_block(
        model_name="hf",
        dataset_name="MATH-500",
        max_new_tokens=2048,
        temperature=0.0,
        top_p=1.0,
        right=Share(hits=300, total=500),
    )
    assert made == (
        "\n"
        "============================================================\n"
        "model_name='hf' dataset_name='MATH-500'\n"
        "max_new_tokens=2048 temperature=0.0 top_p=1.0 top_k=-1\n"
        "\n"
        "metric='pass@1' num_tests_per_prompt=1\n"
        "\n"
        "score=0.6000 (300.0/500)\n"
        "============================================================\n"
        "\n"
    )


def test_interval_line() -> None:
    assert interval_line("score", Share(hits=300, total=500)) == (
        "score 60.00%, 95 % interval 55.65% to 64.20% (Wilson, 300 of 500)\n"
    )


def test_table_before_and_after() -> None:
    rows: list[dict[str, str | int | float]] = [
        {
            "evaluation_mode": "before",
            "num_entries": 500,
            "symbolic_correct": 0.2,
            "no_answer": 99.0,
        },
        {
            "evaluation_mode": "after",
            "num_entries": 500,
            "symbolic_correct": 100.0,
            "no_answer": 0.0,
        },
    ]
    lines = table("demo", rows).splitlines()
    assert lines[0] == "--------------------------- demo ---------------------------"
    assert lines[3] == "after           | 500         | 100.00%          | 0.00%    "


def test_interval_line_of_a_mean() -> None:
    assert interval_line("pass@2 symbolic_correct", Mean(values=(1.0, 1.0, 0.5, 0.5))) == (
        "pass@2 symbolic_correct 75.00%, 95 % interval 46.71% to 100.00% (over 4 problems)\n"
    )


def test_details_say_what_the_scores_leave_out() -> None:
    half = {"percent": 50.0, "hits": 1, "total": 2, "wilson95": [9.45, 90.55]}
    said = {
        "verdicts": {"equal": 1, "no_answer": 1},
        "rules": {"equal": {"number": 1}, "no_answer": {"truncated": 1}},
        "missing": {"truncated": 1},
        "truncated": 1,
        "boxes_differ": 0,
        "mean_tokens": 15.0,
        "by": {"subject": {"Algebra": half}, "level": {}},
        "by_subject_level": {"Algebra": {"1": half}, "Geometry": {"2": half}},
        "lengths": [{"from": 10, "to": 20, **half}, {"from": 20, "to": None, **half}],
        "disputed": ["p1"],
        "gold_defects": [{"id": "p2", "reason": "it is wrong"}],
        "evaluation": {"second_opinion": True},
    }
    assert details(said).split("\n\n\n") == [
        "----------------------- by subject -----------------------\n"
        "subject | num_entries | symbolic_correct | 95 % interval  \n"
        "Algebra | 2           | 50.00%           | 9.45% to 90.55%",
        "------- by subject and level -------\n"
        "subject  | 1           | 2          \n"
        "Algebra  | 50.00% of 2 |            \n"
        "Geometry |             | 50.00% of 2",
        "------------------------- by tokens -------------------------\n"
        "tokens     | num_entries | symbolic_correct | 95 % interval  \n"
        "10 to 19   | 2           | 50.00%           | 9.45% to 90.55%\n"
        "20 or more | 2           | 50.00%           | 9.45% to 90.55%",
        "----------- verdicts ----------\n"
        "verdict   | rule      | answers\n"
        "equal     | number    | 1      \n"
        "no_answer | truncated | 1      ",
        "---- no answer ----\ncause     | answers\ntruncated | 1      ",
        "truncated 50.00%, 95 % interval 9.45% to 90.55% (Wilson, 1 of 2)\n"
        "boxes differ 0.00%, 95 % interval 0.00% to 65.76% (Wilson, 0 of 2)\n"
        "mean response 15.0 tokens\n"
        "disputed by math-verify (1): p1\n"
        "gold in doubt, it is wrong (1): p2\n",
    ]
    quiet = details(said | {"evaluation": {"second_opinion": False}})
    assert "disputed" not in quiet
