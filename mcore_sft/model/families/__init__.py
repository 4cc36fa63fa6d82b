"""The families of models: each is one file, and one line here.

config.json -> Architecture
"""

from pathlib import Path
from typing import Any

from mcore_sft.base.dtypes import BY_SAFETENSORS
from mcore_sft.base.errors import UserError
from mcore_sft.base.model_folder import read_json, stored_types, weight_files
from mcore_sft.config import ConfigError
from mcore_sft.model.architecture import Architecture
from mcore_sft.model.families.llama import Llama
from mcore_sft.model.families.mistral import Mistral
from mcore_sft.model.families.qwen2 import Qwen2
from mcore_sft.model.families.qwen3 import Qwen3

FAMILIES: dict[str, type[Llama]] = {
    "llama": Llama,
    "mistral": Mistral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
}
"""config.json's model_type -> family."""


def read(folder: Path) -> Architecture:
    """The architecture of the Hugging Face model in `folder`; raises `UserError`."""
    path = folder / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ConfigError(
            f"model.path {folder}: no config.json there; give a Hugging Face folder"
        ) from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConfigError(f"{path}: names no model_type, so it is no model's configuration")
    try:
        if config["model_type"] not in FAMILIES:
            raise ConfigError(
                f"{path}: model_type is {config['model_type']!r}; supported are "
                f"{', '.join(FAMILIES)}"
            )
        _refuse_quantized_weights(path, config)
        return FAMILIES[config["model_type"]].read(path, config)
    except UserError:
        raise
    except KeyError as error:
        raise ConfigError(f"{path}: the key {error} is missing; copy the model again") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{path}: a value is not what it should be: {error}") from None


def _refuse_quantized_weights(path: Path, config: dict[str, Any]) -> None:
    """Raise `ConfigError` if the folder holds weights that are no plain numbers.

    A quantization beside plain weights is what is left of one that was undone.
    """
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return
    files = set(weight_files(path.parent).values())
    types = {found for file in files for found in stored_types(path.parent / file).values()}
    if not types <= BY_SAFETENSORS.keys():
        method = quantization
        if isinstance(quantization, dict):
            method = quantization.get("quant_method", "no quant_method")
        raise ConfigError(
            f"{path}: the weights are quantized (quantization_config: {method}), and a quantized "
            "model cannot be trained. Fix: take the unquantized model (model.path)"
        )
