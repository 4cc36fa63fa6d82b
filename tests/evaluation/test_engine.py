import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_sft.config import EvaluationConfig
from mcore_sft.evaluation.engines.engine import (
    check_fits,
    check_weights,
    completion,
    eos_ids,
    model_shape,
)
from mcore_sft.evaluation.engines.open import open_engine
from mcore_sft.evaluation.errors import EvaluationError
from tests.evaluation.asked import STOP, requests, spell


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config": 7}, {7}),
        ({"config": 7, "generation_config": [8, 9]}, {8, 9}),
        ({"config": 7, "generation_config": None}, set()),
        ({}, set()),
    ],
)
def test_the_folders_own_eos(tmp_path: Path, files: dict[str, object], expected: set[int]) -> None:
    for name, eos in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"eos_token_id": eos}))
    assert eos_ids(tmp_path) == expected


@pytest.mark.parametrize("content", ["{", "[]", "null", "[" * 100_000, "\udcff"])
def test_a_broken_config_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    for read in (eos_ids, model_shape):
        with pytest.raises(EvaluationError, match=r"config\.json: cannot be read .* export"):
            read(tmp_path)


@pytest.mark.parametrize("name", ["eos_token_id", "max_position_embeddings", "vocab_size"])
@pytest.mark.parametrize("value", ["</s>", ["</s>"], 1.5])
def test_a_number_that_is_none_is_said(tmp_path: Path, name: str, value: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({name: value}))
    with pytest.raises(EvaluationError, match=rf"config\.json: {name} is {re.escape(repr(value))}"):
        eos_ids(tmp_path) if name == "eos_token_id" else model_shape(tmp_path)


HEADER = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
WHOLE = len(HEADER).to_bytes(8, "little") + HEADER + b"ab"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, ": no weights here; expected model.safetensors"),
        ({"m.safetensors": b""}, "/m.safetensors: .*its 0 bytes end within the header"),
        ({"m.safetensors": WHOLE[:8]}, "/m.safetensors: .*its 8 bytes end within the header"),
        ({"m.safetensors": WHOLE[:50]}, "/m.safetensors: .*its 50 bytes end within the header"),
        ({"m.safetensors": WHOLE[:-1]}, "it has 93 bytes where its header says 94.*copy it here"),
        ({"m.safetensors": WHOLE + b"c"}, "it has 95 bytes where its header says 94"),
        ({"m.safetensors": b"version https://git-lfs"}, "its 23 bytes end within the header"),
        ({"m.safetensors": (2).to_bytes(8, "little") + b"{{"}, "no safetensors that can be read"),
        ({"m.safetensors": (2).to_bytes(8, "little") + b"[]"}, "no safetensors that can be read"),
        ({"a.safetensors": WHOLE, "b.safetensors": WHOLE[:-2]}, "/b.safetensors: "),
        ({INDEX: b"{"}, "index.json: cannot be read"),
        ({INDEX: b"{}"}, "index.json: it has no weight_map"),
        ({INDEX: b'{"weight_map":{"a":"s.safetensors"}}'}, "/s.safetensors: it belongs to the"),
        ({INDEX: b'{"weight_map":{"a":"s.safetensors"}}', "s.safetensors": WHOLE}, None),
        ({"m.safetensors": WHOLE}, None),
        ({"pytorch_model.bin": b""}, None),
    ],
)
def test_weights_are_there_and_whole(
    tmp_path: Path, files: dict[str, bytes], said: str | None
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    if said is None:
        check_weights(tmp_path)
    else:
        with pytest.raises(EvaluationError, match=said):
            check_weights(tmp_path)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_damage_is_said_before_a_model_is_loaded(llama: Path, tmp_path: Path, engine: str) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(WHOLE[:-1])
    config = EvaluationConfig.model_validate(
        {"engine": engine, "vllm": {"python": tmp_path / "python"}}
    )
    with pytest.raises(EvaluationError, match="it has 93 bytes where its header says 94"):
        open_engine(config, tmp_path, stop_ids=STOP, decode=spell)


def test_the_text_ends_before_the_stop_token() -> None:
    done = completion(3, [1, 5], "stop", stop_ids=STOP, decode=spell)
    assert (done.index, done.tokens, done.text) == (3, (1, 5), "1")
    assert completion(3, [5, 1], "length", stop_ids=STOP, decode=spell).text == "5 1"
    assert completion(3, [], "stop", stop_ids=STOP, decode=spell).text == ""


def test_limits_are_named(tmp_path: Path) -> None:
    asked = requests(1)
    length = len(asked[0].prompt_ids)
    limits = {"the context": None, "the server's limit": length + 4}
    check_fits(asked, tmp_path, max_new_tokens=4, limits=limits, rows=None)
    with pytest.raises(EvaluationError, match="above the server's limit"):
        check_fits(asked, tmp_path, max_new_tokens=5, limits=limits, rows=None)
    with pytest.raises(EvaluationError, match="shorten the prompts"):
        check_fits(asked, tmp_path, max_new_tokens=1, limits={"a": length}, rows=None)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_folder_without_a_model_is_said(tmp_path: Path, engine: str) -> None:
    config = EvaluationConfig.model_validate({"engine": engine})
    with pytest.raises(EvaluationError, match=r"no config\.json here"):
        open_engine(config, tmp_path, stop_ids=STOP, decode=spell)


def test_only_the_transformers_engine_needs_torch() -> None:
    modules = "engine, vllm_engine, server_engine"
    code = (
        f"import sys; from mcore_sft.evaluation.engines import {modules}; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
