"""What is appended is read; a line that was torn is told, and costs no other."""

import json

import pytest

from nightly import history
from tests.nightly.sample import record

NIGHTS = [record(number) for number in range(3)]


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "new" / "history.jsonl"
    for night in NIGHTS:
        history.append(file, night)
    return file


def test_records_are_read_in_the_order_of_appending(file):
    assert history.read(file) == (NIGHTS, None)


def test_no_file_is_no_record(tmp_path):
    assert history.read(tmp_path / "history.jsonl") == ([], None)


def test_any_torn_end_is_told_and_the_next_record_is_read(file):
    whole = file.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for size in (last + 1, last + 40, len(whole) - 2):
        file.write_bytes(whole[:size])
        records, torn = history.read(file)
        assert records == NIGHTS[:2]
        assert torn.startswith("history.jsonl:3 is ignored: ")
        history.append(file, NIGHTS[2])
        records, torn = history.read(file)
        assert records == NIGHTS
        assert torn.startswith("history.jsonl:3 is ignored: ")


def test_a_last_line_that_only_lacks_its_end_is_a_record(file):
    file.write_bytes(file.read_bytes()[:-1])
    assert history.read(file) == (NIGHTS, None)
    history.append(file, NIGHTS[0])
    assert history.read(file) == ([*NIGHTS, NIGHTS[0]], None)


def test_half_a_letter_is_torn_not_an_error(file):
    with file.open("ab") as stream:
        stream.write('{"tier": "é'.encode()[:-1])
    records, torn = history.read(file)
    assert records == NIGHTS
    assert "history.jsonl:4" in torn


def test_a_line_of_before_a_field_was_added_is_read(tmp_path):
    older = json.loads(NIGHTS[0].to_json())
    del older["commits"]
    (tmp_path / "history.jsonl").write_text(json.dumps(older) + "\n")
    assert history.read(tmp_path / "history.jsonl") == (NIGHTS[:1], None)
    del older["outcome"]
    (tmp_path / "history.jsonl").write_text(json.dumps(older) + "\n")
    assert "no record (KeyError: 'outcome')" in history.read(tmp_path / "history.jsonl")[1]
