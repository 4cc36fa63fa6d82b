"""Text to packed dataset against a plain pipeline: tokens a second, memory, packing, opening.

    python benchmarks/preprocess.py --data DIR --tokenizer DIR [--quick] [--rows N] [--json FILE]

DIR has math/train.jsonl, math/test.jsonl (problem, solution) and gsm8k/train.jsonl (question,
answer). Rows are made by drawing from the training sets and drawing every digit anew, so that no
two are alike and none is dropped as a duplicate.

Ours is `tools/preprocess.py` as a user runs it, with the start of its processes. The peer
(benchmarks/preprocess_peer.py) gets the first of the same rows, as many as it does in a minute or
so, and is timed without its imports; its ids and masks must be ours. The goals of both are those of
a million rows: with fewer, the start is most of it, and they are not judged. Memory is the sum over
all processes of their proportional set sizes (PSS), a few times a second.

The shuffled form is made twice more, as it is and in a control group that leaves room for no file
beside what the law of docs/data.md allows; where nobody may make such a group, that is said.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
import yaml
from machine import machine
from rich.box import SIMPLE
from rich.table import Table

from mcore_sft.base.files import write_named
from mcore_sft.base.terminal import Console, Parser
from mcore_sft.config import PromptConfig
from mcore_sft.data.indexed import IndexedTokens
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.selection.contamination import Contamination
from mcore_sft.data.text import chat_files
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import Tokenizer, load_tokenizer
from mcore_sft.ops.packing import best_fit_pack

HERE = Path(__file__).parent
CAPACITY = 4096
WORKERS = 2
PACKED_LENGTHS = 14_000_000

console = Console(width=120)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Something measured, and what is asked of it."""

    name: str
    value: float
    shown: str
    goal: str = ""
    met: bool = True
    known: bool = False
    """Whether anything else would be an error, and not only slow."""


# ---- the rows


def make_rows(data: Path, file: Path, count: int, *, seed: int = 0) -> None:
    """Write `count` distinct rows to `file`, unless they are there."""
    if file.is_file():
        return
    draw = np.random.default_rng(seed)
    lines = [line for line in source_lines(data) if sum(48 <= byte < 58 for byte in line) >= 8]
    partial = file.with_suffix(".partial")
    with partial.open("wb") as out:
        for first in range(0, count, 10_000):
            some = draw.integers(len(lines), size=min(10_000, count - first))
            text = np.frombuffer(b"".join([lines[i] for i in some.tolist()]), np.uint8).copy()
            digits = np.flatnonzero((text >= ord("0")) & (text <= ord("9")))
            text[digits] = draw.integers(ord("0"), ord("9") + 1, len(digits), dtype=np.uint8)
            out.write(text.tobytes())
    partial.rename(file)


def source_lines(data: Path) -> Iterator[bytes]:
    """Each pair of the training sets as a line in which digits are nothing but digits."""
    columns = {"math": ("problem", "solution"), "gsm8k": ("question", "answer")}
    for name, (problem, solution) in columns.items():
        for line in (data / name / "train.jsonl").open(encoding="utf-8"):
            row = json.loads(line)
            pair = {"problem": row[problem], "solution": row[solution]}
            made = json.dumps(pair, ensure_ascii=False).encode() + b"\n"
            if rb"\u" not in made.replace(rb"\\", b""):  # a control character, spelt in digits
                yield made


# ---- ours, and the peer


@dataclass(frozen=True)
class Ran:
    """A command that was run: wall time, what it printed, its processes' peak memory in bytes."""

    seconds: float
    printed: str
    pss: int
    anonymous: int


def run(command: list[str], group: Path | None = None) -> Ran:
    """Run `command`, in a control group, and watch it; its errors end the benchmark."""
    begin = time.perf_counter()
    if group is not None:
        command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
    peak = [0, 0]
    done = threading.Event()
    watching = threading.Thread(target=watch, args=(process.pid, peak, done))
    watching.start()
    printed, _ = process.communicate()
    seconds = time.perf_counter() - begin
    done.set()
    watching.join()
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)}: exit code {process.returncode}")
    return Ran(seconds, printed, *peak)


