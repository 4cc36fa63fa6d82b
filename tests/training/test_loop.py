"""Bad input to a training run: one clear sentence, and nothing half-written."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mcore_sft.base.errors import UserError
from mcore_sft.checkpoint.manifest import read_manifest
from mcore_sft.checkpoint.safetensors_folder import SafetensorsFolder
from mcore_sft.config import ParallelConfig, RunConfig
from mcore_sft.data.text.tokenizer import load_tokenizer
from mcore_sft.model.families import read
from mcore_sft.training import loop, packs
from tests import runs
from tests.distributed import run_ranks


@pytest.fixture
def place(model: Path, tmp_path: Path) -> Path:
    """A copy of the model and its packed rows, to be damaged."""
    return shutil.copytree(model, tmp_path / "model")


def _message(config: RunConfig) -> str | None:
    try:
        loop.train(config)
    except UserError as error:
        return str(error)
    return None


def refused(place: Path, **changes: Any) -> str:
    """What the run says when it refuses to start; it must leave nothing behind."""
    config = runs.experiment(place.parent / "run", place, train__steps=2, **changes)
    (message,) = run_ranks(1, _message, config)
    assert message is not None, "the run did not refuse"
    assert not config.folder.exists()
    return str(message)


def test_tensor_parallelism_that_does_not_divide_the_heads(place: Path) -> None:
    message = refused(place, parallel__tensor=3)
    assert message == (
        "parallel.tensor 3 does not divide the model's 4 attention heads: choose a divisor of 4"
    )


def test_too_few_processes(place: Path) -> None:
    assert "1 process(es) cannot be split into" in refused(place, parallel__tensor=2)


def test_transformer_engine_on_cpu(place: Path) -> None:
    message = refused(place, model__layers="transformer_engine")
    assert "needs an NVIDIA GPU, but this process runs on CPU" in message


def test_eight_bits_on_cpu(place: Path) -> None:
    message = refused(place, train__fp8="blockwise", train__precision="bf16")
    assert "train.fp8: blockwise needs Transformer Engine's layers" in message


@pytest.mark.parametrize(
    ("fp8", "context", "length"),
    [("none", 1, 513), ("tensorwise", 1, 528), ("blockwise", 2, 768), ("none", 2, 516)],
)
def test_rows_are_as_long_as_what_splits_them_needs(
    place: Path, fp8: str, context: int, length: int
) -> None:
    """512 tokens over three tensor ranks; of 8 bits, each rank's are a multiple of 16 or 128."""
    config = runs.experiment(place.parent / "run", place, train__fp8=fp8, train__precision="bf16")
    mesh: Any = SimpleNamespace(
        tensor=SimpleNamespace(size=3),
        pipeline=SimpleNamespace(size=1),
        context=SimpleNamespace(size=context, rank=0),
        data=SimpleNamespace(size=1, rank=0),
        parallel=ParallelConfig(tensor=3, sequence=True, context=context),
        local_rank=0,
    )
    dataset = packs.open_dataset(config, "train", mesh)
    tokenizer = load_tokenizer(config.model.tokenizer_path)
    loader = packs.load(config, "train", dataset, tokenizer, read(place), mesh)
    assert loader.length == length
    assert loader.batches(0)[0].length == length // context


