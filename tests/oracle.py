"""The oracle: a loop over transformers and torch's AdamW, in fp32. Packs in, a curve out.

    python -m tests.oracle --config FILE --curve OUT.json [key=value ...]

It takes the packs that a run takes in each step, but their examples one by one, and shares with the
trainer neither model, loss, optimizer, schedule nor batches.
"""

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from mcore_sft import command
from mcore_sft.config import OptimizerConfig, RunConfig
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.packs.loader import Loader, packs_of_a_step
from mcore_sft.data.text.prompt import Example
from mcore_sft.runtime.device import device as this_device
from mcore_sft.runtime.hardware import finish_work, peak_memory
from nightly.curve import Curve


def run(
    config: RunConfig,
    steps: int | None = None,
    after_update: Callable[[int, PreTrainedModel, torch.optim.AdamW], None] | None = None,
) -> Curve:
    """Train on what `config` names, as many `steps` of it or all; nothing is written.

    `after_update` is called with the number of updates, from 1, and what they changed.
    """
    device = this_device()
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    model.to(device)  # type: ignore[arg-type]
    settings = config.optimizer
    optimizer = adamw(model, settings)
    losses, norms, speeds, validation = [], [], [], {}
    taken = min(steps or config.train.steps, config.train.steps)
    for step, examples in enumerate(examples_of_steps(config, taken), start=1):
        begun = time.perf_counter()
        supervised = sum(len(learned(example)) for example in examples)
        optimizer.zero_grad()
        total = 0.0
        for example in examples:
            loss = summed_loss(model, example)
            (loss / supervised).backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        bound = settings.clip_grad or math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), bound)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, config.train.steps)
        optimizer.step()
        if after_update:
            after_update(step, model, optimizer)
        losses.append(total / supervised)
        norms.append(norm.item())
        finish_work(device)
        tokens = sum(len(example) for example in examples)
        speeds.append(tokens / (time.perf_counter() - begun))
        every = config.train.validate_every
        if every and (step % every == 0 or step == config.train.steps):
            validation[step] = validation_loss(model, config)
    return Curve(
        steps=tuple(range(1, taken + 1)),
        loss=tuple(losses),
        grad_norm=tuple(norms),
        tokens_per_second=tuple(speeds),
        validation=validation,
        peak_memory=peak_memory(device),
    )


def adamw(model: PreTrainedModel, settings: OptimizerConfig) -> torch.optim.AdamW:
    """Decay on all weights, or on all but norms and biases."""
    weights = list(model.parameters())
    decayed = [weight for weight in weights if settings.decay_1d or weight.dim() > 1]
    spared = [weight for weight in weights if not (settings.decay_1d or weight.dim() > 1)]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)


def learning_rate(settings: OptimizerConfig, step: int, steps: int) -> float:
    """Of the update numbered `step`, from 1, of `steps`."""
    warmup = settings.warmup_steps or round(settings.warmup_ratio * steps)
    if step <= warmup:
        return settings.lr * step / warmup
    share = (step - 1 - warmup) / (steps - warmup)
    to_go = (steps - step + 1) / steps
    fall = {
        "constant": 0.0,
        "linear": share,
        "cosine": (1 - math.cos(math.pi * share)) / 2,
        "wsd": 1 - min(1.0, to_go / settings.decay_ratio),
    }[settings.schedule]
    return settings.lr - (settings.lr - settings.min_lr) * fall


def summed_loss(model: PreTrainedModel, example: Example) -> Tensor:
    """Cross entropy of the learned tokens of one example, each predicted by what is before it."""
    tokens = torch.from_numpy(example.tokens.astype(np.int64)).to(model.device)
    positions = torch.from_numpy(learned(example)).to(model.device)
    logits = model(tokens[None]).logits[0, positions - 1]
    return cross_entropy(logits, tokens[positions], reduction="sum")


def learned(example: Example) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where the learned tokens of an example are; its first has nothing to be predicted by."""
    spans = [np.arange(max(start, 1), end) for start, end in example.spans.tolist()]
    return np.concatenate([np.zeros(0, dtype=np.int64), *spans])


def examples_of_steps(config: RunConfig, steps: int) -> Iterator[list[Example]]:
    """What a run learns from in each step, on whatever layout."""
    dataset = PackedDataset(config.packed)
    loader = Loader(
        dataset,
        packs_per_step=packs_of_a_step(config.train, dataset.num_examples / len(dataset)),
        micro_batch=1,
        seed=config.train.seed,
        last_step=config.train.last_step,
        rank=0,
        size=1,
        pad_id=0,
    )
    for step in range(steps):
        packs = [pack for micro_batch in loader.packs(step) for pack in micro_batch]
        yield [example for pack in packs for example in dataset.pack(pack).examples]


def validation_loss(model: PreTrainedModel, config: RunConfig) -> float:
    """Mean over the learned tokens of the validation packs."""
    dataset = PackedDataset(config.packed, "validation")
    packs = range(min(config.train.validation_packs or len(dataset), len(dataset)))
    examples = [example for pack in packs for example in dataset.pack(pack).examples]
    with torch.no_grad():
        total = sum(summed_loss(model, example).item() for example in examples)
    return total / sum(len(learned(example)) for example in examples)


def main() -> None:
    """Run what the command line names and write the curve."""
    parser = command.parser("A plain loop over transformers, to hold a training run against.")
    parser.add_argument("--curve", type=command.path, required=True, metavar="OUT.json")
    parser.add_argument("--steps", type=command.count, help="no more than so many")
    arguments = parser.parse_intermixed_args()
    config = command.experiment(arguments)
    run(config, arguments.steps).write(arguments.curve)


if __name__ == "__main__":
    command.run(main)
