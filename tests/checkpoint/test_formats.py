import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mcore_sft.checkpoint import optimizer_state
from mcore_sft.checkpoint.export import export
from mcore_sft.checkpoint.sharded import Checkpoints
from mcore_sft.config import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer
from mcore_sft.model import build, families
from mcore_sft.runtime.mesh import connect
from mcore_sft.training import optimizer as optim
from tests.distributed import run_ranks

KEPT = Path(__file__).parent.parent / "fixtures" / "checkpoint"
"""Saved by commit b3ad856 with megatron-core 0.16.1 on two tensor-parallel ranks, in bf16: the
third and last step of a run on the project's own rows. Do not regenerate it."""


def test_a_checkpoint_of_an_earlier_version_loads_bit_for_bit(tmp_path: Path) -> None:
    run = shutil.copytree(KEPT / "run", tmp_path / "run")
    (found,) = run_ranks(1, restored, run)
    assert found == json.loads((KEPT / "expected.json").read_text())["restored"]


def test_a_checkpoint_of_an_earlier_version_is_exported_bit_for_bit(tmp_path: Path) -> None:
    export(KEPT / "run" / "step_3", tmp_path / "hf")
    found = {name: sha(one) for name, one in load_file(tmp_path / "hf/model.safetensors").items()}
    assert found == json.loads((KEPT / "expected.json").read_text())["exported"]


def test_an_export_of_an_earlier_version_chats_as_it_was_trained(tmp_path: Path) -> None:
    export(KEPT / "run" / "step_3", tmp_path / "hf")
    template = (tmp_path / "hf" / "chat_template.jinja").read_text(encoding="utf-8")
    record = json.loads((tmp_path / "hf" / "mcore_sft.json").read_text(encoding="utf-8"))
    prompt = Prompt.restore(record["prompt"], load_tokenizer(tmp_path / "hf"))
    assert template == prompt.chat_template
    assert record["chat_template"]


def restored(run: Path) -> dict[str, Any]:
    """What one process restores of the run: its step, and a hash of each weight and each moment."""
    fixed = json.loads((run / "step_3" / "manifest.json").read_text())["progress"]["fixed"]
    architecture = families.read(run / "step_3" / "model")
    train = TrainConfig(precision="bf16")
    with connect(ParallelConfig()) as mesh:
        model = build.build(architecture, ModelConfig(path=run), train, mesh)
        optimizer = optim.build(OptimizerConfig(), train, model, mesh)
        checkpoints = Checkpoints(
            run, CheckpointConfig(), model=model, optimizer=optimizer, mesh=mesh
        )
        progress = checkpoints.restore_latest(fixed | {"architecture": asdict(architecture)})
        assert progress is not None
        state = model[0].module.sharded_state_dict(prefix="")
        written = optimizer_state.state(optimizer, {"chunk0": state}, mesh)
        tensors = {name: getattr(one, "data", None) for name, one in written["of"].items()}
        tensors |= dict(model[0].module.named_parameters())
        hashes = {name: sha(one.detach()) for name, one in tensors.items()}
        return {"step": progress.step, "updates": written["step"], "hashes": hashes}


def sha(tensor: Tensor) -> str:
    """SHA-256 of the shape, the type and the bytes of a tensor."""
    kind = f"{tuple(tensor.shape)} {tensor.dtype} ".encode()
    return hashlib.sha256(
        kind + tensor.contiguous().view(torch.uint8).numpy().tobytes()
    ).hexdigest()
