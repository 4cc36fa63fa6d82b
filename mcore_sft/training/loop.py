"""The training loop: a packed dataset in, distributed checkpoints of the fine-tuned model out.

Loader --[Batch]--> train_step --StepResult--> metrics, checkpoints
"""

from dataclasses import asdict
from functools import partial
from typing import Any, Literal

from mcore_sft.checkpoint import weights
from mcore_sft.checkpoint.describe import describe
from mcore_sft.checkpoint.safetensors_folder import SafetensorsFolder
from mcore_sft.checkpoint.sharded import Checkpoints, Progress
from mcore_sft.config import RunConfig
from mcore_sft.data.dataset import PackedDataset
from mcore_sft.data.loader import Loader
from mcore_sft.data.prompt import Prompt
from mcore_sft.data.tokenizer import load_tokenizer
from mcore_sft.model import architecture as arch
from mcore_sft.model import build
from mcore_sft.runtime.mesh import Mesh, connect
from mcore_sft.training import optimizer as optim
from mcore_sft.training.errors import TrainingError
from mcore_sft.training.metrics import Metrics
from mcore_sft.training.step import train_step, validation_loss


def train(config: RunConfig) -> Progress:
    """Fine-tune the model that `config` names on the packs that preprocessing wrote."""
    architecture = arch.read(config.model.path)
    architecture.check(config.parallel)
    with connect(config.parallel) as mesh:
        return train_on(mesh, config, architecture)


def train_on(mesh: Mesh, config: RunConfig, architecture: arch.Architecture) -> Progress:
    """The story of a run on one rank of `mesh`."""
    dataset = open_dataset(config, "train", mesh)
    loader = load(config, "train", dataset, architecture, mesh)
    loader.check()
    validation = None
    if config.train.validate_every:
        held_out = open_dataset(config, "validation", mesh)
        validation = load(config, "validation", held_out, architecture, mesh)
    gpt = build.build(architecture, config.model, config.train, mesh)
    optimizer = optim.build(config.optimizer, config.train, gpt, mesh)
    checkpoints = Checkpoints(
        config.folder, config.checkpoint, model=gpt, optimizer=optimizer, mesh=mesh
    )
    fixed = what_stays(config, dataset, loader, architecture)
    progress = None
    if config.checkpoint.resume:
        progress = checkpoints.restore_latest(fixed)
    else:
        checkpoints.begin_anew()
    if progress is None:
        progress = Progress(fixed=fixed)
        weights.load_pretrained(SafetensorsFolder(config.model.path), gpt.module, architecture)
        optimizer.reload_model_params()

    metrics = Metrics(config.folder, config.log, config.train.steps, mesh)
    announce(metrics, config, mesh, loader, progress)
    with metrics.logging(resumed_at=progress.step):
        while progress.step < config.train.steps:
            lr = optim.learning_rate(config.optimizer, progress.step, config.train.steps)
            batches = loader.batches(progress.step)
            result = train_step(gpt, optimizer, batches, mesh, config.optimizer, lr)
            progress.step += 1
            progress.examples += result.examples
            progress.tokens += result.tokens
            progress.supervised += result.supervised
            progress.skipped += result.skipped
            metrics.step(progress, result)

            if validation and due(progress.step, config.train.validate_every, config.train.steps):
                batches = list(validation.validation_batches(config.train.validation_packs))
                metrics.validation(progress, validation_loss(gpt, batches, mesh))
            if due(progress.step, config.checkpoint.every, config.train.steps):
                metrics.saved(checkpoints.save(progress, partial(describe, config, dataset)))
    return progress


def open_dataset(config: RunConfig, split: str, mesh: Mesh) -> PackedDataset:
    """One split of the packed dataset; one process of each machine compares the checksums."""
    return PackedDataset(config.packed, split, verify=mesh.local_rank == 0)


def load(
    config: RunConfig,
    split: Literal["train", "validation"],
    dataset: PackedDataset,
    architecture: arch.Architecture,
    mesh: Mesh,
) -> Loader:
    """The share of `dataset` that this rank reads, once it is sure to fit model and prompt."""
    tokenizer = load_tokenizer(config.model.tokenizer_path)
    if tokenizer.vocab_size > architecture.vocab:
        raise TrainingError(
            f"the tokenizer {config.model.tokenizer_path} has {tokenizer.vocab_size} tokens, but "
            f"the model {config.model.path} embeds {architecture.vocab}; name the one that "
            "belongs to it with model.tokenizer"
        )
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
            )
    return Loader(
        dataset,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        seed=config.train.seed,
        last_step=config.train.last_step,
        rank=mesh.data.rank,
        size=mesh.data.size,
        pad_id=tokenizer.pad_id,
        align=mesh.tensor.size if mesh.sequence else 1,
    )


def what_stays(
    config: RunConfig, dataset: PackedDataset, loader: Loader, architecture: arch.Architecture
) -> dict[str, Any]:
    """What a resumed run must share with the run that stopped: its examples and its weights."""
    return {
        "dataset": dataset.fingerprint,
        "packs of a step": loader.packs_per_step,
        "train.seed": config.train.seed,
        "train.last_step": config.train.last_step,
        "train.precision": config.train.precision,
        "optimizer.betas": list(config.optimizer.betas),
        "optimizer.eps": config.optimizer.eps,
        "optimizer.decay_1d": config.optimizer.decay_1d,
        "architecture": asdict(architecture),
    }


def announce(
    metrics: Metrics, config: RunConfig, mesh: Mesh, loader: Loader, progress: Progress
) -> None:
    """Say what is about to happen, before the first step."""
    metrics.say(
        f"{config.name}: {mesh.world.size} process(es) on {mesh.device.type}: tensor "
        f"{mesh.tensor.size}{' + sequence' if mesh.sequence else ''}, pipeline "
        f"{mesh.pipeline.size}, data {mesh.data.size}; {config.train.precision}"
    )
    metrics.say(
        f"{loader.packs_per_step} packs a step (about {loader.examples_per_step:.0f} examples), "
        f"{loader.steps_per_epoch} steps an epoch, {config.train.steps} steps "
        f"({config.train.steps / loader.steps_per_epoch:.2f} epochs)"
    )
    if progress.step >= config.train.steps:
        metrics.say(f"nothing to do: train.steps is {config.train.steps}")
    if progress.step:
        metrics.say(f"resumed after step {progress.step} from {config.folder}")


def due(step: int, every: int, last: int) -> bool:
    """Whether a thing done `every` so many steps, and at the last one, is due after `step`."""
    return step == last or (every > 0 and step % every == 0)
