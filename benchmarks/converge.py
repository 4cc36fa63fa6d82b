"""Llama-3.2-1B's shape trained in bf16 and in FP8 from the same random weights: curves compared.

    python benchmarks/converge.py [--device cuda|cpu] [--steps N] [--fp8 NAME ...]
                                  [--minutes N] [--json FILE]

Each document is a Markov chain: with probability 0.9 the current token determines the next one;
otherwise the next is drawn at random. The loss falls from the logarithm of the vocabulary towards
1.2 nats within a few hundred steps. Each step takes new packs. On a CPU, a tiny shape is trained,
in bf16 only, but under `python -m tests.te`.
"""

import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import EMULATED, Deadline, machine, require
from train_step import TINY, architecture
from train_step_turn import RandomWeights

from mcore_sft.base.files import write_named
from mcore_sft.base.terminal import Console, Parser
from mcore_sft.checkpoint import weights
from mcore_sft.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from mcore_sft.data.packs.batch import Batch, collate
from mcore_sft.data.packs.pack import Pack
from mcore_sft.data.text.prompt import Example
from mcore_sft.model import build
from mcore_sft.runtime.mesh import connect
from mcore_sft.training import optimizer as optim
from mcore_sft.training.step import train_step

LLAMA_1B: dict[str, Any] = TINY | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "rope_parameters": TINY["rope_parameters"] | {"factor": 32.0},
}
SHAPES = {"cuda": LLAMA_1B, "cpu": TINY | {"num_hidden_layers": 2}}
LENGTH = {"cuda": 4096, "cpu": 256}
PACKS, DOCUMENT, WARM_UP = 2, 8, 20
"""Packs of a step, documents of a pack, steps until the whole learning rate."""
CHAINED = {"cuda": 4096, "cpu": 128}
"""Tokens that the documents are made of."""
RATE = {"cuda": 3e-4, "cpu": 3e-3}
AREA = 0.02
"""How far the mean loss in FP8 may be from that in bf16, as a share of it."""

NAMES = {"none": "bf16"}
SAID = 25
"""Steps from one that is printed to the next."""

console = Console(width=120)


def batches(device: str, number: int) -> list[Batch]:
    """The packs of step `number`."""
    draw = np.random.default_rng(number)
    follows = np.random.default_rng(0).permutation(CHAINED[device])
    size = LENGTH[device] // DOCUMENT
    packs = []
    for _ in range(PACKS):
        tokens = draw.integers(0, len(follows), (DOCUMENT, size), dtype=np.int32)
        kept = draw.random((DOCUMENT, size)) < 0.9
        for place in range(1, size):
            tokens[:, place] = np.where(
                kept[:, place], follows[tokens[:, place - 1]], tokens[:, place]
            )
        spans = np.array([[1, size]], np.int32)
        examples = tuple(Example(tokens=row, spans=spans) for row in tokens)
        packs.append(collate([Pack(examples=examples)], LENGTH[device], pad_id=0))
    return packs


def curve(device: str, fp8: str, steps: int) -> dict[str, Any]:
    """Losses and gradient norms of all steps, and the tokens a second of the later ones."""
    shape = SHAPES[device]
    model = architecture(shape)
    train = TrainConfig(precision="bf16", fp8=fp8)
    settings = OptimizerConfig(lr=RATE[device])
    losses, norms, seconds = [], [], []
    with connect(ParallelConfig()) as mesh:
        gpt = build.build(model, ModelConfig(path=Path()), train, mesh)
        optimizer = optim.build(settings, train, gpt, mesh)
        source = RandomWeights(shape, mesh.device)
        weights.load_pretrained(source, gpt, model, mesh)  # type: ignore[arg-type]
        source.draw.cache_clear()
        optimizer.reload_model_params()
        for number in range(steps):
            packs = batches(device, number)
            rate = RATE[device] * min(1.0, (number + 1) / WARM_UP)
            begun = time.perf_counter()
            taken = train_step(gpt, optimizer, packs, mesh, settings, rate)
            seconds.append(time.perf_counter() - begun)  # the loss has been read by then
            losses.append(taken.loss)
            norms.append(taken.grad_norm)
            if number % SAID == 0:  # the curve may take longer than there is time
                console.print(f"{NAMES.get(fp8, fp8)}, step {number + 1}: {taken.loss:.4f}")
    tokens = PACKS * LENGTH[device] / statistics.median(seconds[steps // 2 :])
    return {"losses": losses, "grad_norms": norms, "tokens_per_second": tokens}


def told(error: Exception) -> str:
    """The error in one line."""
    return f"not run: {type(error).__name__}: {error}".splitlines()[0]


def judged(name: str, curves: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is asked of a curve: all numbers, a loss that halves, FP8 beside bf16."""
    losses = curves[name]["losses"]
    first, last = statistics.mean(losses[:5]), statistics.mean(losses[-5:])
    found = {
        "first": first,
        "last": last,
        "met": bool(np.isfinite(losses).all()) and last < first / 2,
    }
    if name != "none" and "losses" in curves.get("none", {}):
        theirs = curves["none"]["losses"]
        found["area"] = abs(statistics.mean(losses) / statistics.mean(theirs) - 1)
        found["met"] = found["met"] and found["area"] <= AREA
    return found


def show(curves: dict[str, dict[str, Any]], steps: int) -> None:
    """The losses of some steps side by side."""
    names = [name for name in curves if "losses" in curves[name]]
    console.print("step " + "".join(f"{NAMES.get(n, n):>12}" for n in names))
    shown = sorted({0, 9, *range(24, steps, 25), steps - 1})
    for number in (number for number in shown if number < steps):
        row = "".join(f"{curves[name]['losses'][number]:12.4f}" for name in names)
        console.print(f"{number + 1:4d} {row}")
    for name, found in curves.items():
        console.print(f"{NAMES.get(name, name)}: {found['said']}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Train and print; 1 if a curve is not as it should be, or is not there."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fp8", nargs="*", default=["blockwise", "delayed", "tensorwise"])
    Deadline.add_to(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    require(options.device, parser)
    deadline = Deadline(options.minutes)
    packages = ("torch", "megatron-core", "transformer-engine")
    where = machine(*packages, device=torch.cuda.get_device_name() if cuda else None)
    console.print(", ".join(f"{key} {value}" for key, value in where.items()), soft_wrap=True)
    curves: dict[str, dict[str, Any]] = {}
    for name in ("none", *(options.fp8 if cuda or EMULATED else ())):
        if deadline.over:
            curves[name] = {"met": False, "said": deadline.reason}
            continue
        try:
            curves[name] = curve(options.device, name, options.steps)
            found = judged(name, curves)
            area = f", {found['area']:.2%} from bf16 in the mean" if "area" in found else ""
            curves[name] |= found | {
                "said": f"{found['first']:.3f} to {found['last']:.3f}{area}: "
                f"{'met' if found['met'] else 'MISSED'}; "
                f"{curves[name]['tokens_per_second']:,.0f} tokens/s"
            }
        except Exception as error:  # one failed curve does not stop the others
            curves[name] = {"met": False, "said": told(error)}
        if engine := sys.modules.get("transformer_engine.pytorch.quantization"):
            engine.FP8GlobalStateManager.reset()  # it holds the scales of the layers of a curve
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        if options.json:
            write_named(options.json, json.dumps({**where, "curves": curves}, indent=1) + "\n")
    show(curves, options.steps)
    return int(not all(found["met"] for found in curves.values()))


if __name__ == "__main__":
    sys.exit(main())
