"""The packs of a run: those of the dataset that belong to its model, its prompt and its ranks.

RunConfig + Mesh -> PackedDataset, Loader
"""

from collections.abc import Callable
from typing import Literal

from mcore_sft.checkpoint.sharded import Progress
from mcore_sft.config import RunConfig, TrainConfig
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.packs.loader import Loader, packs_of_a_step
from mcore_sft.data.text.fit import check_fit
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import Tokenizer
from mcore_sft.model.architecture import Architecture
from mcore_sft.model.build import eight_bit_unit
from mcore_sft.runtime.hardware import check_deterministic, chosen_layers
from mcore_sft.runtime.mesh import Mesh
from mcore_sft.training.errors import TrainingError

PACKS = "packs of a step"
"""What a checkpoint calls their number."""


def open_dataset(config: RunConfig, split: str, mesh: Mesh) -> PackedDataset:
    """One split of the packed dataset; one process of each machine compares the checksums."""
    return PackedDataset(config.packed, split, verify=mesh.local_rank == 0)


def load(
    config: RunConfig,
    split: Literal["train", "validation"],
    dataset: PackedDataset,
    tokenizer: Tokenizer,
    architecture: Architecture,
    mesh: Mesh,
) -> Loader:
    """The share of `dataset` that this rank reads, once it is sure to fit model and prompt."""
    unfed = check_fit(tokenizer, config.model.path, rows=architecture.vocab)
    made = dataset.manifest["inputs"]
    prompt = Prompt.load(config.prompt, tokenizer)
    sources = config.data.model_dump(mode="json")[split]
    for what, then, now in (
        # A dataset that is named by its folder alone needs no sources.
        (f"data.{split}", made["data"][split], sources or made["data"][split]),
        ("data.seed", made["data"]["seed"], config.data.seed),
        ("tokenizer", made["tokenizer"]["fingerprint"], tokenizer.fingerprint),
        ("prompt", made["prompt"]["fingerprint"], prompt.fingerprint),
        ("data.sequence_length", dataset.sequence_length, config.data.sequence_length),
    ):
        if then != now:
            raise TrainingError(
                f"the dataset {config.packed} was made with another {what} ({then}) than the "
                f"configuration names ({now}); run tools/preprocess.py again, or name the other"
                + (" (model.tokenizer=PATH)" if what == "tokenizer" else "")
            )
    loader = Loader(
        dataset,
        packs_per_step=packs_of_a_step(config.train, dataset.num_examples / len(dataset)),
        micro_batch=config.train.micro_batch,
        seed=config.train.seed,
        last_step=config.train.last_step,
        rank=mesh.data.rank,
        size=mesh.data.size,
        # Padding is known by its place, and every model has an id 0.
        pad_id=tokenizer.pad_id if unfed is None else 0,
        align=row_unit(config.train, mesh),
        fewest=mesh.parallel.fewest_micro_batches,
        context=mesh.context.size,
        context_rank=mesh.context.rank,
    )
    if split == "train" and config.train.deterministic and _by_engine(config, mesh):
        heads = architecture.heads // mesh.tensor.size
        size = heads * dataset.largest_attention(loader.length, config.train.micro_batch)
        check_deterministic(size, mesh.device)
    return loader


def _by_engine(config: RunConfig, mesh: Mesh) -> bool:
    gpu = mesh.device.type == "cuda"
    return chosen_layers(config.model, config.train, gpu=gpu) == "transformer_engine"


def as_begun(loader: Loader, progress: Progress | None, say: Callable[[str], None]) -> Loader:
    """The same packs, as many a step as the run that is resumed takes: which come next follows."""
    if progress is None or progress.fixed[PACKS] == loader.packs_per_step:
        return loader
    packs = progress.fixed[PACKS]
    say(
        f"this run has taken {packs} packs a step so far and goes on so; train.global_batch or "
        f"train.packs asks for {loader.packs_per_step}, which a run with another output would take"
    )
    return loader.taking(packs)


def row_unit(train: TrainConfig, mesh: Mesh) -> int:
    """What the rows of a pack are a multiple of, for the ranks and the 8-bit products."""
    if not mesh.parallel.sequence:
        return eight_bit_unit(train, gathered=False)
    return mesh.tensor.size * eight_bit_unit(train, gathered=True)
