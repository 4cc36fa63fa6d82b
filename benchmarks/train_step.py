"""The training step of Llama-3.1-8B's layers against transformers and Megatron-core's own loss.

    python benchmarks/train_step.py [--device cuda|cpu] [--quick] [--layers N] [--only NAME ...]
                                    [--minutes N] [--json FILE]

As many layers as fit, random weights, synthetic packs; on the CPU a tiny shape, whose figures say
nothing, and FP8 under `python -m tests.te` alone. Every turn of a contestant is a process of its
own (train_step_turn.py), since only one model with AdamW's states fits; turns are interleaved, in a
new order each round, and a turn's first steps do not count. In each turn, loss and gradient norm of
the first step are first compared with those of transformers in fp32, document by document; what is
wrong is shown and not timed.

Documents are log-normal in length, with a mean of 512 tokens as OpenMathInstruct-2 has (about 8 in
4,096), and 20 to 45 % of each is prompt, which is masked. A step is 32,768 tokens: what each of 8
GPUs has of 512 examples. All contestants keep fp32 gradients, main weights and moments, update by
torch's fused AdamW and compute the gradient norm. FLOP/s are those of mcore_sft/training/flops.py,
MFU is their share of the dense bf16 peak, under FP8 too. `layers` is forward and backward between
the embedding's output and the last norm's. One more step of a turn is taken under torch's profiler,
for its kernels.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import kernels
import numpy as np
import torch
from machine import EMULATED, Deadline, machine, require
from rich.box import SIMPLE
from rich.table import Table

from mcore_sft.base.files import write_named
from mcore_sft.base.terminal import Console, Parser
from mcore_sft.data.packs.batch import Batch, collate
from mcore_sft.data.packs.pack import Pack
from mcore_sft.data.text.prompt import Example
from mcore_sft.model import families
from mcore_sft.model.architecture import Architecture
from mcore_sft.plan import memory
from mcore_sft.plan.layout import SUPERVISED, Layout
from mcore_sft.runtime.hardware import peak_flops
from mcore_sft.training.flops import step_flops

TURN = Path(__file__).with_name("train_step_turn.py")
WARM = 2  # steps of each turn that are left out
TOLERANCE = {"none": (5e-4, 2e-2), "fp8": (5e-3, 1e-1)}
"""How far loss and gradient norm of the first step may be from the fp32 reference, relatively."""
LOGIT_BYTES = 16
"""A peer's for each logit: bf16, fp32, its log-softmax, and the gradients of the first two."""

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
TINY = LLAMA_8B | {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
}

console = Console(width=170)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way of taking the step; `kind` is known to train_step_turn.py."""

    name: str
    kind: str
    fp8: str = "none"


OURS = "ours, bf16"
CONTESTANTS = (
    Contestant(name=OURS, kind="ours"),
    *(
        Contestant(name=f"ours, fp8 {recipe}", kind="ours", fp8=recipe)
        for recipe in ("blockwise", "delayed", "tensorwise")
    ),
    Contestant(name="Megatron-core's own loss, bf16", kind="megatron"),
    Contestant(name="transformers, bf16", kind="transformers"),
    Contestant(name="transformers with Liger, bf16", kind="liger"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What all contestants compute: the shape, and packs of `length` tokens."""

    device: str
    shape: dict[str, Any]
    length: int
    packs: int
    """Of one step, each a micro-batch."""
    mean: int
    """Tokens of a document."""
    steps: int
    """Of one turn, the first `WARM` of which do not count."""
    seed: int = 0


@dataclass
class Result:
    """What a contestant showed; times are lists of turns of lists of steps, in seconds."""

    contestant: Contestant
    length: int
    note: str = ""
    """How it was set up, where that is not said by its name."""
    reason: str = ""
    """Why there are no figures."""
    loss: float | None = None
    grad_norm: float | None = None
    seconds: list[list[float]] = field(default_factory=list)
    layer_seconds: list[list[float]] = field(default_factory=list)
    peak_bytes: int = 0
    kernels: list[dict[str, Any]] = field(default_factory=list)
    """Of one step."""

    def add(self, told: dict[str, Any]) -> None:
        """Take up what one turn told."""
        for name in ("note", "reason", "loss", "grad_norm"):
            setattr(self, name, told.get(name, getattr(self, name)))
        if not self.reason:
            self.seconds.append(told["seconds"])
            self.layer_seconds.append(told["layer_seconds"])
            self.peak_bytes = max(self.peak_bytes, told["peak_bytes"])
            self.kernels = told["kernels"]


# ---- what is computed


