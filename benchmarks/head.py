"""The head's step against its three products at the rate that this card reaches, in one run.

    python benchmarks/head.py [--device cuda|cpu] [--json FILE]

A card's rate is that of a large product of its own, not of its data sheet. The products of the step
(logits, gradients of the hidden states and of the weight) are timed apart, so that what the step
loses can be placed: in the sum in fp32 of the weight's gradient, or between the products.

N = rows, H = width, V = vocabulary rows. benchmarks/loss.py has the peers.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import kernels
import loss
import torch
from machine import machine, require

from mcore_sft.base.files import write_named
from mcore_sft.base.terminal import Console, Parser
from mcore_sft.ops import library

CASES = {
    "cuda": loss.H100,
    "cpu": loss.Case(device="cpu", rows=128, width=64, vocab=2048, dtype="bf16"),
}
SQUARE = {"cuda": 8192, "cpu": 512}
COPIED = {"cuda": 2**32, "cpu": 2**24}
"""Bytes, many times the caches."""
QUEUED = 2_000_000
"""Cycles that a GPU waits before a round: about a millisecond."""
GOAL = {0: 1.1, 35: 0.65 * 1.1}
"""Percent of masked rows -> the step over the products of all rows at the card's rate, at most."""

console = Console(width=140)


def milliseconds(call: Callable[[], object], device: str, rounds: int = 9, calls: int = 1) -> float:
    """Median time of a call, after two rounds that do not count.

    A GPU is kept waiting while the `calls` of a round are queued, so that it is never idle between
    them: launching takes a share of a short one.
    """
    times: list[float] = []
    for number in range(rounds + 2):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda._sleep(QUEUED)  # type: ignore[no-untyped-call]
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
            took = begin.elapsed_time(end) / calls
        else:
            started = time.perf_counter()
            call()
            took = 1e3 * (time.perf_counter() - started)
        if number > 1:
            times.append(took)
    return statistics.median(times)


def rates(case: loss.Case) -> dict[str, float]:
    """What the card reaches: TFLOP/s of products, TB/s of a copy, read and written."""
    device, n, h, v = case.device, case.rows, case.width, case.vocab
    made: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    x, weight, logits = (torch.randn(size, **made) for size in ((n, h), (v, h), (n, v)))
    total = torch.zeros(v, h, device=device)
    side = SQUARE[device]
    a, b = torch.randn(side, side, **made), torch.randn(side, side, **made)
    found = {"square": 2e-9 * side**3 / milliseconds(lambda: a @ b, device, calls=10)}
    products: dict[str, Callable[[], object]] = {
        "logits": lambda: x @ weight.t(),
        "dX": lambda: logits @ weight,
        "dW in bf16": lambda: logits.t() @ x,
    }
    if device == "cuda":  # a CPU has none: bf16 is rounded there before it is added
        add = torch.ops.aten.addmm.dtype_out
        products["dW added in fp32"] = lambda: add(total, logits.t(), x, total.dtype, out=total)
    for name, product in products.items():
        found[name] = 2e-9 * n * h * v / milliseconds(product, device)
    source = torch.empty(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2e-9 * COPIED[device] / milliseconds(lambda: target.copy_(source), device)
    return found


def step(case: loss.Case, rate: float) -> dict[str, Any]:
    """Time and memory of ours into main_grad, over the products of all rows at `rate`."""
    problem = loss.Problem(case)

    def take() -> None:
        problem.forget()
        loss.step(loss.ours_main_grad, problem)

    ms = milliseconds(take, case.device)
    floor = 6e-9 * case.rows * case.width * case.vocab / rate
    peak = 0
    if case.device == "cuda":
        peak = loss.cuda_memory(loss.ours_main_grad, problem, into_main_grad=True)
    limit = GOAL[case.masked] if case.device == "cuda" else None
    return {
        "masked": case.masked,
        "ms": ms,
        "floor_ms": floor,
        "of_floor": ms / floor,
        "goal": limit,
        "met": None if limit is None else ms / floor <= limit,
        "peak_bytes": peak,
        "kernels": kernels.kernels(take, case.device),
    }


def show(report: dict[str, Any]) -> None:
    """The rates, then each step with what it is made of."""
    units = {name: "TB/s" if name == "copy" else "TFLOP/s" for name in report["rates"]}
    for name, rate in report["rates"].items():
        console.print(f"{name}: {rate:.3g} {units[name]}")
    for found in report["steps"]:
        verdict = {None: "", True: "met", False: "MISSED"}[found["met"]]
        goal = "" if found["goal"] is None else f" (at most {found['goal']:.3f}: {verdict})"
        console.print(
            f"\n{found['masked']} % masked: {found['ms']:.2f} ms, {found['of_floor']:.3f} of the "
            f"{found['floor_ms']:.2f} ms of the products of all rows{goal}; peak "
            f"{found['peak_bytes'] / 1e9:.2f} GB"
        )
        for line in kernels.lines(found["kernels"]):
            console.print(line, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    require(options.device, parser)
    if options.device == "cuda":
        library.load_cuda()
    device = torch.cuda.get_device_name() if options.device == "cuda" else None
    case = CASES[options.device]
    report: dict[str, Any] = {**machine("torch", device=device), "case": str(case)}
    console.print(", ".join(f"{key} {value}" for key, value in report.items()))
    torch.manual_seed(0)
    report |= {"rates": rates(case), "steps": []}
    for masked in GOAL:
        report["steps"].append(step(replace(case, masked=masked), report["rates"]["square"]))
        if options.json:
            write_named(options.json, json.dumps(report, indent=1) + "\n")
    show(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
