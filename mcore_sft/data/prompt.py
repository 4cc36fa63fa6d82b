"""Rows in, examples out: the text around what was said, and which tokens of it are trained.

    Pairs, fixed strings -> prompts and answers   -> ids                      -> Examples
    Chats | chat template -> texts, answers in them -> ids, and where they stand -> Examples

The ids before an answer are those that an evaluation engine gets for the same prompt: of a chat
template, as the whole conversation has them; of fixed strings, as the text before the answer has
them, which goes on where it ends. M = examples, S = trained runs.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mcore_sft.config import PromptConfig, Section, parse_section
from mcore_sft.data import template_jinja
from mcore_sft.data.answers import TrainOn, divided, reasoning_in, trained_in
from mcore_sft.data.chat import Chat
from mcore_sft.data.chat_template import Messages, Tools
from mcore_sft.data.conversation import (
    Conversation,
    UnfitRow,
    checked,
    texts_in,
    texts_of,
)
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import running_sum
from mcore_sft.data.masks import Masks
from mcore_sft.data.reference import require_same_ids
from mcore_sft.data.render import (
    Answer,
    Instruction,
    Markup,
    Renderer,
    Template,
    Written,
    is_file,
    read_instruction,
    read_template,
)
from mcore_sft.data.rows import Chats, Examples, Pairs, Rows
from mcore_sft.data.tokenizer import Ids, Located, Offsets, Tokenizer, sampled

Talk = tuple[Messages, Tools | None]
"""Messages of a row, checked, and its tools."""

_TAGS = ("<think>", "</think>")

SPECIAL_IN_TEXT = "special token in text"
"""Why a row is dropped whose own text spells a special token."""

_CONTROL = re.compile(r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>|</?s>|<[be]os>|<(?:start|end)_of_turn>")
"""How control tokens are spelt in the templates of the usual models."""

NO_ANSWER = "no answer at the end"
"""Why a conversation is dropped that an assistant does not end: nothing is ever cut."""

UNFIT = "does not fit the template"
"""Why a row is dropped that the template cannot write, where the run may leave such out."""

NO_STOP = "no stop token at the end"
"""Why a row with markup of its own is dropped whose answer does not end with a stop token."""

MANY_BOS = "more than one BOS token"
"""Why a row with markup of its own is dropped that begins with two."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Example:
    """Tokens [length] int32, and the runs of them that are trained: spans [S, 2] of start, end."""

    tokens: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class _Told:
    """A conversation as it is trained. last: its last message that is an answer to learn."""

    row: int
    messages: Messages
    tools: Tools | None
    last: int
    written: Written