def batches(case: Case) -> list[Batch]:
    """The packs of the one step that is taken again and again, drawn from the seed."""
    draw = np.random.default_rng(case.seed)
    room, spread = case.packs * case.length, 0.5
    location = np.log(case.mean) - spread**2 / 2
    drawn = draw.lognormal(location, spread, 2 * room // case.mean).astype(int)
    drawn = drawn.clip(case.mean // 8, case.length)
    packs: list[list[int]] = [[] for _ in range(case.packs)]
    for size in sorted(drawn[drawn.cumsum() <= room].tolist(), reverse=True):
        # What fits nowhere is left out.
        chosen = next((pack for pack in packs if sum(pack) + size <= case.length), [])
        chosen.append(size)
    return [collate([_pack(case, sizes, draw)], case.length, pad_id=0) for sizes in packs]


def _pack(case: Case, sizes: list[int], draw: np.random.Generator) -> Pack:
    """Random documents of these sizes, whose prompts are masked."""
    examples = []
    for size in sizes:
        tokens = draw.integers(0, case.shape["vocab_size"], size, dtype=np.int32)
        prompt = int(size * draw.uniform(0.2, 0.45))
        examples.append(Example(tokens=tokens, spans=np.array([[prompt, size]], np.int32)))
    return Pack(examples=tuple(examples))


def workload(case: Case) -> dict[str, Any]:
    """What one step holds."""
    made = batches(case)
    sizes = list(chain.from_iterable(torch.diff(batch.starts).tolist() for batch in made))
    documents = list(chain.from_iterable(_documents(batch) for batch in made))
    return {
        "sequence_length": case.length,
        "packs": case.packs,
        "layers": case.shape["num_hidden_layers"],
        "total": sum(sizes),
        "useful": sum(batch.useful for batch in made),
        "supervised": sum(batch.supervised for batch in made),
        "lengths": documents,
        "squares": sum(size**2 for size in documents),
    }


def _documents(batch: Batch) -> list[int]:
    """Tokens of each document that is not padding."""
    sizes: list[int] = torch.diff(batch.starts).tolist()
    return sizes[: batch.examples]


def architecture(shape: dict[str, Any]) -> Architecture:
    """Our own words for it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(shape))
        return families.read(Path(folder))


def layers_that_fit(shape: dict[str, Any], length: int, room: int) -> int:
    """Layers with AdamW's states, and the logits that a peer keeps of all rows, in `room` bytes."""
    one = architecture(shape | {"num_hidden_layers": 1})

    def total(layers: int) -> float:
        parts = memory.memory(
            replace(one, layers=layers),
            Layout(),
            0,
            precision="bf16",
            sequence_length=length,
            supervised=SUPERVISED,
            micro_batches=1,
        )
        return parts.total - parts.workspace + LOGIT_BYTES * length * one.vocab

    fitting = [layers for layers in range(1, 33) if total(layers) <= room]
    if not fitting:
        raise SystemExit(
            f"one layer takes {total(1) / 1e9:.0f} GB, but the GPU has {room / 1e9:.0f} GB free of "
            "what its runtime takes: run this on a larger GPU"
        )
    return fitting[-1]


def cases_of(device: str, *, quick: bool, layers: int | None) -> list[Case]:
    """The packs of 4096 and of 8192 tokens (`quick`: the former alone); tiny ones on the CPU."""
    if device == "cpu":
        shape, lengths, tokens, mean = TINY, (256, 512), 1024, 32
        layers = layers or 2
    else:
        shape, lengths, tokens, mean = LLAMA_8B, (4096, 8192), 32768, 512
        # A tenth is left to CUDA, the libraries and what the allocator cannot use.
        room = int(0.9 * torch.cuda.get_device_properties(0).total_memory)
        layers = layers or layers_that_fit(shape, lengths[-1], room)
    return [
        Case(
            device=device,
            shape=shape | {"num_hidden_layers": layers},
            length=length,
            packs=tokens // length,
            mean=mean,
            steps=WARM + (4 if quick else 8),
        )
        for length in (lengths[:1] if quick else lengths)
    ]


# ---- how it is measured


def in_own_process(job: dict[str, Any], deadline: Deadline) -> dict[str, Any]:
    """What train_step_turn.py tells of `job`, or why it tells nothing."""
    if deadline.over:
        return {"reason": deadline.reason, "late": True}
    environment = dict(os.environ)
    if job["case"]["device"] == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.json")
        file.write_text(json.dumps(job))
        try:
            done = subprocess.run(
                [sys.executable, *(("-m", "tests.te") if EMULATED else ()), str(TURN), str(file)],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=deadline.left,
            )
        except subprocess.TimeoutExpired:
            return {"reason": f"{deadline.reason}, and it was not done", "late": True}
    try:
        told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"reason": f"not run: exit code {done.returncode}: {last}"}
    if done.returncode:  # it ended badly after its figures were told
        told["note"] = f"{told.get('note', '')} exit code {done.returncode}".strip()
    return told


def runs_on(device: str, contestant: Contestant) -> bool:
    """Whether a contestant can run there: FP8 takes Transformer Engine, Liger a GPU."""
    if contestant.fp8 != "none" and EMULATED:
        return True
    return device == "cuda" or (contestant.fp8 == "none" and contestant.kind != "liger")


def measure(
    case: Case,
    contestants: Sequence[Contestant],
    rounds: int,
    reference: dict[str, float],
    deadline: Deadline,
) -> list[Result]:
    """All contestants, taking turns; who fails once has no further turn.

    The first round goes as they are named: where time is short, what is asked first has run. Later
    ones that it does not suffice for are left out.
    """
    results = [Result(contestant, case.length) for contestant in contestants]
    for result in results:
        if not runs_on(case.device, result.contestant):
            result.reason = "not run: it takes an NVIDIA GPU"
    order = random.Random(0)
    for number in range(rounds):
        for result in order.sample(results, len(results)) if number else results:
            if result.reason or (number and deadline.over):
                continue
            name = result.contestant.name
            console.print(f"{case.length} tokens, round {number + 1} of {rounds}: {name}")
            tolerance = TOLERANCE["none" if result.contestant.fp8 == "none" else "fp8"]
            job = {"contestant": asdict(result.contestant), "case": asdict(case)}
            expected = {"reference": reference, "tolerance": tolerance}
            told = in_own_process(job | expected, deadline)
            if not (told.pop("late", False) and result.seconds):
                result.add(told)
    return results


def row_of(
    result: Result, work: dict[str, Any], flops: float, peak: float | None
) -> dict[str, Any]:
    """Raw figures and those that are computed from them, but for what compares two contestants."""
    row = asdict(result) | {"contestant": result.contestant.name, "fp8": result.contestant.fp8}
    if result.reason or not result.seconds:
        return row
    seconds, layers = (
        statistics.median(chain.from_iterable(turn[WARM:] for turn in turns))
        for turns in (result.seconds, result.layer_seconds)
    )
    return row | {
        "step_ms": 1e3 * seconds,
        "layers_ms": 1e3 * layers,
        "useful_per_second": work["useful"] / seconds,
        "total_per_second": work["total"] / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / peak if peak else None,
    }


def rows_of(case: Case, results: list[Result], peak: float | None) -> list[dict[str, Any]]:
    """A row for each contestant, with its speed-up over the first, which is ours in bf16."""
    work = workload(case)
    flops = step_flops(
        architecture(case.shape),
        tokens=work["useful"],
        supervised=work["supervised"],
        squares=work["squares"],
    )
    rows = [row_of(result, work, flops, peak) for result in results]
    base = rows[0]
    for row in rows:
        if "step_ms" in row and "step_ms" in base:
            row["step_speedup"] = base["step_ms"] / row["step_ms"]
            row["layers_speedup"] = base["layers_ms"] / row["layers_ms"]
    return rows


def goals_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at, with the figure reached; None where one that is needed has not run."""
    found = []
    for length in sorted({row["length"] for row in rows}):
        of = {row["contestant"]: row for row in rows if row["length"] == length}
        asked = [("bf16 MFU", OURS, "mfu", 0.5)]
        for name, row in of.items():
            if row["fp8"] != "none":
                asked.append((f"{name}: layers over bf16", name, "layers_speedup", 1.35))
                asked.append((f"{name}: step over bf16", name, "step_speedup", 1.2))
        reached = [(text, goal, of[name].get(figure)) for text, name, figure, goal in asked]
        for name, row in of.items():
            if not name.startswith("ours"):
                theirs = row.get("step_speedup")
                reached.append((f"{OURS}: step over {name}", 1.0, theirs and 1 / theirs))
        found += [
            {
                "length": length,
                "goal": text,
                "at_least": goal,
                "reached": value,
                "met": None if value is None else value >= goal,
            }
            for text, goal, value in reached
        ]
    return found


# ---- how it is shown


COLUMNS = {
    "step_ms": ("step, ms", "{:.1f}", 1.0),
    "layers_ms": ("layers, ms", "{:.1f}", 1.0),
    "useful_per_second": ("useful tokens/s", "{:,.0f}", 1.0),
    "total_per_second": ("all tokens/s", "{:,.0f}", 1.0),
    "tflops": ("TFLOP/s", "{:.3g}", 1.0),
    "mfu": ("MFU", "{:.1f} %", 100.0),
    "layers_speedup": ("layers, of bf16", "{:.2f}", 1.0),
    "step_speedup": ("step, of bf16", "{:.2f}", 1.0),
    "peak_bytes": ("peak, GB", "{:.1f}", 1e-9),
    "loss": ("first loss", "{:.4f}", 1.0),
    "grad_norm": ("its norm", "{:.4g}", 1.0),
}


def table(rows: list[dict[str, Any]]) -> Table:
    """A row for each contestant and length; what has no figures says why below the table."""
    made = Table(box=SIMPLE, collapse_padding=True)
    made.add_column("length", justify="right", no_wrap=True)
    made.add_column("", no_wrap=True)
    for name, _, _ in COLUMNS.values():
        made.add_column(name, justify="right")
    for row in rows:
        figures = [
            "" if not row.get(key) else form.format(scale * row[key])
            for key, (_, form, scale) in COLUMNS.items()
        ]
        made.add_row(str(row["length"]), row["contestant"], *figures)
    return made


def show(report: dict[str, Any]) -> None:
    """The table, what is to be known of its rows, and the goals."""
    console.print(table(report["rows"]))
    notes = [
        f"  {row['contestant']}: {text}"
        for row in report["rows"]
        for text in (row["reason"] and f"{row['length']} tokens: {row['reason']}", row["note"])
        if text
    ]
    for note in dict.fromkeys(notes):
        console.print(note, soft_wrap=True)
    for row in report["rows"]:
        if row["kernels"]:
            console.print(f"\n{row['contestant']}, {row['length']} tokens, one step:")
            console.print("\n".join(kernels.lines(row["kernels"])), soft_wrap=True)
    for goal in report["goals"]:
        reached = "not measured" if goal["met"] is None else f"{goal['reached']:.2f}"
        verdict = {None: "", True: ": met", False: ": MISSED"}[goal["met"]]
        line = f"{goal['length']} tokens, {goal['goal']} at least {goal['at_least']}: "
        console.print(f"goal, {line}{reached}{verdict}")


def describe(work: dict[str, Any], reference: dict[str, float]) -> str:
    """One line of the packs of a case."""
    lengths = work["lengths"]
    return (
        f"{work['sequence_length']} tokens x {work['packs']} packs, {work['layers']} layers: "
        f"{len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens, mean "
        f"{statistics.mean(lengths):.0f}; {work['useful'] / work['total']:.1%} useful, "
        f"{work['supervised'] / work['total']:.1%} supervised; fp32 reference: loss "
        f"{reference['loss']:.4f}, gradient norm {reference['grad_norm']:.4g}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 if ours is wrong, or does not run where it should."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="the shorter packs, one turn each")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"whose names begin so, and {OURS}"
    )
    parser.add_argument("--layers", type=int, help="default: as many as fit; 2 on the CPU")
    Deadline.add_to(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    if options.layers is not None and options.layers < 1:
        parser.error(f"--layers: expected at least 1, given {options.layers}")
    require(options.device, parser)
    deadline = Deadline(options.minutes)
    asked = (OURS, *options.only) if options.only else ("",)
    contestants = [one for one in CONTESTANTS if one.name.startswith(asked)]
    packages = ("torch", "transformers", "megatron-core", "transformer-engine", "flash-attn")
    device = torch.cuda.get_device_name() if options.device == "cuda" else None
    where = machine(*packages, device=device) | {"cuda": torch.version.cuda}
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    peak = peak_flops(torch.device(options.device))
    report: dict[str, Any] = {**where, "peak_flops": peak, "tolerance": TOLERANCE}
    report |= {"cases": [], "rows": [], "goals": []}
    for case in cases_of(options.device, quick=options.quick, layers=options.layers):
        work = workload(case)
        reference = in_own_process(
            {"contestant": {"kind": "reference"}, "case": asdict(case)}, deadline
        )
        if "reason" in reference:
            console.print(f"{case.length} tokens: the reference was {reference['reason']}")
            reference = {"loss": float("nan"), "grad_norm": float("nan")}
        console.print(describe(work, reference))
        rounds = 1 if options.quick else 3
        results = measure(case, contestants, rounds, reference, deadline)
        report["cases"].append(asdict(case) | {"workload": work, "reference": reference})
        report["rows"] += rows_of(case, results, peak)
    report["goals"] = goals_of(report["rows"]) if options.device == "cuda" else []
    show(report)
    if options.json:
        write_named(options.json, json.dumps(report, indent=1) + "\n")
    failed = [
        row
        for row in report["rows"]
        if row["contestant"].startswith("ours")
        and row["reason"]
        and (options.device == "cuda" or EMULATED or row["fp8"] == "none")
    ]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
