import hashlib
from pathlib import Path

import numpy as np
import pytest

from mcore_sft.data.encode import block_files
from mcore_sft.data.encode.block import Drops, Encoded
from mcore_sft.data.encode.block_files import BlockFile
from mcore_sft.data.encode.collect import Collector
from mcore_sft.data.packs import gather
from mcore_sft.data.packs.gather import Output
from mcore_sft.data.rows import Examples
from mcore_sft.data.selection.asked import Asked
from mcore_sft.data.workers import Workers, no_tool


def block(number: int, count: int, draw: np.random.Generator) -> Encoded:
    """So many examples, some of them alike, with no span, one, or several."""
    lengths = draw.integers(1, 30, count).astype(np.int32)
    counts = draw.integers(0, 4, count).astype(np.int32)
    hashes = draw.integers(0, 200, (count, 2), np.uint64)
    return Encoded(
        source=0,
        name=f"{number}.jsonl",
        examples=Examples(
            tokens=draw.integers(0, 60000, lengths.sum()).astype(np.int32),
            lengths=lengths,
            spans=draw.integers(0, 30, (counts.sum(), 2)).astype(np.int32),
            span_counts=counts,
            rows=np.arange(count),
        ),
        numbers=np.arange(count) + 1,
        hashes=np.stack((hashes[:, 0], hashes[:, 0]), axis=1),
        read_hashes=np.zeros((0, 2), np.uint64),
        problems=hashes[:, 0],
        systems=np.zeros(0, np.uint64),
        system_texts={},
        asked=Asked(),
        drops=Drops(),
        rows=count,
        size=1,
        gigatoken=True,
        kind="problems",
    )


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """What is kept of 20 blocks, one of them empty."""
    folder, draw = tmp_path_factory.mktemp("blocks"), np.random.default_rng(0)
    collector = Collector(deduplicate=True, remove=False)
    for number in range(20):
        file = folder / f"{number}.block"
        made = block(number, 0 if number == 7 else 30, draw)
        block_files.write(file, made, np.dtype(np.uint16), of="")
        collector.add(BlockFile(file))
    everything = collector.collected()
    assert 100 < len(everything) < 200
    return everything


def written(everything, order: np.ndarray, folder: Path, workers: Workers):
    """The bytes of tokens and spans of two outputs of examples in this order."""
    half = len(order) // 2
    outputs = []
    for name, rows in (("one", order[:half]), ("two", order[half:])):
        (folder / f"{name}.spans").write_bytes(b"begin")
        outputs.append(
            Output(
                rows=rows, tokens=folder / f"{name}.bin", spans=folder / f"{name}.spans", begin=5
            )
        )
    (folder / "scratch").mkdir()
    done: list[int] = []
    sums = gather.gather(
        everything,
        outputs,
        token_bytes=2,
        scratch=folder / "scratch",
        workers=workers,
        advance=done.append,
    )
    assert not list((folder / "scratch").iterdir()), "each file goes once it is used"
    assert sum(done) == sum(
        2 * int(everything.lengths[output.rows].sum()) * output.passes for output in outputs
    )
    for output in outputs:
        tokens, spans = output.tokens.read_bytes(), output.spans.read_bytes()
        assert sums[output.tokens] == hashlib.sha256(tokens).hexdigest()
        made = [everything.example(index) for index in output.rows.tolist()]
        assert tokens == b"".join(ids.tobytes() for ids, _ in made)
        assert spans == b"begin" + b"".join(own.tobytes() for _, own in made)


@pytest.mark.parametrize(("stretch", "together"), [(1 << 30, 1 << 30), (300, 900), (1, 1)])
@pytest.mark.parametrize("order", ["source", "backwards", "drawn"])
def test_examples_come_in_any_order_in_pieces_of_any_size(
    order, stretch, together, collected, tmp_path, monkeypatch
):
    monkeypatch.setattr(gather, "STRETCH", stretch)
    monkeypatch.setattr(gather, "_TOGETHER", together)
    rows = np.arange(len(collected))
    if order == "drawn":
        rows = np.random.default_rng(1).permutation(rows)[:-20]
    written(collected, rows[::-1] if order == "backwards" else rows, tmp_path, Workers(1, no_tool))


def test_processes_write_the_same(collected, tmp_path):
    rows = np.random.default_rng(1).permutation(len(collected))
    with pytest.MonkeyPatch.context() as patch, Workers(2, no_tool) as workers:
        patch.setattr(gather, "STRETCH", 300)
        patch.setattr(gather, "_TOGETHER", 900)
        written(collected, rows, tmp_path, workers)