def watch(pid: int, peak: list[int], done: threading.Event) -> None:
    """Keep the largest sums of PSS and of its anonymous part over `pid` and all below it."""
    while not done.wait(0.2):
        sums = [0, 0]
        try:
            tree = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            return
        for one in tree:
            try:
                said = Path(f"/proc/{one}/smaps_rollup").read_text()
            except OSError:  # it has just ended
                continue
            sizes = dict(re.findall(r"^(Pss|Pss_Anon): +(\d+) kB", said, re.MULTILINE))
            sums[0] += 1024 * int(sizes.get("Pss", 0))
            sums[1] += 1024 * int(sizes.get("Pss_Anon", 0))
        peak[:] = map(max, peak, sums)


@contextmanager
def limited(size: int) -> Iterator[Path | None]:
    """A control group whose processes and files in memory have `size` bytes; None without leave."""
    root = Path("/sys/fs/cgroup")
    older = (root / "memory").is_dir()
    group = root / ("memory" if older else "") / f"mcore_sft_benchmark_{os.getpid()}"
    try:
        group.mkdir()
        limit = "memory.limit_in_bytes" if older else "memory.max"
        (group / limit).write_text(str(size))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def law(rows: int) -> float:
    """Bytes of anonymous memory that docs/data.md allows."""
    return 1e9 + 64 * rows + 200e6 * max(0, WORKERS - 2)


def template_for(tokenizer: Tokenizer) -> str:
    """A shipped template whose special tokens the tokenizer has."""
    return "chatml" if "<|im_end|>" in tokenizer.special_tokens else "llama3-instruct"


def run_ours(
    rows: Path,
    tokenizer: Path,
    prompt: dict[str, Any],
    columns: dict[str, str],
    output: Path,
    *overrides: str,
    group: Path | None = None,
) -> Ran:
    """`tools/preprocess.py` on `rows`, from nothing."""
    shutil.rmtree(output, ignore_errors=True)
    config = {
        "name": "benchmark",
        "model": {"path": str(rows.parent), "tokenizer": str(tokenizer)},
        "prompt": prompt,
        "data": {
            "root": str(rows.parent),
            "train": [{"path": rows.name, **columns}],
            "sequence_length": CAPACITY,
        },
    }
    file = rows.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    tool = str(HERE.parent / "tools" / "preprocess.py")
    places = [f"data.packed={output}", f"data.workers={WORKERS}"]
    return run([sys.executable, tool, "--config", str(file), *places, *overrides], group)