def test_a_dataset_too_large_for_deterministic_attention(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before the first step, by the largest row that any step may have."""
    config = runs.experiment(place.parent / "run", place, train__deterministic=True)
    mesh: Any = SimpleNamespace(
        tensor=SimpleNamespace(size=2),
        context=SimpleNamespace(size=1, rank=0),
        data=SimpleNamespace(size=1, rank=0),
        parallel=ParallelConfig(tensor=2),
        device=torch.device("cuda", 0),
        local_rank=0,
    )
    sizes: list[int] = []
    monkeypatch.setattr(packs, "check_deterministic", lambda size, device: sizes.append(size))
    dataset = packs.open_dataset(config, "train", mesh)
    tokenizer = load_tokenizer(config.model.tokenizer_path)
    for precision in ("fp32", "bf16"):  # local layers, and Transformer Engine's
        train = config.train.model_copy(update={"precision": precision})
        asked = config.model_copy(update={"train": train})
        loader = packs.load(asked, "train", dataset, tokenizer, read(place), mesh)
    rows = [batch for step in range(loader.steps_per_epoch) for batch in loader.batches(step)]
    heads = 4 // 2
    assert sizes == [heads * max((len(row.starts) - 1) * row.longest**2 for row in rows)]


def test_nsight_systems_on_cpu(place: Path) -> None:
    message = refused(place, log__profile=[1, 2], log__profiler="nsys")
    assert "log.profiler: nsys needs an NVIDIA GPU, but this process runs on CPU" in message


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "train.packs.npy"])
def test_a_corrupt_dataset(place: Path, name: str) -> None:
    file = place / "packed" / name
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    message = refused(place)
    assert name in message
    assert "corrupt: SHA-256" in message


def test_a_truncated_dataset(place: Path) -> None:
    file = place / "packed" / "train.bin"
    file.write_bytes(file.read_bytes()[:-100])
    assert "train.bin" in refused(place)


def test_no_dataset(place: Path) -> None:
    shutil.rmtree(place / "packed")
    assert "make it with tools/preprocess.py" in refused(place)


def test_a_tokenizer_larger_than_the_model(place: Path) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"vocab_size": 600}))
    message = refused(place)
    assert "has 701 tokens, but the model" in message
    assert "a vocabulary of 600" in message


def test_a_dataset_of_another_prompt(place: Path) -> None:
    assert "was made with another prompt" in refused(place, prompt__instruction=None)


def test_a_dataset_of_another_length(place: Path) -> None:
    message = refused(place, data__sequence_length=256)
    assert "was made with another data.sequence_length (512)" in message


def test_a_dataset_without_validation(place: Path) -> None:
    message = refused(
        place,
        data__validation=[{"path": "rows.jsonl"}],
        train__validate_every=1,
    )
    assert "no split 'validation'" in message


def test_a_model_without_a_weight_file(place: Path) -> None:
    (place / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refused(place)


def test_a_model_that_does_not_fit_its_config(place: Path) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    assert "the two do not belong together" in refused(place)


def test_a_model_with_more_layers_than_its_config(place: Path) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "holds model.layers.3." in refused(place)


def test_a_model_wider_than_its_config(place: Path) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert "but config.json says [64, 64]; the two do not belong together" in refused(place)


def test_a_tied_model_with_a_head_of_its_own(place: Path) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "ties lm_head.weight to the embedding, but the two differ" in refused(place)


def test_other_sources_than_the_dataset_was_made_of(place: Path) -> None:
    message = refused(place, data__train=[{"path": "rows.jsonl", "limit": 5}])
    assert "was made with another data.train" in message


def test_a_run_does_not_begin_anew_among_checkpoints(model: Path, stopped: Path) -> None:
    config = runs.experiment(stopped, model, checkpoint__resume=False)
    (said,) = run_ranks(1, _message, config)
    assert said is not None
    assert "holds step_1 of another run" in said


def test_a_checkpoint_says_what_it_grew_from(model: Path, stopped: Path) -> None:
    grew_from = read_manifest(stopped / "step_1")["progress"]["fixed"]
    assert grew_from["base weights"] == SafetensorsFolder(model).fingerprint()


def test_no_checkpoint_is_whole(model: Path, stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    (folder / "step_1" / "manifest.json").unlink()
    (said,) = run_ranks(1, _message, runs.experiment(folder, model))
    assert said is not None
    assert "no checkpoint of this run is whole" in said
    assert len(runs.metrics(runs.experiment(folder, model))) == 1


def test_a_small_validation_set(model: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "data__validation": [{"path": "rows.jsonl", "limit": 3}],
        "data__packed": str(tmp_path / "packed"),
        "train__validate_every": 1,
        "train__steps": 1,
    }
    config = runs.experiment(tmp_path / "run", model, **changes)
    runs.pack_rows(config)
    assert "validation_loss" in runs.train(config)[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer__decay_1d": False}, "optimizer.decay_1d was True, now False"),
        ({"train__seed": 7}, "train.seed was 42, now 7"),
        ({"train__precision": "bf16"}, "train.precision was fp32, now bf16"),
        ({"train__last_step": "pad"}, "train.last_step was drop, now pad"),
    ],
)
def test_another_run_is_not_resumed(
    model: Path, stopped: Path, change: dict[str, Any], message: str
) -> None:
    config = runs.experiment(stopped, model, train__steps=2, **change)
    (said,) = run_ranks(1, _message, config)
    assert said is not None
    assert f"not the run that stopped after step 1: {message}" in said


@pytest.fixture(scope="module")
def stopped(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that took one step."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    runs.train(runs.experiment(folder, model, train__steps=1))
    return folder
