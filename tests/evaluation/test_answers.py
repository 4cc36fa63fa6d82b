import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

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
