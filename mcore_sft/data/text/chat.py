"""A conversation and the tokenizer's own chat template in, text and its trained answers out.

What is trained is what the `{% generation %}` blocks of the template hold behind the prompt for an
answer. Without such, it is what follows in the text on the prompt that the template writes for it.
"""

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mcore_sft.data.errors import DataError
from mcore_sft.data.sources.conversation import UnfitRow
from mcore_sft.data.text.chat_template import ChatTemplate, Messages, Tools
from mcore_sft.data.text.lost_content import require_written
from mcore_sft.data.text.render import Answer, Instruction, Written, cut_after_stop
from mcore_sft.data.text.tokenizer import Tokenizer

_ANSWER = "forty-two"

_PROMPTS = 32
"""Prompts of a conversation of plain text that are written to see whether they stay what they are.
Each costs as much as all that stands before it."""

_PLAIN = {"role", "content"}

_ONE_AT_A_TIME = (
    "train each answer in an example of its own (data.train_on=each), or the last alone "
    "(data.train_on=last)"
)


class Chat:
    """The tokenizer's own chat template, around problems as `wording` and `system` say.

    variables, date: what the template is given and told (`ChatTemplate`).
    """

    def __init__(
        self,
        wording: Instruction,
        system: str | None,
        tokenizer: Tokenizer,
        variables: Mapping[str, Any],
        date: datetime.date | None,
    ) -> None:
        self._wording = wording
        self._system = system
        if tokenizer.chat_template is None:
            raise DataError(
                f"{tokenizer.path}: prompt.template is `chat`, but the tokenizer has no chat "
                "template; give one in chat_template.jinja, or name another prompt.template"
            )
        templates = tokenizer.chat_templates.items()
        self._templates = {name: one.given(variables, date) for name, one in templates}
        self._template = self._templates["default"]
        spelt = tokenizer.special_in((system or "") + wording.user)
        if spelt is not None:
            raise DataError(
                f"prompt.instruction or prompt.system: it spells the special token {spelt}, which "
                "would become part of the markup; remove the token from it"
            )
        answered = self._template.render(self.messages("1 + 1", _ANSWER))
        if _ANSWER not in answered:
            raise DataError(
                f"{tokenizer.path}: its chat template does not write what the assistant says; "
                "name another prompt.template"
            )
        ending = answered.rpartition(_ANSWER)[2]
        stop = tokenizer.special_in(ending)
        if stop is None:
            raise DataError(
                f"{tokenizer.path}: its chat template ends an answer with {ending!r}, which holds "
                "no special token to stop at; name another prompt.template"
            )
        self._stop = stop
        self.stop_tokens: tuple[str, ...] = (stop,)

    def prompt(self, problem: str) -> str:
        """All that stands before the answer."""
        return self._template.render(self._asked(problem), add_generation_prompt=True)

    def messages(self, problem: str, solution: str) -> list[dict[str, str]]:
        """A problem and its solution as a conversation."""
        return [*self._asked(problem), {"role": "assistant", "content": solution}]

    def write(self, messages: Messages, tools: Tools | None, trained: Sequence[int]) -> Written:
        """The text of the whole conversation."""
        template = self._templates.get("tool_use", self._template) if tools else self._template
        turns = _Turns(template, self._stop, messages, tools)
        text, answers = turns.find(trained)
        places = {i: (a.begin, a.end) for i, a in zip(trained, answers, strict=True)}
        require_written(template, messages, tools, text, places, stop=self._stop)
        return Written(text=text, answers=answers)

    def _asked(self, problem: str) -> list[dict[str, str]]:
        said = [{"role": "user", "content": self._wording.fill(problem)}]
        if self._system is None:
            return said
        return [{"role": "system", "content": self._system}, *said]


