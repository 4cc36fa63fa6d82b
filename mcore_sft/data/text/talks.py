"""Conversations in, examples out: each is one text, and its answers are found in it.

Chats -> messages, checked -> text, and the answers in it -> ids, and where they stand -> Examples
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mcore_sft.data.errors import DataError
from mcore_sft.data.rows import Chats, Examples, Pairs, Rows
from mcore_sft.data.sources.conversation import UnfitRow, checked, texts_in, texts_of
from mcore_sft.data.text.answers import TrainOn, divided, reasoning_in, trained_in
from mcore_sft.data.text.chat import Chat
from mcore_sft.data.text.chat_template import Messages, Tools
from mcore_sft.data.text.masks import Masks
from mcore_sft.data.text.reference import require_same_ids
from mcore_sft.data.text.render import Answer, Markup, Written
from mcore_sft.data.text.tokenizer import Ids, Located, Tokenizer, sampled

Talk = tuple[Messages, Tools | None]
"""Messages of a row, checked, and its tools."""

SPECIAL_IN_TEXT = "special token in text"
"""Why a row is dropped whose own text spells a special token."""

NO_ANSWER = "no answer at the end"
"""Why a conversation is dropped that an assistant does not end: nothing is ever cut."""


@dataclass(frozen=True, kw_only=True)
class _Told:
    """A conversation as it is trained. last: its last message that is an answer to learn."""

    row: int
    messages: Messages
    tools: Tools | None
    last: int
    written: Written


class Talks:
    """Makes examples of conversations.

    reserved: ids that only markup may have; none where the texts hold their own. tags: what stands
    around reasoning that is not to be trained, if any is. exported: the chat templates of an export
    by name, those that are not the tokenizer's own.
    """

    def __init__(
        self,
        renderer: Chat | Markup,
        tokenizer: Tokenizer,
        *,
        stop_ids: Sequence[int],
        reserved: Sequence[int],
        tags: tuple[str, str] | None,
        exported: Mapping[str, str],
    ) -> None:
        self._renderer = renderer
        self._tokenizer = tokenizer
        self._masks = Masks(tokenizer, stop_ids)
        self._reserved = np.array(reserved, np.int64)
        self._tags = tags
        self._exported = exported

    def encode(
        self,
        rows: Pairs | Chats,
        dropped: dict[int, str],
        unfit: dict[int, str] | None,
        train_on: TrainOn,
    ) -> Examples:
        """Examples of conversations, each of which is one text."""
        talks: dict[int, Talk] = {}
        for index, (messages, tools) in enumerate(self._said(rows)):
            with _of_row(rows, index, unfit):
                talk = checked(messages), tools
                if _is_answered(*talk):
                    talks[index] = talk
                else:
                    dropped[index] = NO_ANSWER
        for index in self._that_spell_specials(talks):
            dropped[index] = SPECIAL_IN_TEXT
            del talks[index]
        told: list[_Told] = []
        for index, (messages, tools) in talks.items():
            with _of_row(rows, index, unfit):
                told += [self._tell(index, said, tools) for said in divided(messages, train_on)]
        examples = self._masked(rows, told, unfit)
        return examples.keep(~np.isin(examples.rows, list(unfit or ())))  # a row, or none of it

    def apart(self, rows: Pairs, unfit: dict[int, str] | None) -> Examples:
        """Examples of problems and solutions of which the reasoning is not trained."""
        assert isinstance(self._renderer, Markup)
        told = []
        texts = zip(rows.problems.to_pylist(), rows.solutions.to_pylist(), strict=True)
        for row, (problem, solution) in enumerate(texts):
            prompt = self._renderer.prompt(problem)
            whole = prompt + solution + self._renderer.end
            with _of_row(rows, row, unfit):
                answer = Answer(len(prompt), [(len(prompt), len(whole))])
                answer = self._without_reasoning(whole, answer, {})
                written = Written(text=whole, answers=[answer])
                told.append(_Told(row=row, messages=(), tools=None, last=0, written=written))
        return self._masked(rows, told, unfit)

    def _tell(self, row: int, messages: Messages, tools: Tools | None) -> _Told:
        """A conversation of a row as text, with the answers that are trained."""
        trained = trained_in(messages)
        plain = list(map(_unweighed, messages))
        written = self._renderer.write(plain, tools, trained)
        if self._tags is not None:
            said = zip(written.answers, trained, strict=True)
            answers = [self._without_reasoning(written.text, a, plain[i]) for a, i in said]
            written = replace(written, answers=answers)
        return _Told(row=row, messages=plain, tools=tools, last=trained[-1], written=written)

    def _without_reasoning(self, text: str, answer: Answer, said: Mapping[str, Any]) -> Answer:
        """An answer to the message `said` of which the reasoning is not trained."""
        if self._tags is None:
            return answer
        spans = list(answer.spans)
        for begin, end in reasoning_in(text[answer.begin : answer.end], said, self._tags):
            first, last = answer.begin + begin, answer.begin + end
            cut = [part for a, b in spans for part in ((a, min(b, first)), (max(a, last), b))]
            spans = [(a, b) for a, b in cut if a < b]
        return Answer(answer.begin, spans)

    def _masked(self, rows: Rows, told: Sequence[_Told], unfit: dict[int, str] | None) -> Examples:
        """Examples of texts; of fixed strings, the last answer goes on where its prompt ends."""

        def refuse(row: int, error: UnfitRow) -> None:
            with _of_row(rows, row, unfit):
                raise error

        written = [one.written for one in told]
        if isinstance(self._renderer, Chat):
            texts = pa.array([one.text for one in written], pa.large_string())
            found = self._tokenizer.locate_column(texts)
        else:
            cuts = [(one.text, one.answers[-1].begin) for one in written]
            pieces = [piece for text, at in cuts for piece in (text[:at], text[at:])]
            texts = pa.array(pieces, pa.large_string())
            found = self._tokenizer.locate_column(texts, turns=True).joined()
        examples, kept = self._masks.examples([one.row for one in told], written, found, refuse)
        if isinstance(self._renderer, Chat):
            self._require_reference(rows, told, found, kept)
        return examples

    def _require_reference(
        self, rows: Rows, told: Sequence[_Told], found: Located, kept: Sequence[int]
    ) -> None:
        """`DataError` if transformers has other ids than `found` for some of those `kept`."""
        for place in sampled(len(kept), least=4):
            k = kept[place]
            one, ids = told[k], found.of(k)
            begin = found.cut(found.places(k, one.written.text, [one.written.answers[-1].begin]))[
                0
            ][0]
            prompt = ids[: begin - found.offsets[k]].tolist()
            by_tools = one.tools and "tool_use" in self._tokenizer.chat_templates
            exported = self._exported.get("tool_use" if by_tools else "default")
            with _of_row(rows, one.row, None):
                same = partial(
                    require_same_ids, self._tokenizer, tools=one.tools, template=exported
                )
                same(ids.tolist(), one.messages, asks=False)
                if one.last:
                    same(prompt, one.messages[: one.last], asks=True)

    def _said(self, rows: Pairs | Chats) -> Iterator[Talk]:
        """Messages and tools of each row."""
        if isinstance(rows, Chats):
            return zip(rows.messages, rows.tools or repeat(None))  # noqa: B905 (repeats for ever)
        assert isinstance(self._renderer, Chat)
        texts = zip(rows.problems.to_pylist(), rows.solutions.to_pylist(), strict=True)
        return ((self._renderer.messages(*pair), None) for pair in texts)

    def _that_spell_specials(self, talks: Mapping[int, Talk]) -> list[int]:
        """Which of `talks` hold a special token in a text of their own."""
        texts: list[str] = []
        counts = []
        for messages, tools in talks.values():
            before = len(texts)
            for message in messages:
                texts += texts_of(message)
            texts += texts_in(tools)
            counts.append(len(texts) - before)
        ids, offsets = self._tokenizer.encode_column(pa.array(texts, pa.large_string()))
        found = np.searchsorted(offsets, places_of(self._reserved, ids), side="right") - 1
        rows = np.searchsorted(np.cumsum(counts), found, side="right")
        every = list(talks)
        return [every[row] for row in np.unique(rows).tolist()]


def places_of(wanted: npt.NDArray[np.int64], ids: Ids) -> npt.NDArray[np.int64]:
    """Where `ids` have one of those `wanted`, which are sorted."""
    if not len(wanted):
        return np.zeros(0, np.int64)
    near = np.flatnonzero((ids >= wanted[0]) & (ids <= wanted[-1]))
    return near[np.isin(ids[near], wanted)]


def _is_answered(messages: Messages, tools: Tools | None) -> bool:
    return bool(messages) and messages[-1]["role"] == "assistant"


class _of_row:
    """A `DataError` within says first which row it is about; an `UnfitRow` is put into `unfit`."""

    def __init__(self, rows: Rows, index: int, unfit: dict[int, str] | None) -> None:
        self._rows, self._index, self._unfit = rows, index, unfit

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, DataError):
            return False
        said = f"{self._rows.where(self._index)}: {error}"
        if self._unfit is None or not isinstance(error, UnfitRow):
            raise DataError(said) from None
        self._unfit[self._index] = said
        return True


def _unweighed(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message without what says whether it is trained, as templates are given it."""
    if "weight" not in message:
        return message
    return {key: value for key, value in message.items() if key != "weight"}
