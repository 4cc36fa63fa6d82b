from dataclasses import replace
from pathlib import Path

import pytest

from mcore_sft.evaluation.answers import Answer, AnswerFile, read, read_rows, write_lines
from mcore_sft.evaluation.errors import EvaluationError


def answer(identifier: str, configuration: str = "c") -> Answer:
    return Answer(
        id=identifier,
        sample=0,
        configuration=configuration,
        expected_answer="2",
        response="\u2028 is no line end, \\boxed{2}",
        finish_reason="stop",
        tokens=(1, 2),
        prompt_length=3,
    )


def test_what_was_added_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    with AnswerFile(path) as file:
        file.add([answer("a")])
        file.add([answer("b", "other")])
    assert list(read(path)) == [answer("a"), answer("b", "other")]
    with AnswerFile(path) as file:
        assert file.done == {("a", 0, "c"), ("b", 0, "other")}


def test_a_torn_last_line_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path) as file:
        file.add([answer("a"), answer("b")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with AnswerFile(path) as file:
        assert file.done == {("a", 0, "c")}
        file.add([answer("b")])
    assert path.read_bytes() == whole


def test_half_a_surrogate_pair_ends_no_run(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path) as file:
        file.add([replace(answer("a"), response="\ud83d is half")])
    assert [one.response for one in read(path)] == ["? is half"]
    write_lines(path, [{"problem": "\ud83d"}])
    assert read_rows(path) == [{"problem": "?"}]


def test_a_broken_line_in_the_middle_is_said(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path) as file:
        file.add([answer("a")])
    path.write_bytes(b'{"id": 1}\n' + path.read_bytes())
    with pytest.raises(EvaluationError, match="line 1: not an answer"):
        AnswerFile(path)


def test_two_runs_do_not_write_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path), pytest.raises(EvaluationError, match="another run"):
        AnswerFile(path)
