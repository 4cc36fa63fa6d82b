"""Problem and solution in, text out: what stands around them, by fixed strings or a chat template.

problem -> prompt text        (problem, solution) -> answer text, stop token included
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import yaml

from mcore_sft.config import ConfigError, Section, parse_section
from mcore_sft.data.errors import DataError
from mcore_sft.data.tokenizer import Tokenizer

_HERE = Path(__file__).parent


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


class Markup:
    """A template of fixed strings; the system block is there even when it is empty."""

    def __init__(self, template: Template, wording: Instruction) -> None:
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
        """All that stands before the answer."""
        t = self._template
        system = t.system_begin + self._wording.system + t.system_end
        user = t.user_begin + self._wording.fill(problem) + t.user_end
        return t.text_begin + system + user + t.assistant_begin

    def answer(self, problem: str, solution: str) -> str:
        """`solution` and the stop token."""
        assert self._end is not None
        return solution + self._end


class Chat:
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
        """All that stands before the answer."""
        return self._render(self._messages(problem), add_generation_prompt=True)

    def answer(self, problem: str, solution: str) -> str:
        """`solution` as the template writes it, up to the stop token."""
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


def read_template(template: str | Template) -> Template:
    """A template as it is, or the shipped one of this name, or that of a .yaml file."""
    if isinstance(template, Template):
        return template
    return cast(Template, _read(Template, _file_of("template", template)))


def read_instruction(instruction: str | Instruction | None) -> Instruction:
    """An instruction as it is, the shipped one of this name, or that of a .yaml file."""
    if instruction is None:
        return Instruction()
    if isinstance(instruction, Instruction):
        return instruction
    return cast(Instruction, _read(Instruction, _file_of("instruction", instruction)))


def is_file(name: str | None) -> bool:
    """Whether a template or an instruction is named by a file of the user's."""
    return name is not None and name.endswith((".yaml", ".yml"))


def _file_of(kind: str, name: str) -> Path:
    if is_file(name):
        return Path(name)
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


def _cut_after_stop(text: str, stops: Sequence[str]) -> str | None:
    """`text` up to the end of the first stop token in it; None if there is none."""
    found = [(text.index(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    start, stop = min(found)
    return text[: start + len(stop)]
