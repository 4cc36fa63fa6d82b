from pathlib import Path

import pytest
from torch import Tensor

from mcore_sft.checkpoint.safetensors_folder import SafetensorsFolder
from mcore_sft.config import ParallelConfig
from tests.runs import loaded, on_layout


@pytest.mark.parametrize("layout", ["one", "tp2_sp_pp2"])
def test_a_rank_reads_its_part_once_and_no_more(model: Path, layout: str) -> None:
    for read, held in on_layout(layout, _bytes, model):
        assert 0.99 * held < sum(read) <= held  # the rows that fill the vocabulary up are not read
        assert len(read) > 10


def _bytes(parallel: ParallelConfig, folder: Path) -> tuple[list[int], int]:
    """Bytes of each slice that this rank reads, and of its weights."""
    read, sizes = SafetensorsFolder.read, []

    def counted(self: SafetensorsFolder, *where: object) -> Tensor:
        rows = read(self, *where)  # type: ignore[arg-type]
        sizes.append(rows.nbytes)
        return rows

    SafetensorsFolder.read = counted  # type: ignore[assignment, method-assign]
    with loaded(folder, parallel) as here:
        return sizes, sum(w.nbytes for chunk in here.model for w in chunk.parameters())
