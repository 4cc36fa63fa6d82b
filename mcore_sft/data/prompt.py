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
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import yaml

from mcore_sft.config import ConfigError, PromptConfig, Section, parse_section
from mcore_sft.data.conversation import Conversation
from mcore_sft.data.errors import DataError
from mcore_sft.data.tokenizer import Tokenizer

SPECIAL_IN_TEXT = "special token in text"
"""Why a row is dropped whose own text spells a special token."""

_HERE = Path(__file__).parent


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


class Template(Section):
    """The markup around the parts of a conversation."""

    text_begin: str = ""
    system_begin: str = ""
    system_end: str = ""
    user_begin: str = ""
    user_end: str = ""
    assistant_begin: str = ""
    assistant_end: str = ""
    stop_phrases: tuple[str, ...] = ()


class Instruction(Section):
    """What is said around the problem; `{problem}` stands for it in `user`."""

    system: str = ""
    user: str = "{problem}"

    def fill(self, problem: str) -> str:
        """What the user says."""
        before, _, after = self.user.partition("{problem}")
        return before + problem + after


class Renderer(Protocol):
    """Text before the answer, and the answer up to and including the stop token."""

    stop_tokens: tuple[str, ...]

    def prompt(self, problem: str) -> str:
        """All that stands before the answer."""

    def answer(self, problem: str, solution: str) -> str:
        """`solution` as it is learned, stop token included."""


class Prompt:
    """How problems and solutions become tokens; the same object serves training and evaluation."""

    def __init__(
        self, template: str | Template, instruction: str | Instruction | None, tokenizer: Tokenizer
    ) -> None:
        self._template = template
        self._instruction = instruction
        self._tokenizer = tokenizer
        wording = _instruction(instruction)
        self._renderer: Renderer
        if template == "chat":
            self._renderer = _Chat(wording, tokenizer)
        else:
            self._renderer = _Markup(_template(template), wording, tokenizer)
        self.stop_tokens = self._renderer.stop_tokens
        self.stop_ids = tuple(_stop_id(token, tokenizer) for token in self.stop_tokens)
        self._require_one_bos()

    @classmethod
    def load(cls, config: PromptConfig, tokenizer: Tokenizer) -> "Prompt":
        """The prompt that the configuration names; a name that ends in .yaml is a file."""
        template: str | Template = config.template
        if config.template.endswith((".yaml", ".yml")):
            template = cast(Template, _read(Template, Path(config.template)))
        instruction: str | Instruction | None = config.instruction
        if config.instruction and config.instruction.endswith((".yaml", ".yml")):
            instruction = cast(Instruction, _read(Instruction, Path(config.instruction)))
        return cls(template, instruction, tokenizer)

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
            template = _template(self._template).model_dump(mode="json")
        whole = [template, _instruction(self._instruction).model_dump(mode="json")]
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


class _Markup:
    """A template of fixed strings; the system block is there even when it is empty."""

    def __init__(self, template: Template, wording: Instruction, tokenizer: Tokenizer) -> None:
        self._template = template
        self._wording = wording
        self.stop_tokens = template.stop_phrases
        if not self.stop_tokens:
            raise DataError(
                "prompt.template: stop_phrases is empty, so a model could never learn to stop; "
                "name the token that ends an answer"
            )
        self._end = _cut_after_stop(template.assistant_end, self.stop_tokens)
        if self._end is None:
            raise DataError(
                f"prompt.template: assistant_end {template.assistant_end!r} holds none of the "
                f"stop_phrases {list(self.stop_tokens)}, so that a model could never learn to stop"
            )

    def prompt(self, problem: str) -> str:
        t = self._template
        system = t.system_begin + self._wording.system + t.system_end
        user = t.user_begin + self._wording.fill(problem) + t.user_end
        return t.text_begin + system + user + t.assistant_begin

    def answer(self, problem: str, solution: str) -> str:
        assert self._end is not None
        return solution + self._end


