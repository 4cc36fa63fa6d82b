"""What a checkpoint says of itself, so that a Hugging Face folder can be made of it alone.

step_N/config.yaml                    the resolved configuration of the run
step_N/model/config.json              architecture of the model it grew from
step_N/model/generation_config.json   how to generate, the learned stop tokens included
step_N/model/tokenizer files          as the dataset was made with; the chat template and the stop
                                      token are those that were trained
step_N/model/mcore_sft.json           the prompt and the dataset that it was trained with, and what
                                      the prompts in it really had
"""

import json
from pathlib import Path
from typing import Any

from mcore_sft import config as configuration
from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.config import RunConfig
from mcore_sft.data import chat_files
from mcore_sft.data.dataset import PackedDataset
from mcore_sft.data.prompt import Prompt
from mcore_sft.data.prompt_record import MODEL_FILE
from mcore_sft.data.tokenizer import load_tokenizer

RECORD = MODEL_FILE
MODEL = "model"
CONFIG = "config.yaml"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def describe(config: RunConfig, dataset: PackedDataset, folder: Path) -> None:
    """Write into `folder` all of a checkpoint but its weights."""
    (folder / CONFIG).write_text(configuration.dump(config), encoding="utf-8")
    tokenizer = load_tokenizer(config.model.tokenizer_path)
    prompt = Prompt.load(config.prompt, tokenizer)
    model = folder / MODEL
    chat_files.save(tokenizer, prompt, model)
    write_json(model / "config.json", _architecture(config, prompt))
    write_json(
        model / "generation_config.json", _generation(config.model.path, prompt, tokenizer.bos_id)
    )
    write_json(
        model / RECORD,
        {
            "format": 1,
            "name": config.name,
            "prompt": prompt.describe(),
            "prompt_fingerprint": prompt.fingerprint,
            "trained_prompts": dataset.counts.get("prompts"),
            "chat_template": prompt.chat_template is not None,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "dataset_fingerprint": dataset.fingerprint,
        },
    )


def _architecture(config: RunConfig, prompt: Prompt) -> dict[str, Any]:
    """config.json of the base model, with the precision and the stop token that it now has."""
    found: dict[str, Any] = json.loads((config.model.path / "config.json").read_text("utf-8"))
    stops = found.get("eos_token_id")
    if not set(prompt.stop_ids) & set(stops if isinstance(stops, list) else [stops]):
        found["eos_token_id"] = prompt.stop_ids[0]
    return with_dtype(found, config.train.precision)


def with_dtype(found: dict[str, Any], precision: str) -> dict[str, Any]:
    """The config.json `found`, saying that its weights have `precision`, if it speaks of that."""
    return found | {key: DTYPES[precision] for key in ("dtype", "torch_dtype") if key in found}


def _generation(base: Path, prompt: Prompt, bos_id: int | None) -> dict[str, Any]:
    """The base model's generation settings, ending at what the model learned to end with."""
    path = base / "generation_config.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    stops = found.get("eos_token_id") or []
    stops = stops if isinstance(stops, list) else [stops]
    learned = list(prompt.stop_ids)
    found["eos_token_id"] = learned + [stop for stop in stops if stop not in learned]
    if bos_id is not None:
        found.setdefault("bos_token_id", bos_id)
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` for people to read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
