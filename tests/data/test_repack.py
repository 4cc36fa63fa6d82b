"""Another sequence length: the dataset that would be made, without a token being made."""

import json
import shutil

import numpy as np
import pytest

from mcore_sft.data.encode import block as encode
from mcore_sft.data.errors import DataError
from mcore_sft.data.packs import origins
from mcore_sft.data.packs.dataset import PackedDataset
from tests.data.test_prepare import ROWS, config, contents, run, solved, write_rows

DRAW = np.random.default_rng(0)
LONG = [solved(f"Long {i}?", " ".join(["again"] * int(DRAW.integers(1, 150)))) for i in range(200)]


@pytest.fixture
def rows(tmp_path):
    """Problems, a source of which parts are shown more or less often, and conversations."""
    mixed = [row for pair in zip(LONG, ROWS[:200], strict=True) for row in pair]
    write_rows(tmp_path / "rows.jsonl", [*mixed, *mixed[5:9]])
    write_rows(
        tmp_path / "more.jsonl", [solved(f"More {i}?", "yes" + " yes" * i) for i in range(100)]
    )
    talks = [
        {
            "messages": [
                {"role": "system", "content": f"Be {i % 3}."},
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": "well" + " well" * i},
            ]
        }
        for i in range(90)
    ]
    write_rows(tmp_path / "talks.jsonl", talks)
    return tmp_path


SETTINGS = {
    "all at once": {
        "train": [
            {"path": "rows.jsonl", "weight": 1.5},
            {"path": "more.jsonl", "weight": 0.5},
            {"path": "talks.jsonl", "messages": "messages"},
        ],
        "filters": {"order": "nemo_skills"},
        "holdout": {"fraction": 0.1},
    },
    "in order": {"validation": [{"path": "more.jsonl"}], "train": [{"path": "rows.jsonl"}]},
}


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        ("all at once", 150, 220),
        ("all at once", 220, 150),
        ("all at once", 4096, 4095),
        ("in order", 150, 4096),
    ],
)
def test_dataset_is_the_one_that_would_be_made(settings, before, after, rows, monkeypatch):
    made = SETTINGS[settings]
    run(config(rows, **made, sequence_length=after), rows / "expected")
    run(config(rows, **made, sequence_length=before), rows / "packed")
    monkeypatch.setattr(encode.Encoder, "encode", lambda *_: pytest.fail("it was tokenized again"))
    with pytest.raises(DataError, match=r"sequence_length.*--overwrite \(packs it anew\)"):
        run(config(rows, **made, sequence_length=after), rows / "packed")
    kept = (rows / "packed" / "train.bin").stat().st_ino
    run(config(rows, **made, sequence_length=after), rows / "packed", overwrite=True)
    assert contents(rows / "packed") == contents(rows / "expected")
    same_examples = min(before, after) > 300
    assert ((rows / "packed" / "train.bin").stat().st_ino == kept) == same_examples
    counts = PackedDataset(rows / "packed").manifest["splits"]
    left = sum(counts["train"]["dropped"].values()) + counts["train"].get("held_out", 0)
    assert counts["train"]["rows"] == counts["train"]["examples"] + left
    assert not list(rows.glob(".*"))


def test_length_that_nothing_fits_leaves_all_as_it_was(rows):
    run(config(rows), rows / "packed")
    before = contents(rows / "packed")
    with pytest.raises(
        DataError, match=r"source 0 of data\.train: no example of \d+ fits 20 tokens"
    ):
        run(config(rows, sequence_length=20), rows / "packed", overwrite=True)
    assert contents(rows / "packed") == before


def without_origins(folder):
    manifest = json.loads((folder / "train.origins.json").read_text())
    (folder / "train.origins.json").write_text(json.dumps({**manifest, "format": 0}))


def damaged(folder):
    raw = bytearray((folder / "train.bin").read_bytes())
    raw[-1] ^= 1
    (folder / "train.bin").write_bytes(raw)


@pytest.mark.parametrize("change", [without_origins, damaged])
def test_dataset_that_cannot_be_packed_anew_is_made_anew(change, rows):
    run(config(rows, sequence_length=220), rows / "expected")
    run(config(rows), rows / "packed")
    change(rows / "packed")
    run(config(rows, sequence_length=220), rows / "packed", overwrite=True)
    assert contents(rows / "packed") == contents(rows / "expected")


def test_every_example_is_found_in_its_source_again(rows):
    run(config(rows, **SETTINGS["all at once"], sequence_length=150), rows / "packed")
    dataset, its = PackedDataset(rows / "packed"), origins.read(rows / "packed" / "train")
    fits = np.flatnonzero(its.rows["tokens"] <= 150)
    assert len(fits) == dataset.num_distinct < len(its.rows)
    for example, index in enumerate(fits[::29].tolist()):
        assert its.rows["tokens"][index] == len(dataset.example(29 * example))
    file, _, number = its.where(int(fits[3])).partition(":")
    row = json.loads((rows / file).read_text().splitlines()[int(number) - 1])
    assert its.kinds == {0: "problems", 1: "problems", 2: "conversations"}
    assert row.keys() <= {"problem", "generated_solution", "messages"}


def test_repacked_dataset_keeps_its_place_where_links_are_not_known(rows, monkeypatch):
    def unknown(*_):
        raise OSError(95, "not supported")

    run(config(rows), rows / "packed")
    shutil.copytree(rows / "packed", rows / "old")
    monkeypatch.setattr("mcore_sft.data.packs.repack.os.link", unknown)
    run(config(rows, sequence_length=300), rows / "packed", overwrite=True)
    run(config(rows), rows / "packed", overwrite=True)
    assert contents(rows / "packed") == contents(rows / "old")
