import numpy as np
import pyarrow as pa
import pytest

from mcore_sft.data.selection.duplicates import Seen, _Run, joined, text_hashes


@pytest.mark.parametrize("chunk", [1, 3, 64, 5000])
@pytest.mark.parametrize("values", [2, 40, 3000])
def test_seen_is_a_set(chunk, values):
    # Equal high halves are all but impossible; here they are the rule.
    random_ = np.random.default_rng(7)
    low = random_.integers(0, values, 5000).astype(np.uint64)
    hashes = np.stack([low % 5 + np.uint64(2**64 - 6), low], axis=1)
    met: set[tuple[int, int]] = set()
    expected = [not (row in met or met.add(row)) for row in map(tuple, hashes.tolist())]
    seen = Seen()
    new = [seen.new(hashes[start : start + chunk]) for start in range(0, 5000, chunk)]
    assert np.concatenate(new).tolist() == expected
    assert len(seen) == len(met)
    assert not seen.new(hashes).any()
    assert seen.new(hashes[:0]).tolist() == []


def test_runs_are_merged_in_place(monkeypatch):
    monkeypatch.setattr("mcore_sft.data.selection.duplicates._BLOCK", 3)
    random_ = np.random.default_rng(7)
    for sizes in ((1, 1), (10, 4), (4, 10), (100, 9), (9, 100)):
        one, other = (np.sort(random_.integers(0, 2**64, n, dtype=np.uint64)) for n in sizes)
        run = _Run(one.copy(), ~one)
        run.merge(_Run(other, ~other))
        assert run.high.tolist() == sorted([*one.tolist(), *other.tolist()])
        assert np.array_equal(run.low, ~run.high)


def column(*texts: str) -> pa.LargeStringArray:
    return pa.array(texts, pa.large_string())


def test_hashes_tell_rows_apart():
    rows = [("a", "b"), ("ab", ""), ("", "ab"), ("b", "a"), ("a", "b "), ("é", "b"), ("", "")]
    problems, solutions = (text_hashes(column(*texts)) for texts in zip(*rows, strict=True))
    hashes = joined(problems, solutions)
    assert hashes.shape == (7, 2)
    assert len({tuple(row) for row in hashes.tolist()}) == 7
    assert text_hashes(column("a")).tobytes().hex() == "a96faf705af16834e6c632b61e964e1f"  # XXH3
    assert joined(problems[:1], solutions[:1]).tolist() == hashes[:1].tolist()
    assert text_hashes(column()).shape == (0, 2)


def test_hashes_of_a_slice_are_those_of_its_texts():
    texts = column("zero", "one", "two", "three")
    assert np.array_equal(text_hashes(texts.slice(1, 2)), text_hashes(column("one", "two")))
