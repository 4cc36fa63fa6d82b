import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mcore_sft.config import EvaluationConfig
from mcore_sft.evaluation.engines.engine import Completion, Request
from mcore_sft.evaluation.engines.open import open_engine
from mcore_sft.evaluation.errors import EvaluationError
from tests.evaluation.asked import SAMPLED, STOP, answers, requests, spell


def answer(folder: Path, asked: list[Request], **settings: Any) -> dict[int, Completion]:
    config = EvaluationConfig.model_validate(
        {"precision": "fp32", "max_new_tokens": 24, **settings}
    )
    with open_engine(config, folder, stop_ids=STOP, decode=spell) as engine:
        return answers(engine, asked)


def alone(folder: Path, prompt: tuple[int, ...], new: int) -> list[int]:
    """The plainest greedy decoding there is: no cache, no padding, no batch."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in (*STOP, 7):
                break
    return ids[len(prompt) :]


def test_greedy_is_the_plain_argmax(llama: Path) -> None:
    asked = requests()
    done = answer(llama, asked, batch_size=12)
    for request in asked:
        assert list(done[request.index].tokens) == alone(llama, request.prompt_ids, 24)


def test_greedy_does_not_depend_on_the_batch(llama: Path) -> None:
    asked = requests(16)
    assert answer(llama, asked, batch_size=1) == answer(llama, asked, batch_size=16)
    assert answer(llama, asked, batch_size=5) == answer(llama, asked[::-1], batch_size=16)


def test_sampling_does_not_depend_on_the_batch(llama: Path) -> None:
    asked = requests(8, **SAMPLED)
    first = answer(llama, asked, batch_size=8)
    assert first == answer(llama, asked, batch_size=3)
    assert first != answer(llama, requests(8), batch_size=8)
    reseeded = [replace(request, seed=request.seed + 1) for request in asked]
    assert first != answer(llama, reseeded, batch_size=8)


def test_a_batch_may_mix_greedy_and_sampled_answers(llama: Path) -> None:
    greedy, sampled = requests(8), requests(8, **SAMPLED)
    narrow = requests(8, temperature=1.3, top_p=0.3)
    kinds = (greedy, sampled, narrow)
    mixed = [kinds[index % 3][index] for index in range(8)]
    done = answer(llama, mixed, batch_size=8)
    alone = [answer(llama, kind, batch_size=8) for kind in kinds]
    assert done == {index: alone[index % 3][index] for index in range(8)}
    assert alone[0] != alone[1] != alone[2]


def test_a_narrow_nucleus_is_greedy(llama: Path) -> None:
    narrow = requests(4, temperature=1.0, top_p=1e-6)
    assert answer(llama, narrow) == answer(llama, requests(4))


def test_finish_reasons_and_text(llama: Path) -> None:
    done = answer(llama, requests(40), batch_size=40)
    assert {one.finish_reason for one in done.values()} == {"stop", "length"}
    for one in done.values():
        stopped = one.finish_reason == "stop"
        assert (one.tokens[-1] in (*STOP, 7)) == stopped
        assert not set(one.tokens[:-1]) & {*STOP, 7}
        body = one.tokens[:-1] if stopped else one.tokens
        assert one.text == spell(body)
        assert stopped or len(one.tokens) == 24


def test_what_does_not_fit_is_said_before_anything_runs(llama: Path) -> None:
    asked = [Request(index=0, prompt_ids=(1,) * 200)]
    with pytest.raises(EvaluationError, match=r"set evaluation\.max_new_tokens to 56 or less"):
        answer(llama, asked, max_new_tokens=57)
    with pytest.raises(EvaluationError, match="gives id 301 but the model has 301 embeddings"):
        answer(llama, [Request(index=0, prompt_ids=(301,))])


def test_a_folder_without_a_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no config\.json here"):
        answer(tmp_path, requests(1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": None}, "cannot load this model .*`model_type` key in its config.json"),
        ({"hidden_size": "x"}, "'hidden_size' expected int, got str .*mend its config.json"),
        ({"num_attention_heads": 0}, "ZeroDivisionError.*mend its config.json"),
        ({"hidden_act": "x"}, "KeyError: 'x'"),
        ({"num_hidden_layers": None}, "tensors are missing, model.layers.10"),
        ({"vocab_size": None}, r"lm_head.weight first: \[301, 64\], expected \[32000, 64\]"),
    ],
)
def test_a_config_that_does_not_fit_is_said(
    llama: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    """A key that is None here is lacking there."""
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    shape = json.loads((tmp_path / "config.json").read_text()) | changes
    kept = {name: value for name, value in shape.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    with pytest.raises(EvaluationError, match=said):
        answer(tmp_path, requests(1))


def test_weights_that_no_library_reads_are_said(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(EvaluationError, match=r"transformers cannot load this model \(EOFError"):
        answer(tmp_path, requests(1))
