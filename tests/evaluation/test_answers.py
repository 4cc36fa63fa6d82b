import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcore_sft.base.errors import UserError
from mcore_sft.base.files import check_writable, write_named
from mcore_sft.evaluation.answers import (
    Answer,
    AnswerFile,
    read,
    read_rows,
    write_lines,
)
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
        temperature=0.7,
        top_p=0.95,
        seed=2**62,
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


ROW = {
    "id": "b", "sample": 0, "configuration": "c", "expected_answer": "2", "response": "2",
    "finish_reason": "stop", "tokens": [1], "prompt_length": 3,
}  # fmt: skip
DAMAGE = [
    *(
        json.dumps(ROW | change).encode()
        for change in [
            {"response": None},
            {"response": 5},
            {"tokens": None},
            {"tokens": ["1"]},
            {"tokens": [True]},
            {"sample": "0"},
            {"id": ["b"]},
            {"finish_reason": "abort"},
            {"temperature": "warm"},
        ]
    ),
    b'{"id": 1}',
    b"null",
    b"[]",
    b"{",
    b'{"id": ' * 100_000,
    json.dumps(ROW).replace('"2"', '"\ud83d"').encode("utf-8", "surrogatepass"),
    json.dumps(ROW).encode().replace(b'"2"', b'"\xff"'),
    json.dumps(ROW).encode("utf-16-le"),
]


@pytest.mark.parametrize("line", DAMAGE, ids=lambda line: repr(line[:20]))
def test_a_line_that_cannot_be_read_is_set_aside_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes
) -> None:
    path, aside = tmp_path / "answers.jsonl", tmp_path / "answers.damaged.jsonl"
    with AnswerFile(path) as file:
        file.add([answer("a"), answer("c")])
    good = path.read_bytes()
    first, second = good.splitlines(keepends=True)
    for damaged in (line, b"more of it"):  # what was set aside before stays there
        path.write_bytes(first + damaged + b"\n" + second)
        with pytest.raises(EvaluationError, match=r"answers\.jsonl, line 2: not an answer \(.*set"):
            list(read(path))
        with AnswerFile(path) as file:
            assert file.done == {("a", 0, "c"), ("c", 0, "c")}
            said = capsys.readouterr().err
            assert f"{path}, line 2: not an answer (" in said
            assert "set aside in answers.damaged.jsonl" in said.replace("\n", " ")
            file.add([answer("b")])
        assert list(read(path)) == [answer("a"), answer("c"), answer("b")]
        path.write_bytes(good)
    assert aside.read_bytes() == line + b"\nmore of it\n"


def test_blank_lines_are_no_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path) as file:
        file.add([answer("a")])
    whole = path.read_bytes()
    for blank in (b"\n", b" \n\n", b"\r\n", b"  "):
        path.write_bytes(blank + whole + blank)
        assert list(read(path)) == [answer("a")]
        with AnswerFile(path) as file:
            file.add([answer("b")])
        assert list(read(path)) == [answer("a"), answer("b")]
    path.write_bytes(whole[:-1])  # as some editors leave it
    with AnswerFile(path) as file:
        file.add([answer("b")])
    assert list(read(path)) == [answer("a"), answer("b")]
    assert capsys.readouterr().err == ""
    assert [one.name for one in tmp_path.iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize(
    "change",
    [{"response": None}, {"tokens": None}, {"tokens": ("1",)}, {"finish_reason": None}],
    ids=str,
)
def test_nothing_is_written_that_cannot_be_read_back(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path) as file:
        with pytest.raises(EvaluationError, match=r"the answer to 'b' cannot be kept \("):
            file.add([answer("a"), replace(answer("b"), **change)])
        file.add([answer("c")])
    assert list(read(path)) == [answer("c")]


def test_answers_of_older_versions_have_no_sampling(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    (one,) = read(path)
    assert (one.temperature, one.top_p, one.seed) == (None, None, None)


def test_two_runs_do_not_write_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path), pytest.raises(EvaluationError, match="another run"):
        AnswerFile(path)


def test_a_link_is_followed_to_its_target(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder/target", tmp_path / "link"
    for content in ("first", "second"):
        link.unlink(missing_ok=True)
        link.symlink_to("folder/target")
        write_named(link, content)
        assert link.is_symlink()
        assert target.read_text() == content
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_pipe_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    write_named(pipe, "5\n")
    reader.join(timeout=60)
    assert got == ["5\n"]
    assert pipe.is_fifo()


def test_a_device_stays_one() -> None:
    # a terminal: nothing can take its place, whoever runs this, as it could that of /dev/null
    master, terminal = os.openpty()
    try:
        write_named(Path(os.ttyname(terminal)), "5\n")
        assert os.read(master, 10).split() == [b"5"]
        assert Path(os.ttyname(terminal)).is_char_device()
    finally:
        os.close(master)
        os.close(terminal)


def test_standard_output_that_is_a_file_is_added_to(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from mcore_sft.base.files import write_named; "
        "print('before'); write_named(Path('/dev/stdout'), 'rows\\n'); print('after')"
    )
    with (tmp_path / "out").open("w") as output:
        subprocess.run([sys.executable, "-c", program], stdout=output, check=True, timeout=60)
    assert (tmp_path / "out").read_text() == "before\nrows\nafter\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none/there.jsonl", "there is no folder"),
        ("link", "there is no folder"),
        ("folder", "it is a folder; name a file in it"),
    ],
)
def test_what_cannot_be_written_is_said(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("none/there.jsonl")
    with pytest.raises(UserError, match=said):
        check_writable(tmp_path / name)
    with pytest.raises(UserError, match="cannot be written"):
        write_named(tmp_path / name, "5")


@pytest.mark.parametrize("name", ["new", "there", "pipe", "/dev/stdout", os.devnull])
def test_what_can_be_written_passes(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").touch()
    os.mkfifo(tmp_path / "pipe")
    check_writable(tmp_path / name)
    assert not (tmp_path / "new").exists()
