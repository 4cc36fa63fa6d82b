import json

import pytest

from mcore_sft.data import manifest as manifests
from mcore_sft.data.errors import DataError

COUNTS = {
    "rows": 3,
    "examples": 2,
    "visits": 2,
    "tokens": 9,
    "supervised_tokens": 4,
    "longest": 5,
    "packs": 1,
    "packing_efficiency": 0.9,
    "examples_per_pack": 2.0,
    "dropped": {"duplicate": 1},
    "contaminated_problems": 0,
}
MANIFEST = {
    "format": manifests.FORMAT,
    "fingerprint": "f",
    "sequence_length": 10,
    "inputs": {
        "data": {"seed": 42},
        "prompt": {"fingerprint": "p"},
        "tokenizer": {"fingerprint": "t", "vocab_size": 7},
        "sources": {"train": [{"path": "rows.jsonl"}]},
    },
    "splits": {"train": COUNTS},
    "files": {"train.bin": {"bytes": 18, "sha256": "s"}},
}


def rewrite(folder, edit):
    """Change the text of the manifest behind its digest."""
    file = folder / manifests.NAME
    tree = json.loads(file.read_text(encoding="utf-8"))
    edit(tree)
    file.write_text(json.dumps(tree), encoding="utf-8")


def test_what_is_written_is_read(tmp_path):
    manifests.write(tmp_path, MANIFEST)
    assert manifests.read(tmp_path) == MANIFEST
    rewrite(tmp_path, lambda tree: tree.update(splits=tree.pop("splits")))  # another order
    assert manifests.read(tmp_path) == MANIFEST


@pytest.mark.parametrize(
    "edit",
    [
        lambda tree: tree["inputs"]["data"].update(seed=43),
        lambda tree: tree["inputs"]["sources"]["train"][0].update(path="other.jsonl"),
        lambda tree: tree["splits"]["train"].update(rows=4),
        lambda tree: tree.update(sequence_length=11),
        lambda tree: tree["files"].update(more={"bytes": 1, "sha256": "s"}),
        lambda tree: tree.update(fingerprint="g"),
        lambda tree: tree.update(digest="0" * 64),
    ],
)
def test_changed_manifest(tmp_path, edit):
    manifests.write(tmp_path, MANIFEST)
    rewrite(tmp_path, edit)
    with pytest.raises(DataError, match=r"manifest\.json: was changed \(digest .*--overwrite"):
        manifests.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format 2, expected 3"),
        ({"files": []}, r"broken \(files: "),
        (
            {"files": {"train.bin": {"bytes": -1, "sha256": ""}}},
            r"broken \(files\.train\.bin\.bytes: ",
        ),
        ({"splits": {}}, r"broken \(splits: "),
        ({"splits": {"train": {}}}, r"broken \(splits\.train\.rows: field required"),
        ({"inputs": None}, r"broken \(inputs: "),
        ({"sequence_length": "512"}, r"broken \(sequence_length: "),
    ],
)
def test_manifest_of_something_else(tmp_path, change, said):
    manifests.write(tmp_path, MANIFEST | change)
    with pytest.raises(DataError, match=rf"manifest\.json: {said}.*run preprocess again"):
        manifests.read(tmp_path)


def test_manifest_that_is_none(tmp_path):
    with pytest.raises(DataError, match=r"no packed dataset here.*tools/preprocess\.py"):
        manifests.read(tmp_path)
    file = tmp_path / manifests.NAME
    for text in ("{", "[]", "3", "{}"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=r"manifest\.json: broken"):
            manifests.read(tmp_path)
    file.write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"manifest\.json: broken"):
        manifests.read(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read \(Is a directory"):
        manifests.read(tmp_path)
