"""The pipeline that ours is measured against: datasets.map, `tokenizers`, Megatron's builder.

    python benchmarks/preprocess_peer.py JOB.json        ->  tokens, mask and packs; prints seconds

Written as users write it, with what makes it fast: batches, a process for each core, every process
one thread, no cache, NumPy instead of lists. Its clock starts when everything is imported.

JOB.json: rows (JSON lines), tokenizer (tokenizer.json), before, between and after (the strings
around problem and solution), sequence_length, processes, output (a folder).
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tokenizers import Tokenizer

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

Job = Mapping[str, Any]


def encoded(job: Job, cache: str) -> datasets.Dataset:
    """Tokens and mask of every row."""
    tokenizer = Tokenizer.from_file(job["tokenizer"])
    before, between, after = job["before"], job["between"], job["after"]

    def encode(batch: Mapping[str, Sequence[str]]) -> dict[str, list[list[int]]]:
        asked = [before + problem + between for problem in batch["problem"]]
        learned = [solution + after for solution in batch["solution"]]
        prompts = tokenizer.encode_batch_fast(asked, add_special_tokens=False)
        answers = tokenizer.encode_batch_fast(learned, add_special_tokens=False)
        pairs = [(p.ids, a.ids) for p, a in zip(prompts, answers, strict=True)]
        pairs = [(p, a) for p, a in pairs if len(p) + len(a) <= job["sequence_length"]]
        return {
            "tokens": [p + a for p, a in pairs],
            "mask": [[0] * len(p) + [1] * len(a) for p, a in pairs],
        }

    rows = datasets.load_dataset("json", data_files=job["rows"], split="train", cache_dir=cache)
    kinds = {"tokens": datasets.Value("int32"), "mask": datasets.Value("int8")}
    return rows.map(
        encode,
        batched=True,
        num_proc=job["processes"],
        remove_columns=rows.column_names,
        features=datasets.Features({name: datasets.List(kind) for name, kind in kinds.items()}),
        load_from_cache_file=False,
    )


def greedy_packs(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """A new pack whenever the next example does not fit into the last one."""
    packs: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if length > room:
            packs.append([])
            room = capacity
        packs[-1].append(index)
        room -= length
    return packs


def main() -> None:
    """Do the job of the file that is named."""
    job: Job = json.loads(Path(sys.argv[1]).read_text())
    output = Path(job["output"])
    output.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process for each core does it better
    datasets.disable_progress_bars()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=output) as cache:
        kinds = {"tokens": np.int32, "mask": np.int8}
        builders = {
            name: IndexedDatasetBuilder(str(output / f"{name}.bin"), dtype=kind)
            for name, kind in kinds.items()
        }
        lengths: list[int] = []
        for batch in encoded(job, cache).with_format("numpy").iter(1000):
            for name, builder in builders.items():
                for column in batch[name]:
                    builder.add_document(column, [len(column)])
            lengths.extend(map(len, batch["tokens"]))
        for name, builder in builders.items():
            builder.finalize(str(output / f"{name}.idx"))
    packs = greedy_packs(lengths, job["sequence_length"])
    (output / "packs.json").write_text(json.dumps(packs))
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "tokens": sum(lengths), "packs": len(packs)}))


if __name__ == "__main__":
    main()
