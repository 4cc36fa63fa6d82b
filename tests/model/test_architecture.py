import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mcore_sft.config import ConfigError, ParallelConfig
from mcore_sft.model import families
from mcore_sft.model.architecture import Architecture, rope_frequencies
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


def _read(folder: Path, config: dict[str, Any]) -> Architecture:
    (folder / "config.json").write_text(json.dumps(config))
    return families.read(folder)


def test_llama_31_8b(tmp_path: Path) -> None:
    a = _read(tmp_path, LLAMA_31)
    assert (a.layers, a.heads, a.kv_heads, a.head_dim, a.vocab) == (32, 32, 8, 128, 128256)
    assert a.padded_vocab(1) == a.padded_vocab(8) == 128256
    assert not a.tied
    expected = LlamaRotaryEmbedding(LlamaConfig(**LLAMA_31)).inv_freq
    assert torch.allclose(rope_frequencies(a), expected, rtol=1e-6, atol=0)


def test_the_new_form_of_rope(tmp_path: Path) -> None:
    a = families.read(tiny.make_model(tmp_path))
    assert a.rope_theta == 10000.0
    assert a.rope_scaling is not None
    assert a.rope_scaling.original_max_positions == 32
    assert a.padded_vocab(2) == 640


def test_linear_scaling(tmp_path: Path) -> None:
    config = LLAMA_31 | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    expected = LlamaRotaryEmbedding(LlamaConfig(**config)).inv_freq
    found = rope_frequencies(_read(tmp_path, config))
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    assert not torch.allclose(found, rope_frequencies(_read(tmp_path, LLAMA_31)))


def test_original_positions_outside_of_rope_scaling(tmp_path: Path) -> None:
    config = LLAMA_31 | {"original_max_position_embeddings": 4096}
    expected = LlamaRotaryEmbedding(LlamaConfig(**config)).inv_freq
    found = rope_frequencies(_read(tmp_path, config))
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)


LLAMA_2 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "pretraining_tp": 1,
}
MISTRAL = LLAMA_2 | {
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "sliding_window": None,
    "max_position_embeddings": 32768,
}
QWEN25 = LLAMA_2 | {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "sliding_window": 1024,
    "use_sliding_window": False,
}
QWEN3 = QWEN25 | {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
}


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (LLAMA_2, (32, 32, 128, False, False)),
        (MISTRAL, (32, 8, 128, False, False)),
        (QWEN25, (28, 4, 128, True, False)),
        (QWEN3, (32, 8, 128, False, True)),
    ],
)
def test_families(tmp_path: Path, config: dict[str, Any], shape: tuple[Any, ...]) -> None:
    a = _read(tmp_path, config)
    assert (a.heads, a.kv_heads, a.head_dim, a.qkv_bias, a.qk_norm) == shape
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (a.heads, a.kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (a.norm_eps, a.tied) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert a.rope_theta == theirs.rope_parameters["rope_theta"]
    assert a.window is None


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (MISTRAL, "sliding_window"),
        (MISTRAL, "num_key_value_heads"),
        (QWEN25, "num_key_value_heads"),
        (QWEN3, "head_dim"),
    ],
)
def test_keys_whose_default_is_not_llamas_are_needed(
    tmp_path: Path, config: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=f"the key '{key}' is missing"):
        _read(tmp_path, {name: value for name, value in config.items() if name != key})


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MISTRAL | {"sliding_window": 4096}, 4096),
        (MISTRAL | {"sliding_window": 32768}, None),
        (QWEN25 | {"use_sliding_window": True}, 1024),
        (LLAMA_2 | {"sliding_window": 1024}, None),
    ],
)
def test_a_sliding_window_limits_the_sequence(
    tmp_path: Path, config: dict[str, Any], window: int | None
) -> None:
    a = _read(tmp_path, config)
    assert a.window == window
    a.check(ParallelConfig(), window or a.max_positions)
    if window:
        message = f"data.sequence_length {window + 1} is more than the sliding window .* {window},"
        with pytest.raises(ConfigError, match=message):
            a.check(ParallelConfig(), window + 1)


def test_no_scaling(tmp_path: Path) -> None:
    a = _read(tmp_path, LLAMA_31 | {"rope_scaling": None})
    expected = 500000.0 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    assert torch.allclose(rope_frequencies(a).double(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        (
            {"model_type": "mixtral"},
            "model_type is 'mixtral'; supported are llama, mistral, qwen2, qwen3",
        ),
        (
            {"model_type": "qwen3", "head_dim": 128, "attention_bias": True},
            "attention_bias is True",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "partial_rotary_factor": 0.5}}, "is 0.5"),
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
        (
            {"pipeline": 4, "virtual": 3},
            "parallel.virtual 3 does not divide the 8 layers of a pipeline stage",
        ),
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
        families.read(tmp_path)
