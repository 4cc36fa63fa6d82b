"""The trainer that ours is measured against: TRL's SFTTrainer with packing, as its users set it up.

    python benchmarks/train_cpu_peer.py JOB.json     ->  JSON: seconds and tokens of every step

JOB.json: model (a Hugging Face folder), dataset (a packed dataset of ours, whose examples are taken
one by one and packed again by TRL), sequence_length, packs_per_step, steps, lr.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from mcore_sft.data.packs.dataset import PackedDataset


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Called by the trainer."""
        self._begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called by the trainer."""
        self.seconds.append(time.perf_counter() - self._begin)


def rows(folder: Path) -> Dataset:
    """Every example with the mask of what is learned."""
    packed = PackedDataset(folder, verify=False)
    found: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    for index in range(packed.num_distinct):
        example = packed.example(index)
        mask = np.zeros(len(example), np.int64)
        for start, end in example.spans:
            mask[start:end] = 1
        found["input_ids"].append(example.tokens.tolist())
        found["completion_mask"].append(mask.tolist())
    return Dataset.from_dict(found)


def main() -> None:
    """Train for some steps and print what each took."""
    job = json.loads(Path(sys.argv[1]).read_text())
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation="sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        settings = SFTConfig(
            output_dir=output,
            max_steps=job["steps"],
            per_device_train_batch_size=1,
            gradient_accumulation_steps=job["packs_per_step"],
            max_length=job["sequence_length"],
            packing=True,
            packing_strategy="bfd",
            completion_only_loss=True,
            gradient_checkpointing=False,
            learning_rate=job["lr"],
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            pad_token=tokenizer.eos_token,
        )
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=rows(Path(job["dataset"])),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        json.dumps(
            {
                "seconds": clock.seconds,
                "tokens_per_step": job["packs_per_step"] * float(np.mean(lengths)),
                "losses": losses,
            }
        )
    )


if __name__ == "__main__":
    main()
