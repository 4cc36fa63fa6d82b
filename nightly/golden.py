"""Curves of the oracle that are kept in configs/nightly/golden, each with what made it."""

import hashlib
import json
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mcore_sft.base import files
from mcore_sft.base.errors import UserError
from mcore_sft.checkpoint.safetensors_folder import SafetensorsFolder
from mcore_sft.config import RunConfig
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.model import families
from nightly.curve import Curve

FOLDER = Path("configs/nightly/golden")
_TRAIN = ("steps", "global_batch", "seed", "last_step", "validate_every", "validation_packs")


class GoldenError(UserError):
    """A kept curve is not there, or was made from something else than this run."""


def made_from(config: RunConfig, packs_of_a_step: int) -> dict[str, Any]:
    """What decides the curve: model, packs, their number in a step, and the optimizer."""
    train = config.train.model_dump(mode="json")
    return {
        **_architecture(config.model.path),
        "base weights": _every_weight(config.model.path),
        "dataset": PackedDataset(config.packed, verify=False).manifest["fingerprint"],
        "packs of a step": packs_of_a_step,
        **{f"train.{name}": train[name] for name in _TRAIN},
        **{f"optimizer.{name}": x for name, x in config.optimizer.model_dump(mode="json").items()},
    }


def _architecture(folder: Path) -> dict[str, Any]:
    """What config.json says of the model, but for what is as in every Llama."""
    read = families.read(folder)
    said = asdict(read)
    return {f"model.{x.name}": said[x.name] for x in fields(read) if said[x.name] != x.default}


def _every_weight(folder: Path) -> str:
    """SHA-256 of the name, the shape, the type and all numbers of every tensor."""
    tensors = SafetensorsFolder(folder)
    digest = hashlib.sha256()
    for name in sorted(tensors.names()):
        shape = tensors.shape(name)
        numbers = tensors.read(name, 0, shape[0]).contiguous()
        digest.update(f"{name} {shape} {numbers.dtype} ".encode())
        digest.update(numbers.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def keep(file: Path, curve: Curve, made: dict[str, Any], *, command: str, reason: str) -> None:
    """Write `curve` with what made it, and why it is kept anew."""
    files.make_folder(file.parent)
    versions = {name: version(name) for name in ("torch", "transformers")}
    told = {"reason": reason, "command": command, "versions": versions, "made": made}
    # What made it is read in a diff; of the curve, a line for each series.
    head = json.dumps(told, indent=1).removesuffix("\n}")
    series = [
        f"  {json.dumps(name)}: {json.dumps(values, allow_nan=False)}"
        for name, values in curve.to_tree().items()
    ]
    text = head + ',\n "curve": {\n' + ",\n".join(series) + "\n }\n}\n"
    files.replace(file, text)


def read(file: Path, made: dict[str, Any], command: str) -> Curve:
    """The curve in `file`, which `command` makes; `GoldenError` unless it was made from `made`."""
    mend = f"{command} --reason TEXT makes it"
    if not file.exists():
        raise GoldenError(f"{file} is not there; {mend}")
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        theirs, curve = dict(kept["made"]), Curve.of_tree(kept["curve"])
    except (ValueError, KeyError, TypeError) as error:
        raise GoldenError(f"{file}: no golden curve ({error}); {mend} again") from None
    for name in sorted(made.keys() | theirs.keys()):
        if made.get(name) != theirs.get(name):
            raise GoldenError(
                f"{file} was made with another {name} ({theirs.get(name)}) than this run has "
                f"({made.get(name)}); where that is meant, {mend} again"
            )
    return curve
