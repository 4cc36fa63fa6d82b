"""Random prompts for a model of `VOCAB` tokens, and what an engine makes of them."""

import random
from collections.abc import Sequence
from typing import Any

from mcore_sft.evaluation.engines.engine import Completion, Engine, Request, seed_of

VOCAB = 301
STOP = (5, 6)
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}


def requests(
    count: int = 8, *, seed: int = 1, vocab: int = VOCAB, **sampling: Any
) -> list[Request]:
    chance = random.Random(seed)
    return [
        Request(
            index=index,
            prompt_ids=tuple(chance.randrange(VOCAB) for _ in range(chance.randint(3, 40))),
            seed=seed_of(3, str(index), 0),
            **sampling,
        )
        for index in range(count)
    ]


def spell(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def answers(engine: Engine, asked: Sequence[Request]) -> dict[int, Completion]:
    done = [one for batch in engine.generate(asked) for one in batch]
    assert sorted(one.index for one in done) == sorted(request.index for request in asked)
    return {one.index: one for one in done}
