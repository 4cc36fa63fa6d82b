"""A conversation in, an example out: the text around problem and solution, and what is trained.

    (problem, solution) -> text -> Example (tokens, spans that are trained)

The ids of a prompt come from the whole prompt text, and the solution is tokenized by itself after
it: so the ids that are trained on are those that an evaluation engine gets for the same problem.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.config import PromptConfig, Section, parse_section
from mcore_sft.data.conversation import Conversation
from mcore_sft.data.errors import DataError
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
from mcore_sft.data.tokenizer import Tokenizer

SPECIAL_IN_TEXT = "special token in text"
"""Why a row is dropped whose own text spells a special token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """Tokens [length] int32, and the runs of them that are trained: spans [S, 2] of start, end."""

    tokens: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A row that becomes no example, and why."""

    reason: str


class Prompt:
    """How problems and solutions become tokens; the same object serves training and evaluation."""

    def __init__(
        self, template: str | Template, instruction: str | Instruction | None, tokenizer: Tokenizer
    ) -> None:
        self._template = template
        self._instruction = instruction
        self._tokenizer = tokenizer
        wording = read_instruction(instruction)
        self._renderer: Renderer
        if template == "chat":
            self._renderer = Chat(wording, tokenizer)
        else:
            self._renderer = Markup(read_template(template), wording)
        self.stop_tokens = self._renderer.stop_tokens
        self.stop_ids = tuple(_stop_id(token, tokenizer) for token in self.stop_tokens)
        self._require_one_bos()

    @classmethod
    def load(cls, config: PromptConfig, tokenizer: Tokenizer) -> "Prompt":
        """The prompt that the configuration names; the content of files becomes part of it."""
        template, instruction = config.template, config.instruction
        return cls(
            read_template(template) if is_file(template) else template,
            read_instruction(instruction) if is_file(instruction) else instruction,
            tokenizer,
        )

    @classmethod
    def restore(cls, description: Mapping[str, Any], tokenizer: Tokenizer) -> "Prompt":
        """The prompt that `describe` has described, files or not."""
        template, instruction = description["template"], description["instruction"]
        if isinstance(template, Mapping):
            template = parse_section(Template, template)
        if isinstance(instruction, Mapping):
            instruction = parse_section(Instruction, instruction)
        return cls(template, instruction, tokenizer)

    def describe(self) -> dict[str, Any]:
        """JSON from which `restore` makes this prompt: shipped names, or the content of files."""
        parts = {"template": self._template, "instruction": self._instruction}
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
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    def text(self, problem: str) -> str:
        """The text that a model is asked to continue."""
        return self._renderer.prompt(problem)

    def prompt_ids(self, problem: str) -> list[int]:
        """Ids that an engine gets for `problem`; `DataError` if it spells a special token."""
        spelt = self._tokenizer.spells_special(problem)
        if spelt:
            raise DataError(
                f"problem {problem[:60]!r}: it spells the special token {spelt}, which would "
                "become part of the markup; remove the token from the text"
            )
        return self._tokenizer.encode(self.text(problem))

    def example(self, conversation: Conversation) -> Example:
        """Prompt and solution as ids; the solution with its stop token is what is trained."""
        made = self.examples([conversation])[0]
        if isinstance(made, Dropped):
            raise DataError(f"{conversation.where or 'conversation'}: dropped ({made.reason})")
        return made

    def examples(self, conversations: Sequence[Conversation]) -> list[Example | Dropped]:
        """An example or the reason for there being none, for each conversation, in order."""
        turns = [_turn(conversation) for conversation in conversations]
        special = [self._spells_special(*turn) for turn in turns]
        clean = [turn for turn, spelt in zip(turns, special, strict=True) if not spelt]
        # Data sets hold many solutions of one problem; each prompt is tokenized once.
        problems = list(dict.fromkeys(problem for problem, _ in clean))
        prompts = self._tokenizer.encode_batch([self.text(problem) for problem in problems])
        ids_of = dict(zip(problems, prompts, strict=True))
        answers = [self._renderer.answer(*turn) for turn in clean]
        solutions = self._tokenizer.encode_batch(answers)
        made = (
            _join(ids_of[problem], solution)
            for (problem, _), solution in zip(clean, solutions, strict=True)
        )
        return [Dropped(reason=SPECIAL_IN_TEXT) if spelt else next(made) for spelt in special]

    def _spells_special(self, problem: str, solution: str) -> bool:
        spells = self._tokenizer.spells_special
        return spells(problem) is not None or spells(solution) is not None

    def _require_one_bos(self) -> None:
        bos = self._tokenizer.bos_id
        if bos is None:
            return
        count = self._tokenizer.encode(self.text("1 + 1")).count(bos)
        if count > 1:
            raise DataError(
                f"prompt.template {self._template!r}: it has {count} BOS tokens, expected one; "
                "mend the template, or the chat template of the tokenizer"
            )


def _join(prompt: Sequence[int], solution: Sequence[int]) -> Example:
    tokens = np.array([*prompt, *solution], dtype=np.int32)
    return Example(tokens=tokens, spans=np.array([[len(prompt), len(tokens)]], dtype=np.int32))


def _turn(conversation: Conversation) -> tuple[str, str]:
    """Problem and solution of a conversation of one turn."""
    roles = [message.role for message in conversation.messages]
    if roles != ["user", "assistant"]:
        raise DataError(
            f"{conversation.where or 'conversation'}: expected one user message and one assistant "
            f"message, found {', '.join(roles) or 'none'}"
        )
    problem, solution = conversation.messages
    return problem.content, solution.content


def _stop_id(token: str, tokenizer: Tokenizer) -> int:
    ids = tokenizer.encode(token)
    if len(ids) != 1:
        raise DataError(
            f"{tokenizer.path}: the stop token {token!r} of the prompt template is {len(ids)} "
            "tokens in this tokenizer, expected one; name a prompt.template that fits the tokenizer"
        )
    return ids[0]
