import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mcore_sft.config import ConfigError, ParallelConfig
from mcore_sft.model import architecture as arch
from tests import tiny

LLAMA_31 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


def _read(folder: Path, config: dict[str, Any]) -> arch.Architecture:
    (folder / "config.json").write_text(json.dumps(config))
    return arch.read(folder)


def test_llama_31_8b(tmp_path: Path) -> None:
    a = _read(tmp_path, LLAMA_31)
    assert (a.layers, a.heads, a.kv_heads, a.head_dim, a.vocab) == (32, 32, 8, 128, 128256)
    assert a.padded_vocab(1) == a.padded_vocab(8) == 128256
    assert not a.tied
    expected = LlamaRotaryEmbedding(LlamaConfig(**LLAMA_31)).inv_freq
    assert torch.allclose(arch.rope_frequencies(a), expected, rtol=1e-6, atol=0)


def test_the_new_form_of_rope(tmp_path: Path) -> None:
    a = arch.read(tiny.make_model(tmp_path))
    assert a.rope_theta == 10000.0
    assert a.rope_scaling is not None
    assert a.rope_scaling.original_max_positions == 32
    assert a.padded_vocab(2) == 640


def test_no_scaling(tmp_path: Path) -> None:
    a = _read(tmp_path, LLAMA_31 | {"rope_scaling": None})
    expected = 500000.0 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    assert torch.allclose(arch.rope_frequencies(a).double(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"model_type": "mixtral"}, "model_type is 'mixtral'; only 'llama'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_what_cannot_be_expressed_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _read(tmp_path, LLAMA_31 | change)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tensor": 3}, "parallel.tensor 3 does not divide the model's 32 attention heads"),
        ({"tensor": 16}, "parallel.tensor 16 does not divide the model's 8 key-value heads"),
        ({"pipeline": 5}, "parallel.pipeline 5 does not divide the model's 32 layers"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(
    tmp_path: Path, parallel: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _read(tmp_path, LLAMA_31).check(ParallelConfig(**parallel))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA_31.items() if key != "hidden_size"}
    with pytest.raises(ConfigError, match="the key 'hidden_size' is missing"):
        _read(tmp_path, config)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        arch.read(tmp_path)
