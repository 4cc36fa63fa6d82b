import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mcore_sft.data.text.tokenizer import load_tokenizer
from mcore_sft.model import families
from mcore_sft.model.families import FAMILIES
from tools.demo_data import train_tokenizer
from tools.make_random_model import SHAPES, Shape, ShapeError, make_model

TINY = Shape(
    hidden=16,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=8,
    intermediate=24,
    max_positions=256,
    original_positions=64,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["12 and 30 is 42"] * 9, vocab_size=265).save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def test_transformers_loads_model_and_tokenizer(tokenizer, tmp_path):
    parameters = make_model(tmp_path, TINY, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("12 and<|eot_id|>", return_tensors="pt").input_ids
    assert ids[0, -1] == tokenizer.token_id("<|eot_id|>")
    assert model(ids).logits.shape == (1, ids.shape[1], tokenizer.vocab_size)
    assert parameters == model.num_parameters()
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert model.generation_config.eos_token_id == [1, 4]


def test_weights_have_the_spread_of_initializer_range_and_follow_the_seed(tokenizer, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_model(tmp_path / name, TINY, tokenizer, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "a").state_dict()
    embedding = weights["model.embed_tokens.weight"]
    assert embedding.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(weights["model.norm.weight"], torch.ones(16))


def test_tied_unscaled_with_spare_rows(tokenizer, tmp_path):
    shape = Shape(**{**vars(TINY), "tie": True, "rope_scaling": "none"})
    make_model(tmp_path, shape, tokenizer, vocab_size=300, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == 300
    assert config["dtype"] == "bfloat16"
    assert config["rope_parameters"]["rope_type"] == "default"


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_is_one_that_can_be_trained(tokenizer, tmp_path, architecture):
    shape = Shape(**{**vars(TINY), "architecture": architecture, "rope_scaling": "none"})
    parameters = make_model(tmp_path, shape, tokenizer)
    found = families.read(tmp_path)
    assert (found.head_dim, found.kv_heads, found.rope_theta) == (8, 2, shape.rope_theta)
    assert (found.qkv_bias, found.qk_norm) == (architecture == "qwen2", architecture == "qwen3")
    assert parameters == sum(math.prod(shape) for shape in found.shapes().values())


def test_shapes_that_cannot_be_are_refused(tokenizer, tmp_path):
    with pytest.raises(ShapeError, match="--kv-heads 3 does not divide --heads 4"):
        Shape(**{**vars(TINY), "kv_heads": 3})
    with pytest.raises(ShapeError, match="--head-dim 7 is odd"):
        Shape(**{**vars(TINY), "head_dim": 7})
    with pytest.raises(ShapeError, match="--vocab-size 9 is smaller"):
        make_model(tmp_path / "model", TINY, tokenizer, vocab_size=9)
    assert not (tmp_path / "model").exists()


def test_known_shapes_are_those_of_the_published_models():
    eight = SHAPES["llama-3.1-8b"]
    assert eight.heads * eight.head_dim == eight.hidden == 4096
    assert (eight.layers, eight.intermediate, eight.rope_factor) == (32, 14_336, 8.0)
    assert {shape.architecture for shape in SHAPES.values()} <= set(FAMILIES)


def test_an_existing_folder_is_left_alone(tmp_path):
    command = [sys.executable, "tools/make_random_model.py", "--output", tmp_path]
    ran = subprocess.run(
        [*command, "--tokenizer", tmp_path], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert ran.stderr == f"error: {tmp_path}: is there already; name a new folder with --output\n"
