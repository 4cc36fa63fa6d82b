import json
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_sft.config import EvaluationConfig
from mcore_sft.evaluation.engine import check_fits, completion, eos_ids, open_engine
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


def test_a_broken_config_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"config\.json: cannot be read"):
        eos_ids(tmp_path)


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
        f"import sys; from mcore_sft.evaluation import {modules}; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
