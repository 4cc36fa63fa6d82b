"""A conversation in, what is trained of it out: which answers, and of each all but its reasoning.

messages -> conversations of which each makes one example        text of an answer -> its reasoning

The reasoning of an answer is its `reasoning_content`, as the template writes it; where it has none,
what stands between two tags.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mcore_sft.data.sources.conversation import UnfitRow, is_trained, reasoning_of

Messages = Sequence[Mapping[str, Any]]
TrainOn = Literal["all", "last", "each"]
Span = tuple[int, int]


def divided(messages: Messages, train_on: TrainOn) -> list[Messages]:
    """The conversations that make one example each: of `last` and `each`, one answer is trained.

    Such a conversation ends with its answer, so that a template writes the prompt as an engine
    would send it. `messages` are checked (`conversation.checked`).
    """
    if train_on == "all":
        return [messages]
    trained = trained_in(messages)
    return [
        [*map(_untrained, messages[:index]), messages[index]]
        for index in (trained if train_on == "each" else trained[-1:])
    ]


def trained_in(messages: Messages) -> list[int]:
    """Which of `messages` are answers that are trained."""
    return [
        index
        for index, said in enumerate(messages)
        if said["role"] == "assistant" and is_trained(said)
    ]


def reasoning_in(answer: str, said: Mapping[str, Any], tags: tuple[str, str]) -> list[Span]:
    """Where the text of an answer holds the reasoning of the message `said`, tags included.

    What opens the first may belong to the prompt. `UnfitRow` if that cannot be told.
    """
    opening, closing = tags
    thought = (reasoning_of(said) or "").strip()
    if thought:
        begins, ends = f"(?:{re.escape(opening)}\\s*)?", f"(?:\\s*{re.escape(closing)})?"
        found = re.search(begins + re.escape(thought) + ends, answer)
        if found is None:
            raise UnfitRow(
                f"the chat template writes the reasoning {thought!r:.60} otherwise than it is, so "
                "that nothing tells where it stands; set prompt.mask_reasoning to false"
            )
        return [found.span()]
    spans: list[Span] = []
    at = 0
    while (end := answer.find(closing, at)) >= 0:
        begin = answer.find(opening, at, end)
        end += len(closing)
        if begin >= 0 or not at:
            spans.append((max(begin, 0), end))
        at = end
    if opening in answer[at:]:
        raise UnfitRow(
            f"an answer has {opening} and no {closing} behind it, so that nothing tells where its "
            "reasoning ends; mend or remove the row"
        )
    return spans


def _untrained(said: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**said, "weight": 0} if said["role"] == "assistant" else said