def run_peer(rows: Path, count: int, tokenizer: Path, prompt: Prompt, output: Path) -> Ran:
    """The peer on the first `count` of `rows`, from nothing."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    subset = output / "rows.jsonl"
    with rows.open("rb") as lines, subset.open("wb") as out:
        out.writelines(line for line, _ in zip(lines, range(count), strict=False))
    before, _, between = prompt.text("\0").partition("\0")
    job = {
        "rows": str(subset),
        "tokenizer": str(tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer),
        "before": before,
        "between": between,
        "after": prompt.answer("1 + 1", ""),
        "sequence_length": CAPACITY,
        "processes": WORKERS,
        "output": str(output),
    }
    file = output / "job.json"
    file.write_text(json.dumps(job))
    # Megatron-core warns at import that there is no Apex.
    return run([sys.executable, "-W", "ignore", str(HERE / "preprocess_peer.py"), str(file)])


def require_same(ours: Path, theirs: Path) -> int:
    """How many examples the peer made; all must have the ids and the trained tokens of ours."""
    dataset = PackedDataset(ours, verify=False)
    tokens, mask = IndexedTokens(theirs / "tokens"), read_mask(theirs / "mask.bin")
    place = 0
    for index in range(len(tokens)):
        example = dataset.example(index)
        trained = np.zeros(len(example), dtype=np.int8)
        for start, end in example.spans.tolist():
            trained[start:end] = 1
        alike = np.array_equal(tokens[index], example.tokens)
        if not alike or not np.array_equal(mask[place : place + len(example)], trained):
            raise SystemExit(f"example {index}: the peer has other ids, or trains other tokens")
        place += len(example)
    return len(tokens)


def read_mask(file: Path) -> npt.NDArray[np.int8]:
    """0 or 1 for each token, end to end."""
    return np.fromfile(file, dtype=np.int8)


def end_to_end(options: argparse.Namespace, work: Path) -> Iterator[Figure]:
    """Both pipelines, compared."""
    rows, packed = work / f"rows-{options.rows}.jsonl", work / f"packed-{options.rows}"
    make_rows(options.data, rows, options.rows)
    tokenizer = load_tokenizer(options.tokenizer)
    template = template_for(tokenizer)
    asked = {"template": template, "instruction": "generic/math"}
    columns = {"problem": "problem", "solution": "solution"}
    ran = run_ours(rows, options.tokenizer, asked, columns, packed)
    counts = json.loads((packed / "manifest.json").read_text())["splits"]["train"]
    if counts["dropped"].get("duplicate"):
        raise SystemExit(f"the rows are not distinct: {counts['dropped']}")

    rate = counts["tokens"] / ran.seconds
    told = f"{options.rows:,} rows, {counts['tokens']:,} tokens in {ran.seconds:.1f} s"
    yield Figure(name="rows to packed dataset", value=ran.seconds, shown=told)
    yield judged(
        options, at_least("ours, tokens a second", rate, 5e6, f"{rate / 1e6:.2f} M", ">= 5 M")
    )
    most = law(options.rows)
    memory, heap = f"{ran.pss / 1e6:.0f} MB", f"{ran.anonymous / 1e6:.0f} MB"
    yield at_most("ours, anonymous memory", ran.anonymous, most, heap, f"<= {most / 1e6:.0f} MB")
    yield Figure(name="  files in memory included (PSS)", value=ran.pss, shown=memory)
    efficiency = counts["packing_efficiency"]
    yield Figure(name="ours, packing efficiency", value=efficiency, shown=f"{efficiency:.2%}")

    wanted = PromptConfig(template=template, instruction="generic/math")
    prompt = Prompt.load(wanted, tokenizer)
    theirs = run_peer(rows, options.peer_rows, options.tokenizer, prompt, work / "peer")
    made = json.loads(theirs.printed.splitlines()[-1])
    examples = require_same(packed, work / "peer")
    peer_rate = made["tokens"] / made["seconds"]
    told = f"{peer_rate / 1e6:.2f} M ({examples:,} examples, ids and masks the same)"
    yield Figure(name="peer, tokens a second", value=peer_rate, shown=told)
    share = made["tokens"] / made["packs"] / CAPACITY
    yield Figure(name="peer, packing efficiency", value=share, shown=f"{share:.2%}")
    ratio = rate / peer_rate
    yield judged(options, at_least("ours / peer", ratio, 6, f"{ratio:.1f}", ">= 6"))
    yield from opening(packed)
    yield from shuffled(options, rows, asked, columns, work / "shuffled")


def shuffled(
    options: argparse.Namespace,
    rows: Path,
    prompt: dict[str, Any],
    columns: dict[str, str],
    packed: Path,
) -> Iterator[Figure]:
    """The rows in an order that is drawn, where memory holds the tokens and where it does not."""
    order, size = "data.filters.order=nemo_skills", int(law(options.rows))
    ran = run_ours(rows, options.tokenizer, prompt, columns, packed, order)
    made = json.loads((packed / "manifest.json").read_text())["fingerprint"]
    told = f"{ran.seconds:.1f} s, {ran.anonymous / 1e6:.0f} MB"
    yield Figure(name="shuffled", value=ran.seconds, shown=told)
    name = f"shuffled, in {size / 1e6:.0f} MB"
    with limited(size) as group:
        if group is None:
            yield Figure(name=name, value=0, shown="nobody here may limit memory")
            return
        ran = run_ours(rows, options.tokenizer, prompt, columns, packed, order, group=group)
    again = json.loads((packed / "manifest.json").read_text())["fingerprint"]
    if again != made:
        raise SystemExit(f"under a limit the dataset is {again}, expected {made}")
    yield Figure(name=name, value=ran.seconds, shown=f"{ran.seconds:.1f} s, the same bytes")


def conversations(options: argparse.Namespace, work: Path) -> Iterator[Figure]:
    """The same rows as conversations, through the same template as a chat template of Jinja."""
    rows, packed = work / f"rows-{options.rows}.jsonl", work / f"packed-{options.rows}"
    talks, folder = work / f"talks-{options.rows}.jsonl", work / "chat"
    make_talks(rows, talks)
    tokenizer = load_tokenizer(options.tokenizer)
    prompt = Prompt(template_for(tokenizer), None, tokenizer)
    chat_files.save(tokenizer, prompt, folder)
    asked = {"template": "chat", "instruction": None}
    ran = run_ours(talks, folder, asked, {"messages": "messages"}, packed)
    counts = json.loads((packed / "manifest.json").read_text())["splits"]["train"]
    rate = counts["tokens"] / ran.seconds
    name, shown = "conversations through a chat template, tokens a second", f"{rate / 1e6:.2f} M"
    yield judged(options, at_least(name, rate, 5e6, shown, ">= 5 M"))


def make_talks(rows: Path, file: Path) -> None:
    """Write `rows` as conversations to `file`, unless they are there."""
    if file.is_file():
        return
    partial = file.with_suffix(".partial")
    with rows.open(encoding="utf-8") as lines, partial.open("w", encoding="utf-8") as out:
        for line in lines:
            row = json.loads(line)
            said = (("user", row["problem"]), ("assistant", row["solution"]))
            messages = [{"role": role, "content": text} for role, text in said]
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    partial.rename(file)


def judged(options: argparse.Namespace, figure: Figure) -> Figure:
    """A figure whose goal is that of a million rows: with fewer, the start is most of it."""
    return figure if options.rows >= 1_000_000 else replace(figure, goal="")


# ---- parts of ours


def packing(count: int) -> Iterator[Figure]:
    """Lengths as those of OpenMathInstruct-2, packed on one core."""
    draw = np.random.default_rng(0)
    drawn = np.exp(draw.normal(5.9, 0.55, count)).astype(np.int32)
    lengths = torch.from_numpy(np.clip(drawn, 1, CAPACITY))
    seconds, packs = timed(lambda: best_fit_pack(lengths, CAPACITY, 42), times=3)
    (order, offsets), *others = packs
    same = [torch.equal(order, a) and torch.equal(offsets, b) for a, b in others]
    full = int(lengths.sum(dtype=torch.int64)) / ((len(offsets) - 1) * CAPACITY)
    name = f"packing {count:,} lengths"
    yield at_most(name, seconds, 0.5, f"{seconds:.3f} s", "< 0.5 s")
    yield at_least("  how full", full, 0.998, f"{full:.3%}", ">= 99.8%")
    yield exactly("  runs that differ", sum(not one for one in same), 0)


def opening(packed: Path) -> Iterator[Figure]:
    """Opening a dataset and reading its packs, the files in the page cache."""
    seconds, opened = timed(lambda: PackedDataset(packed, verify=False), times=5)
    name = f"opening {opened[0].num_examples:,} examples"
    yield at_most(name, seconds, 0.2, f"{1e3 * seconds:.1f} ms", "< 200 ms")
    seconds, (dataset,) = timed(lambda: PackedDataset(packed, verify=True), times=1)
    yield Figure(name="  with checksums", value=seconds, shown=f"{seconds:.2f} s")
    packs = np.random.default_rng(0).integers(len(dataset), size=2000).tolist()
    taken = statistics.median(timed(partial(dataset.pack, p), times=1)[0] for p in packs)
    yield at_most("  reading a pack", taken, 50e-6, f"{1e6 * taken:.1f} us", "< 50 us")


def contamination(data: Path) -> Iterator[Figure]:
    """What MATH's test and training sets share; known from comparing every pair."""
    train, test = (
        [json.loads(line)["problem"] for line in (data / "math" / name).open(encoding="utf-8")]
        for name in ("train.jsonl", "test.jsonl")
    )
    seconds, (found,) = timed(lambda: Contamination(test).check(train), times=1)
    told = f"{len(train):,} against {len(test):,} in {seconds:.1f} s"
    yield Figure(name="contamination of MATH", value=seconds, shown=told)
    equal = sum(finding.kind in ("exact", "normalized") for finding in found)
    yield exactly("  pairs of the same problem", equal, 2)
    near = len({f.benchmark_problem for f in found if f.kind != "13-gram"})
    yield exactly("  test problems at 0.9 of 8-grams", near, 31)


