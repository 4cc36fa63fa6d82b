from pathlib import Path

import pytest

from mcore_sft.data.packs.row_names import place


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("/root/math/a.jsonl:3", "math/a.jsonl:3"),
        ("/elsewhere/math/a.jsonl:3", "math/a.jsonl:3"),
        ("org/name[train]:3", "org/name[train]:3"),
        ("", ""),
    ],
)
def test_place_is_the_same_on_every_machine(where, expected):
    assert place(where, Path("/root")) == expected
