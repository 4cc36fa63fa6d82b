"""What a checkpoint says of itself, so that a Hugging Face folder can be made of it alone.

It is read once, before the first step: what happens to the base model's folder later, changes
nothing in the checkpoints. A run that goes on keeps what its checkpoint says.

step_N/config.yaml                    the resolved configuration of the run
step_N/model/config.json              architecture of the model it grew from
step_N/model/generation_config.json   how to generate, the learned stop tokens included
step_N/model/tokenizer files          as the dataset was made with; the chat template and the stop
                                      token are those that were trained
step_N/model/mcore_sft.json           the prompt and the dataset that it was trained with, what the
                                      prompts in it really had, and the base: path, revision,
                                      SHA-256 of what was read of it, the weights included
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from mcore_sft import config as configuration
from mcore_sft.base import files
from mcore_sft.base.dtypes import DTYPES
from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.checkpoint.manifest import read_manifest, reading
from mcore_sft.config import RunConfig
from mcore_sft.data.encode.prompt_record import MODEL_FILE
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.text import chat_files
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer

RECORD = MODEL_FILE
MODEL = "model"
CONFIG = "config.yaml"


_READ_OF_BASE = ("config.json", "generation_config.json")
_READ_OF_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer.tiktoken", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)


@dataclass(frozen=True)
class Description:
    """All of a checkpoint but its weights, ready to be written."""

    files: Mapping[str, bytes]
    """Path within the checkpoint -> content."""

    @classmethod
    def read(
        cls, config: RunConfig, dataset: PackedDataset, base_weights: str | None, step: Path | None
    ) -> Self:
        """Read what `config` names, or what the checkpoint `step` says if the run goes on from it.

        `base_weights` is the fingerprint of the base's weights.
        """
        if step is None:
            with tempfile.TemporaryDirectory() as made:
                try:
                    _describe(config, dataset, base_weights, Path(made))
                except OSError as error:
                    raise CheckpointError(
                        f"{error.filename}: cannot be read ({error.strerror})"
                    ) from None
                found = {f"{MODEL}/{x.name}": x.read_bytes() for x in sorted(Path(made).iterdir())}
        else:
            found = named_files(step, read_manifest(step))
        return cls({CONFIG: configuration.dump(config).encode(), **found})

    def with_sums(self, sums: Mapping[str, str]) -> Self:
        """The same, and SHA-256 of the base's files of weights beside those of its other files."""
        if not sums:
            return self
        name = f"{MODEL}/{RECORD}"
        record = json.loads(self.files[name])
        record["base"]["sha256"] |= sums
        return replace(self, files={**self.files, name: _json(record).encode()})

    def write(self, folder: Path) -> None:
        """Write all of it into `folder`; raises OSError."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def named_files(step: Path, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """What stands in model/ of a checkpoint: the files that its manifest names, and no others.

    Raises `Gone` and `CheckpointError`.
    """
    names = [name for name in manifest["files"] if name.startswith(f"{MODEL}/")]
    with reading(step):
        return {name: (step / name).read_bytes() for name in names}


def _describe(
    config: RunConfig, dataset: PackedDataset, base_weights: str | None, model: Path
) -> None:
    """Write into `model` what a model that grows from the base of `config` needs beside weights."""
    tokenizer = load_tokenizer(config.model.tokenizer_path)
    prompt = Prompt.load(config.prompt, tokenizer)
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
            "base": {
                "path": str(config.model.path),
                "revision": _revision(config.model.path),
                "weights": base_weights,
                "sha256": _sha256_of_base(config.model.path, tokenizer.path),
            },
        },
    )


def _sha256_of_base(base: Path, tokenizer: Path) -> dict[str, str]:
    """SHA-256 of the files of the base that a run reads, weights aside.

    Those of weights take minutes where they are many, and come later: see sums.py.
    """
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    paths = [base / name for name in _READ_OF_BASE]
    paths += [folder / name for name in _READ_OF_TOKENIZER]
    return {path.name: files.sha256_of(path) for path in paths if path.is_file()}


def _revision(base: Path) -> str | None:
    """The commit of a folder that came from the Hugging Face hub, if it says so."""
    folder = base.resolve()
    if folder.parent.name == "snapshots":
        return folder.name
    downloaded = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    if downloaded.is_file():
        return downloaded.read_text(encoding="utf-8").partition("\n")[0] or None
    return None


def _architecture(config: RunConfig, prompt: Prompt) -> dict[str, Any]:
    """config.json of the base model, with the precision and the stop token that it now has."""
    found: dict[str, Any] = json.loads((config.model.path / "config.json").read_text("utf-8"))
    stops = found.get("eos_token_id")
    if not set(prompt.stop_ids) & set(stops if isinstance(stops, list) else [stops]):
        found["eos_token_id"] = prompt.stop_ids[0]
    return with_dtype(found, config.train.precision)


def with_dtype(found: dict[str, Any], precision: str) -> dict[str, Any]:
    """The config.json `found`, saying that its weights have `precision`, if it speaks of that."""
    return found | {
        key: DTYPES[precision].torch for key in ("dtype", "torch_dtype") if key in found
    }


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
    path.write_text(_json(content), encoding="utf-8")


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