class _Chat:
    """The tokenizer's own chat template, rendered once without the answer and once with it."""

    def __init__(self, wording: Instruction, tokenizer: Tokenizer) -> None:
        self._wording = wording
        self._tokenizer = tokenizer
        if not tokenizer.has_chat_template:
            raise DataError(
                f"{tokenizer.path}: prompt.template is `chat`, but the tokenizer has no chat "
                "template; give one in chat_template.jinja, or name another prompt.template"
            )
        ending = self._after_prompt("1 + 1", "2")
        stop = tokenizer.spells_special(ending)
        if stop is None:
            raise DataError(
                f"{tokenizer.path}: its chat template ends an answer with {ending!r}, which holds "
                "no special token to stop at; name another prompt.template"
            )
        self.stop_tokens: tuple[str, ...] = (stop,)

    def prompt(self, problem: str) -> str:
        return self._render(self._messages(problem), add_generation_prompt=True)

    def answer(self, problem: str, solution: str) -> str:
        ending = self._after_prompt(problem, solution)
        answer = _cut_after_stop(ending, self.stop_tokens)
        if answer is None:
            raise DataError(
                f"{self._tokenizer.path}: its chat template ends the answer to {problem[:60]!r} "
                f"without {self.stop_tokens[0]}; name another prompt.template"
            )
        return answer

    def _after_prompt(self, problem: str, solution: str) -> str:
        before = self.prompt(problem)
        messages = [*self._messages(problem), {"role": "assistant", "content": solution}]
        whole = self._render(messages, add_generation_prompt=False)
        if not whole.startswith(before):
            raise DataError(
                f"{self._tokenizer.path}: its chat template changes the prompt once an answer "
                f"follows: the conversation about {problem[:60]!r} does not begin with the text "
                "that asks for the answer; name another prompt.template"
            )
        return whole[len(before) :]

    def _messages(self, problem: str) -> list[dict[str, str]]:
        system = (
            [{"role": "system", "content": self._wording.system}] if self._wording.system else []
        )
        return [*system, {"role": "user", "content": self._wording.fill(problem)}]

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        text = self._tokenizer.chat(messages, add_generation_prompt=add_generation_prompt)
        assert text is not None
        return text


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


def _cut_after_stop(text: str, stops: Sequence[str]) -> str | None:
    """`text` up to the end of the first stop token in it; None if there is none."""
    found = [(text.index(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    start, stop = min(found)
    return text[: start + len(stop)]


def _stop_id(token: str, tokenizer: Tokenizer) -> int:
    ids = tokenizer.encode(token)
    if len(ids) != 1:
        raise DataError(
            f"{tokenizer.path}: the stop token {token!r} of the prompt template is {len(ids)} "
            "tokens in this tokenizer, expected one; name a prompt.template that fits the tokenizer"
        )
    return ids[0]


def _template(template: str | Template) -> Template:
    if isinstance(template, Template):
        return template
    return cast(Template, _read(Template, _shipped("template", template)))


def _instruction(instruction: str | Instruction | None) -> Instruction:
    if instruction is None:
        return Instruction()
    if isinstance(instruction, Instruction):
        return instruction
    found = _read(Instruction, _shipped("instruction", instruction))
    return cast(Instruction, found)


def _shipped(kind: str, name: str) -> Path:
    folder = _HERE / f"{kind}s"
    file = folder / f"{name.replace('/', '_')}.yaml"
    if not file.is_file():
        names = [path.stem.replace("_", "/") for path in sorted(folder.glob("*.yaml"))]
        known = [*names, "chat"] if kind == "template" else names
        raise DataError(
            f"prompt.{kind}: {name!r} is not known; expected {', '.join(known)}, or a .yaml file"
        )
    return file


def _read(section: type[Section], file: Path) -> Section:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise DataError(f"{file}: expected keys and values, found {type(tree).__name__}")
        read = parse_section(section, tree)
    except (OSError, yaml.YAMLError, ConfigError) as error:
        raise DataError(f"{file}: cannot be used as a prompt file: {error}") from None
    if isinstance(read, Instruction) and "{problem}" not in read.user:
        raise DataError(f"{file}: `user` has no {{problem}}, where the problem would stand")
    return read
