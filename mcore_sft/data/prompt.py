"""Rows in, examples out: the text around what was said, and which tokens of it are trained.

    Pairs | Chats -> pieces of text, untrained and trained in turn -> ids -> Examples

The ids of a prompt come from the whole text before an answer, and the answer is tokenized by itself
after it: so the ids that are trained on are those that an evaluation engine gets for the same
prompt. M = examples, G = pieces of text.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mcore_sft.config import PromptConfig, Section, parse_section
from mcore_sft.data import template_jinja
from mcore_sft.data.chat_template import Messages, Tools
from mcore_sft.data.conversation import (
    Conversation,
    UnfitRow,
    checked,
    is_trained,
    texts_in,
)
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import running_sum
from mcore_sft.data.render import (
    Chat,
    Instruction,
    Markup,
    Renderer,
    Template,
    is_file,
    read_instruction,
    read_template,
)
from mcore_sft.data.rows import Chats, Examples, Pairs, Rows
from mcore_sft.data.tokenizer import Ids, Offsets, Tokenizer

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
"""Why a row with markup of its own is dropped that begins twice."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Example:
    """Tokens [length] int32, and the runs of them that are trained: spans [S, 2] of start, end."""

    tokens: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pieces:
    """Texts [G] end to end, untrained and trained in turn; counts [M] even, and rows [M], int64."""

    texts: pa.LargeStringArray
    counts: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]

    @property
    def firsts(self) -> npt.NDArray[np.int64]:
        """The first piece of each example, and the end of the last one's, [M + 1]."""
        return running_sum(self.counts)


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
    ) -> None:
        self._template = template
        self._instruction = instruction
        self._tokenizer = tokenizer
        self._given_system = system
        wording = read_instruction(instruction)
        self.has_instruction = wording.user != Instruction().user
        self.system = (wording.system or None) if system is None else system
        self._renderer: Renderer
        if template == "chat":
            self._renderer = Chat(wording, self.system, tokenizer)
        else:
            self._renderer = Markup(read_template(template), wording, self.system, tokenizer)
        self._verbatim = isinstance(self._renderer, Markup) and self._renderer.verbatim
        self.stop_tokens = self._renderer.stop_tokens
        self.stop_ids = tuple(_stop_id(token, tokenizer) for token in self.stop_tokens)
        self._reserved = np.union1d(tokenizer.special_ids, self.stop_ids)
        self._num_bos = self._count_bos()
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
        )

    @classmethod
    def restore(cls, description: Mapping[str, Any], tokenizer: Tokenizer) -> "Prompt":
        """The prompt that `describe` has described, files or not."""
        template, instruction = description["template"], description["instruction"]
        if isinstance(template, Mapping):
            template = parse_section(Template, template)
        if isinstance(instruction, Mapping):
            instruction = parse_section(Instruction, instruction)
        return cls(template, instruction, tokenizer, system=description.get("system"))

    def describe(self) -> dict[str, Any]:
        """JSON from which `restore` makes this prompt: shipped names, or the content of files."""
        parts: dict[str, Any] = {"template": self._template, "instruction": self._instruction}
        if self._given_system is not None:
            parts["system"] = self._given_system
        return {
            name: part.model_dump(mode="json") if isinstance(part, Section) else part
            for name, part in parts.items()
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every string that the prompt is made of."""
        template: Any = self._tokenizer.chat_template_source
        if self._template != "chat":
            template = read_template(self._template).model_dump(mode="json")
        whole = [template, read_instruction(self._instruction).model_dump(mode="json")]
        if self._given_system is not None:
            whole.append(self._given_system)
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    @property
    def chat_template(self) -> str | None:
        """The markup as a Jinja chat template; None where the texts hold their own (`verbatim`)."""
        if isinstance(self._renderer, Chat):
            return self._tokenizer.chat_template_source
        assert isinstance(self._renderer, Markup)
        if self._verbatim:
            return None
        return template_jinja.chat_template(read_template(self._template), self._renderer.end)

    def text(self, problem: str) -> str:
        """The text that a model is asked to continue."""
        return self._renderer.prompt(problem)

    def answer(self, problem: str, solution: str) -> str:
        """The text that is learned after `text(problem)`, up to and including the stop token."""
        return self._renderer.pair(problem, solution)[1]

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
        self, rows: Pairs | Chats, unfit: dict[int, str] | None = None
    ) -> tuple[Examples, dict[int, str]]:
        """Examples of `rows`, and why the others, by their index, become none.

        Every example has a trained token, ends each answer with a stop token, and has the BOS of
        the template once, or none; where a row would break this, the `DataError` names it. What is
        wrong with a row that the template cannot write is put into `unfit`, by its index, or is
        the `DataError` where there is none.
        """
        dropped: dict[int, str] = {}
        pieces = self._pieces(rows, dropped, unfit)
        ids, offsets = self._tokenizer.encode_column(pieces.texts)
        examples = _assemble(pieces, ids, offsets)
        if isinstance(rows, Chats):
            same = self._have_prompts_of_an_engine(rows, pieces, ids, offsets, unfit)
            examples = examples.keep(same)
        if isinstance(rows, Pairs) and isinstance(self._renderer, Markup) and not self._verbatim:
            spelt = self._with_more_specials(examples)
            dropped.update(dict.fromkeys(examples.rows[spelt].tolist(), SPECIAL_IN_TEXT))
            examples = examples.keep(~spelt) if spelt.any() else examples
        return self._proved(examples, rows, dropped), dropped

    def example(self, conversation: Conversation) -> Example:
        """The one example of `conversation`; `DataError` if it would be dropped."""
        examples, dropped = self.encode(_row(conversation))
        if dropped:
            raise DataError(f"conversation: dropped ({dropped[0]})")
        return Example(tokens=examples.tokens, spans=examples.spans)

    def _pieces(
        self, rows: Pairs | Chats, dropped: dict[int, str], unfit: dict[int, str] | None
    ) -> _Pieces:
        """The text of every row, but for those that are dropped here, or unfit."""
        if isinstance(rows, Pairs) and isinstance(self._renderer, Markup):
            column = self._renderer.pairs(rows.problems, rows.solutions)
            every = np.arange(len(rows), dtype=np.int64)
            return _Pieces(texts=column, counts=np.full(len(rows), 2, np.int64), rows=every)
        talks: dict[int, tuple[Messages, Tools | None]] = {}
        for index in range(len(rows)):
            with _of_row(rows, index, unfit):
                talk = self._talk(rows, index)
                if _is_answered(*talk):
                    talks[index] = talk
                else:
                    dropped[index] = NO_ANSWER
        if not self._verbatim:
            for index in self._that_spell_specials(talks):
                dropped[index] = SPECIAL_IN_TEXT
                del talks[index]
        made: dict[int, list[str]] = {}
        for index, (messages, tools) in talks.items():
            with _of_row(rows, index, unfit):
                made[index] = self._turns(messages, tools)
        return _Pieces(
            texts=pa.array(list(chain.from_iterable(made.values())), pa.large_string()),
            counts=np.array([len(pieces) for pieces in made.values()], np.int64),
            rows=np.array(list(made), np.int64),
        )

    def _talk(self, rows: Pairs | Chats, index: int) -> tuple[Messages, Tools | None]:
        """Messages and tools of a row."""
        if isinstance(rows, Chats):
            return checked(rows.messages[index]), rows.tools[index] if rows.tools else None
        assert isinstance(self._renderer, Chat)
        problem, solution = rows.problems[index].as_py(), rows.solutions[index].as_py()
        return self._renderer.messages(problem, solution), None

    def _turns(self, messages: Messages, tools: Tools | None) -> list[str]:
        """The text of a conversation: what is not trained, what is, and so on."""
        plain = [{key: said[key] for key in said if key != "weight"} for said in messages]
        pieces = self._renderer.turns(plain, tools)
        return _learned(pieces, [said for said in messages if said["role"] == "assistant"])

    def _that_spell_specials(self, talks: Mapping[int, tuple[Messages, Tools | None]]) -> list[int]:
        """Which of `talks` hold a special token in a text of their own."""
        texts = [(index, text) for index, talk in talks.items() for text in texts_in(talk)]
        column = pa.array([text for _, text in texts], pa.large_string())
        ids, offsets = self._tokenizer.encode_column(column)
        places = self._specials(ids)
        found = np.searchsorted(offsets, places, side="right") - 1
        return sorted({texts[i][0] for i in found.tolist()})

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
        pieces = self._tokenizer.encode_batch(self._renderer.pair("1 + 1", "2"))
        return sum(len(self._specials(np.array(ids, dtype=np.int32))) for ids in pieces)

    def _have_prompts_of_an_engine(
        self,
        rows: Chats,
        pieces: _Pieces,
        ids: Ids,
        offsets: Offsets,
        unfit: dict[int, str] | None,
    ) -> npt.NDArray[np.bool_]:
        """Whether what stands before later answers has the ids that it has as one text [M]."""
        firsts = pieces.firsts
        answers = [
            (m, first, answer)
            for m, (first, last) in enumerate(pairwise(firsts.tolist()))
            for answer in range(first + 3, last, 2)
        ]
        texts = ["".join(pieces.texts[first:answer].to_pylist()) for _, first, answer in answers]
        whole, ends = self._tokenizer.encode_column(pa.array(texts, pa.large_string()))
        same = np.ones(len(pieces.rows), np.bool_)
        for k, (m, first, answer) in enumerate(answers):
            trained, asked = ids[offsets[first] : offsets[answer]], whole[ends[k] : ends[k + 1]]
            if same[m] and not np.array_equal(trained, asked):
                same[m] = False
                with _of_row(rows, int(pieces.rows[m]), unfit):
                    raise UnfitRow(self._difference(trained, asked))
        return same

    def _difference(self, trained: Ids, asked: Ids) -> str:
        """Where two ways to write one text as ids part, in words."""
        shorter = min(len(trained), len(asked))
        others = np.flatnonzero(trained[:shorter] != asked[:shorter])
        at = int(others[0]) if len(others) else shorter
        near = self._tokenizer.decode(trained[max(0, at - 8) : at + 8].tolist())
        return (
            f"before its last answers an engine would send {asked[at : at + 3].tolist()} where "
            f"turns that are tokenized one by one have {trained[at : at + 3].tolist()}, near "
            f"{near!r}; mend the row (does an answer begin or end with white space?), or name "
            "another prompt.template"
        )

    def _proved(self, examples: Examples, rows: Rows, dropped: dict[int, str]) -> Examples:
        """`examples`, of which each ends its answers with a stop token and has one BOS at most."""
        starts = running_sum(examples.lengths)
        spans = running_sum(examples.span_counts)
        owners = np.repeat(np.arange(len(examples)), examples.span_counts)
        last = examples.tokens[starts[owners] + examples.spans[:, 1] - 1]
        no_stop = np.zeros(len(examples), np.bool_)
        no_stop[owners[~np.isin(last, self.stop_ids)]] = True
        no_stop |= np.diff(spans) == 0
        many_bos = self._other_bos(examples, starts)
        for reason, which in ((NO_STOP, no_stop), (MANY_BOS, many_bos & ~no_stop)):
            found = examples.rows[which].tolist()
            if found and not self._verbatim:
                raise DataError(
                    f"{rows.where(found[0])}: expected a stop token at the end of each answer, and "
                    f"{self._num_bos} BOS tokens, as prompt.template {self._template!r} has them "
                    "elsewhere; mend it, or name another"
                )
            dropped.update(dict.fromkeys(found, reason))
        good = ~(no_stop | many_bos)
        return examples if good.all() else examples.keep(good)

    def _other_bos(self, examples: Examples, starts: Offsets) -> npt.NDArray[np.bool_]:
        """Which examples [M] do not have as many BOS tokens as the template: one, or none."""
        bos = self._tokenizer.bos_id
        if bos is None:
            return np.zeros(len(examples), np.bool_)
        places = np.flatnonzero(examples.tokens == bos)
        ends = starts[1:]
        if bos in self.stop_ids:  # it ends answers too: only the prompt tells
            ends = starts[:-1] + examples.spans[running_sum(examples.span_counts)[:-1], 0]
        counts = np.searchsorted(places, ends) - np.searchsorted(places, starts[:-1])
        return np.asarray(counts > 1 if self._verbatim else counts != self._num_bos)

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

    def _count_bos(self) -> int:
        """BOS tokens of the template: one, or none."""
        bos = self._tokenizer.bos_id
        count = 0 if bos is None else self._tokenizer.encode(self.text("1 + 1")).count(bos)
        if count > 1:
            raise DataError(
                f"prompt.template {self._template!r}: it has {count} BOS tokens, expected one; "
                "mend the template, or the chat template of the tokenizer"
            )
        return count


def _own_template(tokenizer: Tokenizer) -> str:
    """The name of the tokenizer's chat template; `DataError` if it has none."""
    if not tokenizer.has_chat_template:
        raise DataError(
            f"{tokenizer.path}: prompt.template is not given, and the tokenizer has no chat "
            "template of its own. Fix: prompt.template=llama3, chatml, or a .yaml file"
        )
    return "chat"


def _assemble(pieces: _Pieces, ids: Ids, offsets: Offsets) -> Examples:
    """The ids of all pieces as examples; every second piece is trained."""
    starts = offsets[pieces.firsts]
    runs = pieces.counts // 2
    spans = np.stack([offsets[1:-1:2], offsets[2::2]], axis=1)
    spans -= np.repeat(starts[:-1], runs)[:, None]
    return Examples(
        tokens=ids,
        lengths=np.diff(starts).astype(np.int32),
        spans=spans.astype(np.int32),
        span_counts=runs.astype(np.int32),
        rows=pieces.rows,
    )


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


@contextmanager
def _of_row(rows: Rows, index: int, unfit: dict[int, str] | None) -> Iterator[None]:
    """A `DataError` within says first which row it is about; an `UnfitRow` is put into `unfit`."""
    try:
        yield
    except DataError as error:
        said = f"{rows.where(index)}: {error}"
        if unfit is None or not isinstance(error, UnfitRow):
            raise DataError(said) from None
        unfit[index] = said


def _learned(pieces: Sequence[str], answers: Messages) -> list[str]:
    """`pieces` in which an answer that is not trained is part of what stands before the next."""
    kept, before = [], ""
    for said, asked, answer in zip(answers, pieces[::2], pieces[1::2], strict=True):
        before += asked
        if is_trained(said):
            kept += [before, answer]
            before = ""
        else:
            before += answer
    return kept


def _stop_id(token: str, tokenizer: Tokenizer) -> int:
    ids = tokenizer.encode(token)
    if len(ids) != 1:
        raise DataError(
            f"{tokenizer.path}: the stop token {token!r} of the prompt template is {len(ids)} "
            "tokens in this tokenizer, expected one; name a prompt.template that fits the tokenizer"
        )
    return ids[0]
