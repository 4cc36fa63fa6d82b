import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mcore_sft.config import EvaluationConfig
from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.generate import Completion, Request, TransformersEngine, seed_of

VOCAB = 301
STOP = (5, 6)


def requests(count: int = 8, *, seed: int = 1) -> list[Request]:
    chance = random.Random(seed)
    return [
        Request(
            index=index,
            prompt_ids=tuple(chance.randrange(VOCAB) for _ in range(chance.randint(3, 40))),
            seed=seed_of(3, str(index), 0),
        )
        for index in range(count)
    ]


def answer(folder: Path, asked: list[Request], **settings: Any) -> dict[int, Completion]:
    config = EvaluationConfig.model_validate(
        {"precision": "fp32", "max_new_tokens": 24, **settings}
    )
    engine = TransformersEngine(
        folder, config, stop_ids=STOP, decode=lambda ids: " ".join(map(str, ids))
    )
    return {done.index: done for batch in engine.generate(asked) for done in batch}


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
    asked = requests(8)
    settings = {"temperature": 0.8, "top_p": 0.9}
    first = answer(llama, asked, batch_size=8, **settings)
    assert first == answer(llama, asked, batch_size=3, **settings)
    assert first != answer(llama, asked, batch_size=8)
    reseeded = [Request(index=r.index, prompt_ids=r.prompt_ids, seed=r.seed + 1) for r in asked]
    assert first != answer(llama, reseeded, batch_size=8, **settings)


def test_a_narrow_nucleus_is_greedy(llama: Path) -> None:
    asked = requests(4)
    assert answer(llama, asked, temperature=1.0, top_p=1e-6) == answer(llama, asked)


def test_finish_reasons_and_text(llama: Path) -> None:
    done = answer(llama, requests(40), batch_size=40)
    assert {one.finish_reason for one in done.values()} == {"stop", "length"}
    for one in done.values():
        stopped = one.finish_reason == "stop"
        assert (one.tokens[-1] in (*STOP, 7)) == stopped
        assert not set(one.tokens[:-1]) & {*STOP, 7}
        body = one.tokens[:-1] if stopped else one.tokens
        assert one.text == " ".join(map(str, body))
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
