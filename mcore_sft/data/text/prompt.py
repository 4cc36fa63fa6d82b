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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mcore_sft.config import PromptConfig, Section, parse_section
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import running_sum
from mcore_sft.data.rows import Chats, Examples, Pairs, Rows
from mcore_sft.data.sources.conversation import Conversation
from mcore_sft.data.text import template_jinja
from mcore_sft.data.text.answers import TrainOn
from mcore_sft.data.text.chat import Chat
from mcore_sft.data.text.render import (
    Instruction,
    Markup,
    Template,
    is_file,
    read_instruction,
    read_template,
)
from mcore_sft.data.text.talks import SPECIAL_IN_TEXT, Talks, places_of
from mcore_sft.data.text.tokenizer import Ids, Offsets, Tokenizer

_TAGS = ("<think>", "</think>")

_CONTROL = re.compile(r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>|</?s>|<[be]os>|<(?:start|end)_of_turn>")
"""How control tokens are spelt in the templates of the usual models."""

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
        self._renderer: Chat | Markup
        if template == "chat":
            self._renderer = Chat(wording, self.system, tokenizer, self._variables, date)
        else:
            self._renderer = Markup(read_template(template), wording, self.system, tokenizer)
        self.is_chat = template == "chat"
        self._verbatim = isinstance(self._renderer, Markup) and self._renderer.verbatim
        self.stop_tokens = self._renderer.stop_tokens
        self.stop_ids = tuple(_stop_id(token, tokenizer) for token in self.stop_tokens)
        self._reserved = np.union1d(tokenizer.special_ids, self.stop_ids)
        self._talks = Talks(
            self._renderer,
            tokenizer,
            stop_ids=self.stop_ids,
            reserved=() if self._verbatim else self._reserved.tolist(),
            tags=self._tags if mask_reasoning else None,
            exported={
                name: template
                for name, template in self.chat_templates.items()
                if name not in tokenizer.chat_templates
                or template != tokenizer.chat_templates[name].source
            },
        )
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

    @property
    def chat_template(self) -> str | None:
        """The markup as a Jinja chat template; None where the texts hold their own (`verbatim`)."""
        return self.chat_templates.get("default")

    @cached_property
    def chat_templates(self) -> Mapping[str, str]:
        """All of it by name, as `tool_use`, which writes conversations with tools where it is."""
        if isinstance(self._renderer, Chat):
            return {
                name: template_jinja.with_given(own.source, self._variables, self._date)
                for name, own in self._tokenizer.chat_templates.items()
            }
        assert isinstance(self._renderer, Markup)
        if self._verbatim:
            return {}
        template = read_template(self._template)
        return {"default": template_jinja.chat_template(template, self._renderer.end)}

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
            examples = self._talks.encode(rows, dropped, unfit, train_on)
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
        examples = (
            self._pairs(rows) if not self._masks_reasoning else self._talks.apart(rows, unfit)
        )
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

    def _with_more_specials(self, examples: Examples) -> npt.NDArray[np.bool_]:
        """Which examples [M] have other special tokens than those of the markup."""
        places = places_of(self._reserved, examples.tokens)
        counts = np.diff(np.searchsorted(places, running_sum(examples.lengths)))
        return np.asarray(counts != self._num_specials)

    @cached_property
    def _num_specials(self) -> int:
        """Special tokens of the template around a problem and its solution."""
        texts = pa.array([self.text("1 + 1"), self.answer("1 + 1", "2")], pa.large_string())
        return len(places_of(self._reserved, self._tokenizer.encode_turns(texts)[0]))

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


def _stop_id(token: str, tokenizer: Tokenizer) -> int:
    ids = tokenizer.encode(token)
    if len(ids) != 1:
        raise DataError(
            f"{tokenizer.path}: the stop token {token!r} of the prompt template is {len(ids)} "
            "tokens in this tokenizer, expected one; name a prompt.template that fits the tokenizer"
        )
    return ids[0]
