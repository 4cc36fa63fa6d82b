"""Our training step against TRL's SFTTrainer on CPU: useful tokens a second, and the same loss.

    python benchmarks/train_cpu.py --data DIR --tokenizer DIR [--quick] [--json FILE]

DIR has gsm8k/train.jsonl (question, answer). One process and all cores each, fp32, the same random
model, the same examples, packs of the same length and as many in a step; whose optimizer, clipping
and learning rate are the same. The two take turns, and the first steps of each turn do not count.
Before that, the loss of our first step is compared with what transformers computes for the same
examples one by one. TRL is not a dependency: `pip install trl` beside the package.
"""

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from machine import machine
from rich.box import SIMPLE
from rich.table import Table
from transformers import AutoModelForCausalLM

from mcore_sft import config as configuration
from mcore_sft.base.files import write_named
from mcore_sft.base.terminal import Console, Parser
from mcore_sft.config import RunConfig
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.packs.loader import Loader
from mcore_sft.data.text.tokenizer import load_tokenizer

HERE = Path(__file__).parent
ROOT = HERE.parent
LENGTH, PACKS, LR = 1024, 4, 1e-4
WARM = 2  # steps of each turn that are left out

console = Console(width=120)


def prepare(data: Path, tokenizer: Path, folder: Path, rows: int) -> RunConfig:
    """A random model, a packed dataset, and the experiment that names both."""
    lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").split("\n")[:rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = load_tokenizer(tokenizer).special_tokens
    run(
        *("tools/make_random_model.py", "--output", str(folder / "model")),
        *("--tokenizer", str(tokenizer), "--shape", "small", "--hidden", "512", "--heads", "8"),
        *("--kv-heads", "4", "--head-dim", "64", "--intermediate", "1408", "--layers", "6"),
    )
    experiment = {
        "name": "train_cpu",
        "output": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        "prompt": {
            "template": "chatml" if "<|im_end|>" in special else "llama3-instruct",
            "instruction": "generic/math",
        },
        "data": {
            "root": str(folder),
            "packed": str(folder / "packed"),
            "train": [{"path": "rows.jsonl", "problem": "question", "solution": "answer"}],
            "sequence_length": LENGTH,
        },
        "train": {"packs": PACKS, "precision": "fp32"},
        "optimizer": {"lr": LR, "betas": [0.9, 0.999], "weight_decay": 0.0, "clip_grad": 1.0},
        "checkpoint": {"resume": False},
    }
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment))
    run("tools/preprocess.py", "--config", str(file))
    return configuration.load(file)


def run(*command: str) -> str:
    """Run a program of this folder's; its errors end the benchmark."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def ours(config: RunConfig, steps: int, turn: int) -> dict[str, Any]:
    """Seconds, tokens and losses of our steps."""
    folder = config.folder.with_name(f"run-{turn}")
    file = config.folder.with_name("experiment.yaml")
    run("mcore_sft/train.py", "--config", str(file), f"output={folder}", f"train.steps={steps}")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    taken = [step for step in map(json.loads, lines) if "loss" in step]
    return {
        "seconds": [step["step_seconds"] for step in taken],
        "tokens": [step["tokens"] for step in taken],
        "losses": [step["loss"] for step in taken],
    }


def theirs(config: RunConfig, steps: int, folder: Path) -> dict[str, Any]:
    """The same of TRL."""
    job = {
        "model": str(config.model.path),
        "dataset": str(config.packed),
        "sequence_length": LENGTH,
        "packs_per_step": PACKS,
        "steps": steps,
        "lr": LR,
    }
    (folder / "job.json").write_text(json.dumps(job))
    out = run(str(HERE / "train_cpu_peer.py"), str(folder / "job.json"))
    told: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return {**told, "tokens": [told["tokens_per_step"]] * len(told["seconds"])}


def reference_loss(config: RunConfig) -> float:
    """Loss of our first step's examples by transformers, each by itself."""
    loader = Loader(
        PackedDataset(config.packed, verify=False),
        packs_per_step=PACKS,
        micro_batch=1,
        seed=config.train.seed,
        last_step=config.train.last_step,
        rank=0,
        size=1,
        pad_id=0,
    )
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in loader.batches(0):
            learned = batch.rows.tolist()
            starts = batch.starts.tolist()
            for start, end in pairwise(starts):
                rows = [row for row in learned if start <= row < end]
                if not rows:
                    continue
                logits = model(batch.tokens[:, start:end]).logits[0, [row - start for row in rows]]
                labels = batch.labels[0, rows]
                total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
                count += len(rows)
    return total / count


def rate(turns: list[dict[str, Any]]) -> float:
    """Median of the useful tokens a second of all steps that count."""
    rates: list[float] = [
        tokens / seconds
        for turn in turns
        for tokens, seconds in zip(turn["tokens"][WARM:], turn["seconds"][WARM:], strict=True)
    ]
    return statistics.median(rates)


def main() -> int:
    """Measure and print; 1 if the losses differ."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of gsm8k/train.jsonl")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="one short turn each")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    try:
        version("trl")
    except PackageNotFoundError:
        raise SystemExit("TRL is not installed: pip install trl") from None
    where = machine("torch", "transformers", "trl", "megatron-core")
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    turns, steps = (1, 4) if options.quick else (3, 8)
    mine: list[dict[str, Any]] = []
    peer: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = prepare(options.data.absolute(), options.tokenizer.absolute(), folder, 4000)
        expected = reference_loss(config)
        for turn in range(turns):
            mine.append(ours(config, steps, turn))
            peer.append(theirs(config, steps, folder))
    differs = abs(mine[0]["losses"][0] - expected) > 1e-4 * expected
    ratio = rate(mine) / rate(peer)
    table = Table(box=SIMPLE)
    for column in ("", "tokens a second", "loss of step 1", f"loss of step {steps}"):
        table.add_column(column, justify="left" if not column else "right")
    for label, made in (("ours", mine), ("TRL", peer)):
        first, last = made[0]["losses"][0], made[0]["losses"][-1]
        table.add_row(label, f"{rate(made):,.0f}", f"{first:.4f}", f"{last:.4f}")
    table.add_row("transformers, one by one", "", f"{expected:.4f}", "")
    console.print(table)
    console.print(f"ratio {ratio:.2f} (goal: at least 1)")
    if options.json:
        found = {**where, "ratio": ratio, "expected": expected, "ours": mine, "trl": peer}
        write_named(options.json, json.dumps(found, indent=1) + "\n")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