def require_asked(
    tokenizer: Tokenizer, variables: Mapping[str, Any], date: datetime.date | None
) -> None:
    """`DataError` if something is given that no chat template of the tokenizer names."""
    source = "".join(own.source for own in tokenizer.chat_templates.values())
    for name in variables:
        if not re.search(rf"\b{re.escape(name)}\b", source):
            raise DataError(
                f"prompt.variables: the chat template does not ask for {name!r}, which would have "
                "no effect. Fix: take it away, or mend its name"
            )
    if date is not None and "strftime_now" not in source:
        other = ", or name the day in prompt.variables.date_string" * ("date_string" in source)
        raise DataError(
            "prompt.date: the chat template does not ask for today's date (strftime_now), so that "
            f"it would have no effect. Fix: take it away{other}"
        )


class _Turns:
    """The messages of one conversation, and where a template writes them."""

    def __init__(
        self, template: ChatTemplate, stop: str, messages: Messages, tools: Tools | None
    ) -> None:
        self._template = template
        self._stop = stop
        self._messages = messages
        self._tools = tools
        self._text = ""

    def find(self, trained: Sequence[int]) -> tuple[str, list[Answer]]:
        """The text of all messages, and where the answers `trained` stand in it."""
        if not self._template.marks_answers:
            self._text = self._template.render(self._messages, tools=self._tools)
            return self._text, self._behind_prompts(trained)
        self._text, blocks = self._template.render_marked(self._messages, tools=self._tools)
        said = [i for i, message in enumerate(self._messages) if message["role"] == "assistant"]
        answers = self._in_a_block_each(blocks, trained, said)
        return self._text, answers or self._in_blocks(blocks, trained, said)

    def _behind_prompts(self, trained: Sequence[int]) -> list[Answer]:
        written = {*trained[:: 1 + len(trained) // _PROMPTS], trained[-1]}
        answers: list[Answer] = []
        opening, first, done = "", 0, 0
        for i in trained:
            begin, end = -1, -1
            if i not in written and opening and all(map(_is_plain, self._messages[first : i + 1])):
                begin = self._text.find(opening, done) + len(opening)
                end = self._plain_end(begin, i)
            if end < 0:
                begin = self._prompt_end(i)
                end = self._answer_end(begin, i, again=not answers)
            if not answers and len(written) < len(trained):
                opening = self._opening(begin, i) or ""
            answers.append(Answer(begin, [(begin, end)]))
            first, done = i + 1, end
        return answers

    def _prompt_end(self, i: int) -> int:
        """Where the prompt for message `i` ends."""
        try:
            prompt = self._before(i, asks=True)
        except UnfitRow:
            if i:
                raise
            return self._first_prompt_end()  # not all can write no message at all
        if not self._text.startswith(prompt):
            if i + 1 == len(self._messages):
                raise self._unfit(
                    f"does not write message {i + 1} behind the prompt that asks for it, which "
                    f"ends with {prompt[-40:]!r}"
                )
            raise self._unfit(
                f"changes the prompt for message {i + 1} once more of the conversation follows, so "
                "that its answer would be trained after a prompt that no engine sends",
                _ONE_AT_A_TIME,
            )
        return len(prompt)

    def _first_prompt_end(self) -> int:
        """Where a first message ends to be asked for, by what asks for any."""
        asked = [{"role": "user", "content": "1 + 1"}]
        said = self._template.render(asked)
        opening = self._template.render(asked, add_generation_prompt=True)[len(said) :]
        at = self._text.find(opening) if opening else -1
        if at < 0:
            raise self._unfit("does not tell where an assistant that speaks first begins")
        return at + len(opening)

    def _opening(self, begin: int, i: int) -> str | None:
        """What asks for message `i`, which begins at `begin`; None where that cannot be told."""
        before = self._before(i, asks=False) if i else ""
        return self._text[len(before) : begin] if self._text.startswith(before) else None

    def _answer_end(self, begin: int, i: int, *, again: bool) -> int:
        """Where the stop token of message `i` ends, which begins at `begin`.

        All but plain text is written with nothing behind it, to see whether it stays what it was;
        plain text too, if `again`.
        """
        if i + 1 == len(self._messages):
            return begin + len(self._up_to_stop(self._text[begin:]))
        end = self._plain_end(begin, i)
        if end < 0 or again:
            alone = self._before(i + 1, asks=False)
            end = begin + len(self._up_to_stop(alone[begin:]))
            if alone[:end] != self._text[:end]:
                raise self._unfit(
                    f"writes the answer of message {i + 1} otherwise once more of the conversation "
                    "follows",
                    _ONE_AT_A_TIME,
                )
        return end

    def _plain_end(self, begin: int, i: int) -> int:
        """Where the stop token of message `i` ends, if it begins with plain text; else -1."""
        at = self._text.find(self._stop, begin)
        message = self._messages[i]
        plain = at >= 0 and _is_plain(message) and _same(self._text[begin:at], message["content"])
        return at + len(self._stop) if plain else -1

    def _in_a_block_each(
        self, blocks: Sequence[tuple[int, int]], trained: Sequence[int], said: Sequence[int]
    ) -> list[Answer] | None:
        """The answers, where each message of an assistant is a block and is asked for alike.

        A block may begin within what asks for the answer. That is written for the last one alone.
        """
        if len(blocks) != len(said):
            return None
        at = dict(zip(said, blocks, strict=True))
        last = trained[-1]
        end = self._prompt_end(last)
        opening, inner = self._opening(end, last), end - at[last][0]
        begins = [at[i][0] + inner for i in trained]
        if opening is None or inner < 0:
            return None
        if not all(self._text.startswith(opening, begin - len(opening)) for begin in begins):
            return None
        return [self._in_block(b, [at[i]]) for i, b in zip(trained, begins, strict=True)]

    def _in_blocks(
        self, blocks: Sequence[tuple[int, int]], trained: Sequence[int], said: Sequence[int]
    ) -> list[Answer]:
        """The answers, each of the blocks between its prompt and the next."""
        begins = [self._prompt_end(i) for i in said]
        ends = [*begins[1:], len(self._text)]
        return [
            self._in_block(
                begin, [block for block in blocks if begin < block[1] and block[0] < end]
            )
            for i, begin, end in zip(said, begins, ends, strict=True)
            if i in trained
        ]

    def _in_block(self, begin: int, blocks: Sequence[tuple[int, int]]) -> Answer:
        """The answer that is asked for up to `begin`, of which `blocks` are trained."""
        if not blocks or blocks[0][0] > begin:
            found = blocks[0][0] if blocks else "none"
            raise self._unfit(
                "has {% generation %} blocks that do not begin where an assistant is asked to "
                f"speak (got {found}, expected character {begin})"
            )
        spans = []
        for first, last in blocks:
            at = self._text.find(self._stop, first, last)
            spans.append((max(first, begin), at + len(self._stop) if at >= 0 else last))
            if at >= 0:
                return Answer(begin, spans)
        raise self._without_stop(self._text[begin : blocks[-1][1]])

    def _before(self, i: int, *, asks: bool) -> str:
        return self._template.render(
            self._messages[:i], tools=self._tools, add_generation_prompt=asks
        )

    def _up_to_stop(self, text: str) -> str:
        answer = cut_after_stop(text, (self._stop,))
        if answer is None:
            raise self._without_stop(text)
        return answer

    def _without_stop(self, text: str) -> UnfitRow:
        return self._unfit(f"ends the answer {text[-60:]!r} without {self._stop}")

    def _unfit(self, what: str, fix: str = "mend the row") -> UnfitRow:
        return UnfitRow(
            f"{self._template.where}: the chat template {what}. Fix: {fix}, or name another "
            "prompt.template"
        )


def _is_plain(message: Mapping[str, Any]) -> bool:
    return message.keys() <= _PLAIN and message["role"] != "tool"


def _same(written: str, said: str) -> bool:
    return written.strip() == said.strip()
