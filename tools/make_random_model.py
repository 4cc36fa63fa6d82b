"""A shape and a tokenizer in, a Hugging Face folder with random weights out.

    python tools/make_random_model.py --output DIR --tokenizer PATH --shape llama-3.1-8b --layers 2

Good for tests, for rehearsals on machines without the real weights, and for training from nothing.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from mcore_sft import command
from mcore_sft.base.errors import UserError
from mcore_sft.base.terminal import Parser, say
from mcore_sft.data.text.tokenizer import Tokenizer, load_tokenizer
from mcore_sft.model.families import FAMILIES, read
from mcore_sft.runtime.device import torch_dtype

STOP_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "</s>")


class ShapeError(UserError):
    """No model can have the shape that was asked for."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model; `original_positions` is the context that llama3 scaling stretches."""

    architecture: str = "llama"
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    max_positions: int
    rope_theta: float = 500_000.0
    rope_scaling: str = "llama3"
    rope_factor: float = 8.0
    original_positions: int = 8192
    norm_eps: float = 1e-5
    tie: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ShapeError(
                f"--kv-heads {self.kv_heads} does not divide --heads {self.heads}; "
                "each group of query heads shares one"
            )
        if self.head_dim % 2:
            raise ShapeError(f"--head-dim {self.head_dim} is odd; RoPE turns pairs of numbers")


SHAPES: Mapping[str, Shape] = {
    "small": Shape(
        hidden=128, layers=4, heads=4, kv_heads=2, head_dim=32, intermediate=352,
        max_positions=4096, original_positions=512,
    ),
    "llama-2-7b": Shape(
        hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, intermediate=11_008,
        max_positions=4096, rope_theta=10_000.0, rope_scaling="none",
    ),
    "llama-3.2-1b": Shape(
        hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, intermediate=8192,
        max_positions=131_072, rope_factor=32.0, tie=True,
    ),
    "llama-3.2-3b": Shape(
        hidden=3072, layers=28, heads=24, kv_heads=8, head_dim=128, intermediate=8192,
        max_positions=131_072, rope_factor=32.0, tie=True,
    ),
    "llama-3.1-8b": Shape(
        hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14_336,
        max_positions=131_072,
    ),
    "llama-3.1-70b": Shape(
        hidden=8192, layers=80, heads=64, kv_heads=8, head_dim=128, intermediate=28_672,
        max_positions=131_072,
    ),
    "mistral-7b": Shape(
        architecture="mistral", hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128,
        intermediate=14_336, max_positions=32_768, rope_theta=1e6, rope_scaling="none",
    ),
    "qwen2.5-7b": Shape(
        architecture="qwen2", hidden=3584, layers=28, heads=28, kv_heads=4, head_dim=128,
        intermediate=18_944, max_positions=131_072, rope_theta=1e6, rope_scaling="none",
        norm_eps=1e-6,
    ),
    "qwen3-8b": Shape(
        architecture="qwen3", hidden=4096, layers=36, heads=32, kv_heads=8, head_dim=128,
        intermediate=12_288, max_positions=40_960, rope_theta=1e6, rope_scaling="none",
        norm_eps=1e-6,
    ),
}  # fmt: skip


def make_model(
    output: Path,
    shape: Shape,
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Write weights, configuration and tokenizer into `output`; returns the number of parameters.

    The same arguments give the same bytes. `vocab_size` beyond the tokenizer's leaves spare rows.
    """
    vocab_size = vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ShapeError(
            f"--vocab-size {vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            "leave it out to take the tokenizer's"
        )
    named = _token_ids(tokenizer)
    config = AutoConfig.for_model(
        shape.architecture,
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.max_positions,
        rope_parameters=_rope(shape),
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=shape.tie,
        **FAMILIES[shape.architecture].whole_context,
        **named,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.generation_config = GenerationConfig(**named)  # type: ignore[no-untyped-call]
    model.save_pretrained(output)
    tokenizer.save(output)
    shapes = read(output).shapes()
    if shapes != {name: tuple(weight.shape) for name, weight in model.named_parameters()}:
        raise ShapeError(
            f"{output}: transformers makes other weights of {shape.architecture} than the table of "
            "its file in mcore_sft/model/families. Fix: correct that table"
        )
    return sum(math.prod(weight) for weight in shapes.values())


def _rope(shape: Shape) -> dict[str, Any]:
    if shape.rope_scaling == "none":
        return {"rope_type": "default", "rope_theta": shape.rope_theta}
    return {
        "rope_type": "llama3",
        "rope_theta": shape.rope_theta,
        "factor": shape.rope_factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": shape.original_positions,
    }


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    stops = [tokenizer.token_id(name) for name in STOP_TOKENS if name in tokenizer.special_tokens]
    if not stops and tokenizer.eos_id is not None:
        stops = [tokenizer.eos_id]
    if not stops:
        raise ShapeError(
            f"{tokenizer.path}: the tokenizer has no token to stop at, expected one of "
            f"{', '.join(STOP_TOKENS)}; give another --tokenizer"
        )
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops,
        "pad_token_id": tokenizer.pad_id,
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    made = Parser(description="Make a Hugging Face folder with random weights.")
    made.add_argument(
        "--output", type=command.path, required=True, help="folder to write; must be new"
    )
    made.add_argument(
        "--tokenizer",
        type=command.path,
        required=True,
        help="folder, tokenizer.json or tokenizer.model",
    )
    made.add_argument("--architecture", choices=FAMILIES, help="model_type of config.json")
    made.add_argument(
        "--shape", choices=SHAPES, default="small", help="sizes that the options below change"
    )
    for name in ("hidden", "layers", "heads", "kv-heads", "head-dim", "intermediate"):
        made.add_argument(f"--{name}", type=_count)
    made.add_argument("--max-positions", type=_count, help="longest context, in tokens")
    made.add_argument("--original-positions", type=_count, help="context before llama3 scaling")
    made.add_argument("--rope-scaling", choices=["llama3", "none"])
    made.add_argument("--rope-factor", type=float, help="how far llama3 scaling stretches")
    made.add_argument("--rope-theta", type=float)
    made.add_argument(
        "--tie",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="embedding and head share their weights",
    )
    made.add_argument("--vocab-size", type=_count, help="default: the tokenizer's")
    made.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    made.add_argument("--seed", type=int, default=0)
    return made.parse_args()


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, given {number}")
    return number


def main() -> None:
    """Make the folder that the command line describes."""
    arguments = parse_arguments()
    if arguments.output.exists():
        raise ShapeError(f"{arguments.output}: is there already; name a new folder with --output")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    given = {field.name: getattr(arguments, field.name, None) for field in fields(Shape)}
    shape = replace(
        SHAPES[arguments.shape], **{key: value for key, value in given.items() if value is not None}
    )
    parameters = make_model(
        arguments.output,
        shape,
        load_tokenizer(arguments.tokenizer),
        vocab_size=arguments.vocab_size,
        seed=arguments.seed,
        dtype=torch_dtype(arguments.dtype),
    )
    say(f"{arguments.output}: {parameters / 1e6:,.1f} million random parameters")


if __name__ == "__main__":
    command.run(main)
