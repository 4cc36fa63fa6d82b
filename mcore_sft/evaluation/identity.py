"""A model folder and the settings in, the hashes that say what an answer came from out."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from mcore_sft import __version__
from mcore_sft.base.files import sha256_of
from mcore_sft.config import EvaluationConfig
from mcore_sft.evaluation.errors import EvaluationError

_WEIGHTS = ("*.safetensors", "*.bin")
_WHOLE_BYTES = 2 * 1024**3
_SAMPLES = 64
_BLOCK = 1024 * 1024
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "math-verify",
    "latex2sympy2_extended",
    "antlr4-python3-runtime",
    "sympy",
    "gmpy2",
)


def model_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that decides what a model says.

    Weights of more than 2 GB together are hashed by evenly spread blocks and their size, which the
    hash says: an export with other weights shows all the same, and 16 GB take a second. Raises
    `EvaluationError` for a file that cannot be read.
    """
    try:
        return _hashes(folder)
    except OSError as error:
        raise EvaluationError(
            f"{error.filename or folder}: cannot be read ({error.strerror}); copy it there again, "
            "or export the model again"
        ) from None


def _hashes(folder: Path) -> dict[str, str]:
    found = {
        path.name: sha256_of(path)
        for name in ("config.json", "generation_config.json", "model.safetensors.index.json")
        if (path := folder / name).is_file()
    }
    weights = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    whole = sum(path.stat().st_size for path in weights) <= _WHOLE_BYTES
    return found | {path.name: sha256_of(path) if whole else _sampled(path) for path in weights}


def configuration_hash(
    *, model: Mapping[str, str], prompt: str, tokenizer: str, stop_ids: tuple[int, ...],
    config: EvaluationConfig, served: Mapping[str, Any] | None,
) -> str:  # fmt: skip
    """What all answers of a run have in common; how they are graded is no part of it.

    `served` is what a server says of the model that it serves, if one answers: its address is no
    part of it, for the same model may be served elsewhere.
    """
    settings = config.model_dump(mode="json", include={"engine", "max_new_tokens", "precision"})
    whole = [dict(model), prompt, tokenizer, stop_ids, settings]
    if served is not None:
        whole.append(dict(served))
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of everything that may change an answer or a verdict."""
    found = {"mcore_sft": __version__, "python": python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def answer_hash(
    configuration: str, prompt_ids: Sequence[int], sampling: Sequence[float | int]
) -> str:
    """What an answer is kept under: another model, prompt, setting or chance is asked anew.

    `sampling` is temperature, top_p and seed; greedy answers have none.
    """
    whole = json.dumps([configuration, list(prompt_ids), list(sampling)])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _sampled(path: Path) -> str:
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for place in range(_SAMPLES):
            file.seek(max(0, size - _BLOCK) * place // (_SAMPLES - 1))
            digest.update(file.read(_BLOCK))
    return f"sampled:{digest.hexdigest()}"
