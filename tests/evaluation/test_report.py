import pytest

from mcore_sft.evaluation.report import (
    Share,
    interval_line,
    nemo_rl_block,
    nemo_skills_table,
    table,
    wilson,
)


def test_nemo_skills_table_byte_for_byte() -> None:
    made = nemo_skills_table(
        "math", {"greedy": (Share(hits=2954, total=5000), Share(hits=272, total=5000))}
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


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        (300, 500, 55.6, 64.2),
        (297, 500, 55.0, 63.6),
        (224, 500, 40.5, 49.2),
        (2954, 5000, 57.7, 60.4),
    ],
)
def test_wilson(hits: int, total: int, low: float, high: float) -> None:
    assert tuple(round(end, 1) for end in wilson(hits, total)) == (low, high)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 100


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