def timed(call: Callable[[], Any], *, times: int) -> tuple[float, list[Any]]:
    """The median time of a call in seconds, and what the calls gave."""
    seconds, made = [], []
    for _ in range(times):
        begin = time.perf_counter()
        made.append(call())
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), made


def at_least(name: str, value: float, limit: float, shown: str, goal: str) -> Figure:
    """A figure that is to be large."""
    return Figure(name=name, value=value, shown=shown, goal=goal, met=value >= limit)


def at_most(name: str, value: float, limit: float, shown: str, goal: str) -> Figure:
    """A figure that is to be small."""
    return Figure(name=name, value=value, shown=shown, goal=goal, met=value <= limit)


def exactly(name: str, value: int, expected: int) -> Figure:
    """A figure that is known."""
    shown, met = str(value), value == expected
    return Figure(name=name, value=value, shown=shown, goal=str(expected), met=met, known=True)


# ---- how it is shown


def show(figures: list[Figure]) -> None:
    """All figures, and which goals are met."""
    table = Table(box=SIMPLE)
    table.add_column(no_wrap=True)
    for column in ("measured", "goal"):
        table.add_column(column, justify="right")
    for figure in figures:
        verdict = "" if not figure.goal else " met" if figure.met else " MISSED"
        table.add_row(figure.name, figure.shown, figure.goal + verdict)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 if the two pipelines differ, or a known pair is not found."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="MATH and GSM8K")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="50,000 rows, about a minute")
    parser.add_argument("--rows", type=int, metavar="N", help="default: 1,000,000")
    parser.add_argument("--peer-rows", type=int, metavar="N", help="default: 100,000")
    parser.add_argument("--work", type=Path, default=Path("build/preprocess"), metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    options.rows = options.rows or (50_000 if options.quick else 1_000_000)
    options.peer_rows = min(
        options.rows, options.peer_rows or (20_000 if options.quick else 100_000)
    )
    options.data, options.tokenizer = options.data.resolve(), options.tokenizer.resolve()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    where = machine(
        "gigatoken", "tokenizers", "datasets", "pyarrow", "megatron-core", "numpy", "torch"
    )
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    figures = [
        *end_to_end(options, work),
        *conversations(options, work),
        *packing(PACKED_LENGTHS),
        *contamination(options.data),
    ]
    show(figures)
    if options.json:
        told = {**where, "rows": [asdict(figure) for figure in figures]}
        write_named(options.json, json.dumps(told, indent=1) + "\n")
    return int(any(figure.known and not figure.met for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