class Prompt:
    """How problems and solutions become tokens; the same object serves training and evaluation.

    `system` stands before a problem instead of the instruction's own text; an empty one is a system
    message that says nothing, which a chat template may write otherwise than none.
    """

    def __init__(
        self,
        template: str | Template,
        instruction: str | Instruction | None,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        reasoning_tags: Sequence[str] = _TAGS,
        mask_reasoning: bool = False,
        variables: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
    ) -> None:
        self._template = template
        self._instruction = instruction
        self._tokenizer = tokenizer
        self._given_system = system
        opening, closing = reasoning_tags
        self._tags = (opening, closing)
        self._masks_reasoning = mask_reasoning
        self._variables = variables or {}
        self._date = date
        wording = read_instruction(instruction)
        self.has_instruction = wording.user != Instruction().user
        self.system = (wording.system or None) if system is None else system
        self._renderer: Renderer
        if template == "chat":
            self._renderer = Chat(wording, self.system, tokenizer, self._variables, date)
        else:
            self._renderer = Markup(read_template(template), wording, self.system, tokenizer)
        self.is_chat = template == "chat"
        self._verbatim = isinstance(self._renderer, Markup) and self._renderer.verbatim
        self.stop_tokens = self._renderer.stop_tokens
        self.stop_ids = tuple(_stop_id(token, tokenizer) for token in self.stop_tokens)
        self._reserved = np.union1d(tokenizer.special_ids, self.stop_ids)
        self._masks = Masks(tokenizer, self.stop_ids)
        asked = np.array(tokenizer.encode(self.text("1 + 1")), np.int32)
        if self._begins_twice(asked, np.array([0, len(asked)])).any():
            raise DataError(
                f"prompt.template {template!r}: a prompt begins with two BOS tokens, expected one; "
                "mend the template, or the chat template of the tokenizer"
            )
        if template != "chat" and not self._verbatim:
            self._require_tokens()

    @classmethod
    def load(cls, config: PromptConfig, tokenizer: Tokenizer) -> "Prompt":
        """The prompt that the configuration names; the content of files becomes part of it."""
        template, instruction = config.template or _own_template(tokenizer), config.instruction
        return cls(
            read_template(template) if is_file(template) else template,
            read_instruction(instruction) if is_file(instruction) else instruction,
            tokenizer,
            system=config.system,
            reasoning_tags=config.reasoning_tags,
            mask_reasoning=config.mask_reasoning,
            variables=config.variables,
            date=config.date,
        )

    @classmethod
    def restore(cls, description: Mapping[str, Any], tokenizer: Tokenizer) -> "Prompt":
        """The prompt that `describe` has described, files or not."""
        template, instruction = description["template"], description["instruction"]
        if isinstance(template, Mapping):
            template = parse_section(Template, template)
        if isinstance(instruction, Mapping):
            instruction = parse_section(Instruction, instruction)
        options = ("system", "reasoning_tags", "mask_reasoning", "variables")
        given = {name: description[name] for name in options if name in description}
        if date := description.get("date"):
            given["date"] = datetime.date.fromisoformat(str(date))
        return cls(template, instruction, tokenizer, **given)

    def describe(self) -> dict[str, Any]:
        """JSON from which `restore` makes this prompt: shipped names, or the content of files."""
        parts = {"template": self._template, "instruction": self._instruction, **self._options}
        return {
            name: part.model_dump(mode="json") if isinstance(part, Section) else part
            for name, part in parts.items()
        }

    @property
    def _options(self) -> dict[str, Any]:
        """What was asked for besides: nothing that is as it is where nothing is said."""
        options: dict[str, Any] = {}
        if self._given_system is not None:
            options["system"] = self._given_system
        if self._tags != _TAGS:
            options["reasoning_tags"] = list(self._tags)
        if self._masks_reasoning:
            options["mask_reasoning"] = True
        return options | self._given

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every string that the prompt is made of."""
        template: Any = self._tokenizer.chat_template_source
        if self._template != "chat":
            template = read_template(self._template).model_dump(mode="json")
        whole = [template, read_instruction(self._instruction).model_dump(mode="json")]
        whole += self._options.values()
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    @property
    def _given(self) -> dict[str, Any]:
        """What a chat template is given, as JSON; nothing where it is given nothing."""
        day = {} if self._date is None else {"date": self._date.isoformat()}
        return {**({"variables": dict(self._variables)} if self._variables else {}), **day}

    @cached_property
    def chat_template(self) -> str | None:
        """The markup as a Jinja chat template; None where the texts hold their own (`verbatim`)."""
        if isinstance(self._renderer, Chat):
            source = self._tokenizer.chat_template_source
            assert source is not None
            return template_jinja.with_given(source, self._variables, self._date)
        assert isinstance(self._renderer, Markup)
        if self._verbatim:
            return None
        return template_jinja.chat_template(read_template(self._template), self._renderer.end)

    def text(self, problem: str) -> str:
        """The text that a model is asked to continue."""
        return self._renderer.prompt(problem)

    def answer(self, problem: str, solution: str) -> str:
        """The text that is learned after `text(problem)`, up to and including the stop token."""
        if isinstance(self._renderer, Markup):
            return solution + self._renderer.end
        assert isinstance(self._renderer, Chat)
        written = self._renderer.write(self._renderer.messages(problem, solution), None, [1])
        return written.text[written.answers[0].begin : written.answers[0].end]

    def prompt_ids(self, problem: str) -> list[int]:
        """Ids that an engine gets for `problem`; `DataError` if it spells a special token."""
        spelt = np.intersect1d(self._tokenizer.encode(problem), self._reserved)
        if len(spelt) and not self._verbatim:
            raise DataError(
                f"problem {problem[:60]!r}: it spells the special token "
                f"{self._tokenizer.decode([int(spelt[0])])}, which would become part of the "
                "markup; remove the token from the text"
            )
        return self._tokenizer.encode(self.text(problem))

    def encode(
        self,
        rows: Pairs | Chats,
        unfit: dict[int, str] | None = None,
        train_on: TrainOn = "all",
    ) -> tuple[Examples, dict[int, str]]:
        """Examples of `rows`, and why the others, by their index, become none.

        With train_on `each` a conversation becomes as many examples as it has trained answers.
        Every example has a trained token, ends with a stop token, and does not begin with BOS
        twice; where a row would break this, the `DataError` names it. What is wrong with a row that
        the template cannot write, or whose tokens do not tell what is trained, is put into `unfit`,
        by its index, or is the `DataError` where there is none.
        """
        dropped: dict[int, str] = {}
        if isinstance(rows, Pairs) and isinstance(self._renderer, Markup):
            examples = self._of_pairs(rows, dropped, unfit)
        else:
            examples = self._of_talks(rows, dropped, unfit, train_on)
        return self._proved(examples, rows, dropped), dropped

    def example(self, conversation: Conversation) -> Example:
        """The one example of `conversation`; `DataError` if it would be dropped."""
        examples, dropped = self.encode(_row(conversation))
        if dropped:
            raise DataError(f"conversation: dropped ({dropped[0]})")
        return Example(tokens=examples.tokens, spans=examples.spans)

    def _of_pairs(
        self, rows: Pairs, dropped: dict[int, str], unfit: dict[int, str] | None
    ) -> Examples:
        """Examples of problems and solutions between fixed strings: a prompt, and what it asks."""
        examples = self._pairs(rows) if not self._masks_reasoning else self._apart(rows, unfit)
        if self._verbatim:
            return examples
        spelt = self._with_more_specials(examples)
        dropped.update(dict.fromkeys(examples.rows[spelt].tolist(), SPECIAL_IN_TEXT))
        return examples.keep(~spelt)

    def _pairs(self, rows: Pairs) -> Examples:
        assert isinstance(self._renderer, Markup)
        column = self._renderer.pairs(rows.problems, rows.solutions)
        ids, offsets = self._tokenizer.encode_turns(column)
        starts = offsets[::2]
        spans = np.stack([offsets[1::2], offsets[2::2]], axis=1) - starts[:-1, None]
        return Examples(
            tokens=ids,
            lengths=np.diff(starts).astype(np.int32),
            spans=spans.astype(np.int32),
            span_counts=np.ones(len(rows), np.int32),
            rows=np.arange(len(rows), dtype=np.int64),
        )

    def _apart(self, rows: Pairs, unfit: dict[int, str] | None) -> Examples:
        """Problems and solutions of which the reasoning is not trained."""
        told = []
        texts = zip(rows.problems.to_pylist(), rows.solutions.to_pylist(), strict=True)
        for row, (problem, solution) in enumerate(texts):
            prompt = self.text(problem)
            whole = prompt + self.answer(problem, solution)
            with _of_row(rows, row, unfit):
                answer = Answer(len(prompt), [(len(prompt), len(whole))])
                answer = self._without_reasoning(whole, answer, {})
                written = Written(text=whole, answers=[answer])
                told.append(_Told(row=row, messages=(), tools=None, last=0, written=written))
        return self._masked(rows, told, unfit)

    def _of_talks(
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
        if not self._verbatim:
            for index in self._that_spell_specials(talks):
                dropped[index] = SPECIAL_IN_TEXT
                del talks[index]
        told: list[_Told] = []
        for index, (messages, tools) in talks.items():
            with _of_row(rows, index, unfit):
                told += [self._tell(index, said, tools) for said in divided(messages, train_on)]
        examples = self._masked(rows, told, unfit)
        return examples.keep(~np.isin(examples.rows, list(unfit or ())))  # a row, or none of it

    def _tell(self, row: int, messages: Messages, tools: Tools | None) -> _Told:
        """A conversation of a row as text, with the answers that are trained."""
        trained = trained_in(messages)
        plain = list(map(_unweighed, messages))
        written = self._renderer.write(plain, tools, trained)
        if self._masks_reasoning:
            said = zip(written.answers, trained, strict=True)
            answers = [self._without_reasoning(written.text, a, plain[i]) for a, i in said]
            written = replace(written, answers=answers)
        return _Told(row=row, messages=plain, tools=tools, last=trained[-1], written=written)

    def _without_reasoning(self, text: str, answer: Answer, said: Mapping[str, Any]) -> Answer:
        """An answer to the message `said` of which the reasoning is not trained."""
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

    @property
    def _export(self) -> str | None:
        """The chat template of an export, if it is not the tokenizer's own."""
        own = self.chat_template == self._tokenizer.chat_template_source
        return None if own else self.chat_template

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
            with _of_row(rows, one.row, None):
                same = partial(
                    require_same_ids, self._tokenizer, tools=one.tools, template=self._export
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
        found = np.searchsorted(offsets, self._specials(ids), side="right") - 1
        rows = np.searchsorted(np.cumsum(counts), found, side="right")
        every = list(talks)
        return [every[row] for row in np.unique(rows).tolist()]

    def _specials(self, ids: Ids) -> npt.NDArray[np.int64]:
        """Where special tokens stand in `ids`, and stop tokens, if they are none."""
        near = np.flatnonzero((ids >= self._reserved[0]) & (ids <= self._reserved[-1]))
        return near[np.isin(ids[near], self._reserved)]

    def _with_more_specials(self, examples: Examples) -> npt.NDArray[np.bool_]:
        """Which examples [M] have other special tokens than those of the markup."""
        places = self._specials(examples.tokens)
        counts = np.diff(np.searchsorted(places, running_sum(examples.lengths)))
        return np.asarray(counts != self._num_specials)

    @cached_property
    def _num_specials(self) -> int:
        """Special tokens of the template around a problem and its solution."""
        texts = pa.array([self.text("1 + 1"), self.answer("1 + 1", "2")], pa.large_string())
        return len(self._specials(self._tokenizer.encode_turns(texts)[0]))

    def _proved(self, examples: Examples, rows: Rows, dropped: dict[int, str]) -> Examples:
        """`examples`, of which each ends with a stop token and none begins with BOS twice."""
        starts = running_sum(examples.lengths)
        no_stop = ~np.isin(examples.tokens[starts[1:] - 1], self.stop_ids)
        twice = self._begins_twice(examples.tokens, starts) & ~no_stop
        for reason, which in ((NO_STOP, no_stop), (MANY_BOS, twice)):
            found = examples.rows[which].tolist()
            if found and not self._verbatim:
                raise DataError(
                    f"{rows.where(found[0])}: {reason}, as prompt.template {self._template!r} "
                    "writes it. Fix: mend the row, or name another prompt.template"
                )
            dropped.update(dict.fromkeys(found, reason))
        return examples.keep(~(no_stop | twice))

    def _begins_twice(self, tokens: Ids, starts: Offsets) -> npt.NDArray[np.bool_]:
        """Which examples [M], whose tokens begin at `starts` [M + 1], begin with two BOS tokens."""
        if self._tokenizer.bos_id is None:
            return np.zeros(len(starts) - 1, np.bool_)
        places = np.flatnonzero(tokens == self._tokenizer.bos_id)
        pairs = places[:-1][np.diff(places) == 1]
        return np.isin(starts[:-1], pairs) & (np.diff(starts) > 1)

    def _require_tokens(self) -> None:
        """`DataError` if the markup spells a control token that the tokenizer does not have."""
        markup = "".join(map(str, read_template(self._template).model_dump().values()))
        spelt = dict.fromkeys(_CONTROL.findall(markup))
        if lacking := [token for token in spelt if token not in self._tokenizer.vocab]:
            name = self._template if isinstance(self._template, str) else "of a file"
            raise DataError(
                f"prompt.template {name}: it writes {', '.join(lacking)}, which the "
                f"tokenizer {self._tokenizer.path} does not have as a token, so that its letters "
                "would be trained. Fix: another prompt.template, or model.tokenizer=PATH"
            )


def _own_template(tokenizer: Tokenizer) -> str:
    """The name of the tokenizer's chat template; `DataError` if it has none."""
    if not tokenizer.has_chat_template:
        raise DataError(
            f"{tokenizer.path}: prompt.template is not given, and the tokenizer has no chat "
            "template of its own. Fix: prompt.template=llama3, chatml, or a .yaml file"
        )
    return "chat"


def _row(conversation: Conversation) -> Pairs | Chats:
    """One conversation as rows; a problem and its solution as those."""
    where: dict[str, Any] = {"name": "conversation", "numbers": np.ones(1, np.int64)}
    said = conversation.messages
    if [message.role for message in said] == ["user", "assistant"] and not conversation.tools:
        texts = [pa.array([message.content], pa.large_string()) for message in said]
        return Pairs(problems=texts[0], solutions=texts[1], **where)
    return Chats(messages=[list(map(asdict, said))], tools=[conversation.tools], **where)


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


def _stop_id(token: str, tokenizer: Tokenizer) -> int:
    ids = tokenizer.encode(token)
    if len(ids) != 1:
        raise DataError(
            f"{tokenizer.path}: the stop token {token!r} of the prompt template is {len(ids)} "
            "tokens in this tokenizer, expected one; name a prompt.template that fits the tokenizer"
        )
    return ids[0]
