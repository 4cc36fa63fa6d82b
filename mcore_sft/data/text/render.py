"""What was said in, text out: what stands around it, by fixed strings.

    problem, solution -> prompt, answer        messages -> text, and where in it the answers stand

An answer ends with its stop token, and is what is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from mcore_sft.config import ConfigError, Section, parse_section
from mcore_sft.data.errors import DataError
from mcore_sft.data.sources.conversation import UnfitRow, unknown_keys
from mcore_sft.data.text.chat_template import Messages, Tools
from mcore_sft.data.text.lost_content import passed_over
from mcore_sft.data.text.tokenizer import Tokenizer

_HERE = Path(__file__).parent


class Template(Section):
    """The markup around the parts of a conversation."""

    text_begin: str = ""
    system_begin: str = ""
    system_end: str = ""
    system_optional: bool = False
    """Leave out the system block where nothing stands in it; else it is there all the same."""
    user_begin: str = ""
    user_end: str = ""
    assistant_begin: str = ""
    assistant_end: str = ""
    stop_phrases: tuple[str, ...] = ()
    verbatim: bool = False
    """Problem and solution hold all markup already, and are tokens as they stand. A solution ends
    with one of the stop_phrases; such as the tokenizer does not have do no harm."""


class Instruction(Section):
    """What is said around the problem; `{problem}` stands for it in `user`."""

    system: str = ""
    user: str = "{problem}"

    def fill(self, problem: str) -> str:
        """What the user says."""
        before, _, after = self.user.partition("{problem}")
        return before + problem + after


class Answer(NamedTuple):
    """An answer in a text, in characters: where it begins, and what of it is trained, in order.

    What is trained ends with the stop token.
    """

    begin: int
    spans: Sequence[tuple[int, int]]

    @property
    def end(self) -> int:
        """Where its stop token ends."""
        return self.spans[-1][1]


@dataclass(frozen=True, kw_only=True)
class Written:
    """A conversation as text, and its answers that are trained, in order; one at least."""

    text: str
    answers: Sequence[Answer]


class Renderer(Protocol):
    """Text before an answer, and an answer up to and including its stop token."""

    stop_tokens: tuple[str, ...]

    def prompt(self, problem: str) -> str:
        """All that stands before the answer to `problem`."""

    def write(self, messages: Messages, tools: Tools | None, trained: Sequence[int]) -> Written:
        """The text of a conversation, of whose messages the answers `trained` are learned.

        `UnfitRow` if something that the conversation says up to the last of them would be left out.
        """


class Markup:
    """A template of fixed strings. end: its `assistant_end`, up to the stop token."""

    def __init__(
        self, template: Template, wording: Instruction, system: str | None, tokenizer: Tokenizer
    ) -> None:
        self.verbatim = template.verbatim
        self.stop_tokens = template.stop_phrases
        self._template = template
        if template.verbatim:
            bare = Template(verbatim=True, stop_phrases=template.stop_phrases)
            if template != bare or wording != Instruction():
                raise DataError(
                    "prompt.template: verbatim takes problem and solution as they are, but there "
                    "is markup in the template too, or an instruction; use prompt.instruction=null"
                )
            known = tokenizer.special_tokens
            self.stop_tokens = tuple(stop for stop in template.stop_phrases if stop in known)
        if not self.stop_tokens:
            raise DataError(
                "prompt.template: stop_phrases is empty, or names none of the tokenizer's tokens, "
                "so a model could never learn to stop; name the token that ends an answer"
            )
        end = "" if self.verbatim else cut_after_stop(template.assistant_end, self.stop_tokens)
        if end is None:
            raise DataError(
                f"prompt.template: assistant_end {template.assistant_end!r} holds none of the "
                f"stop_phrases {list(self.stop_tokens)}, so that a model could never learn to stop"
            )
        self.end = end
        before, _, after = wording.user.partition("{problem}")
        self._before = self._begin(system or "") + template.user_begin + before
        self._after = after + template.user_end + template.assistant_begin

    def prompt(self, problem: str) -> str:
        """All that stands before the answer."""
        return self._before + problem + self._after

    def pairs(
        self, problems: pa.LargeStringArray, solutions: pa.LargeStringArray
    ) -> pa.LargeStringArray:
        """Prompt and answer of each of N rows, end to end, in turn, [2N]."""
        if not len(problems):
            return pa.array([], pa.large_string())
        markup = (self._before, self._after, self.end, "")
        before, after, end, nothing = (pa.scalar(text, pa.large_string()) for text in markup)
        whole = pc.binary_join_element_wise(before, problems, after, solutions, end, nothing)
        _, ends, data = whole.buffers()
        # The same bytes, cut between prompt and answer too.
        cuts = np.empty(2 * len(whole) + 1, dtype=np.int64)
        cuts[::2] = np.frombuffer(ends, np.int64)[: len(whole) + 1]
        around = len((self._before + self._after).encode())
        cuts[1::2] = cuts[:-1:2] + around + pc.binary_length(problems).to_numpy()
        return pa.LargeStringArray.from_buffers(2 * len(whole), pa.py_buffer(cuts), data)

    def write(self, messages: Messages, tools: Tools | None, trained: Sequence[int]) -> Written:
        """The text up to the end of the last trained answer; tools have no markup here."""
        if tools or any(
            message["role"] == "tool" or "tool_calls" in message for message in messages
        ):
            raise UnfitRow(
                "tools have no markup in a template of fixed strings; use the tokenizer's own "
                "(prompt.template=chat)"
            )
        for number, message in enumerate(messages, start=1):
            for key in unknown_keys(message):
                raise passed_over("a template of fixed strings", number, message, key)
        t = self._template
        has_system = messages[0]["role"] == "system"
        parts = [self._begin(messages[0]["content"] if has_system else "")]
        length = len(parts[0])
        answers = []
        for index, message in enumerate(messages[: trained[-1] + 1]):
            if message["role"] == "user":
                said = [t.user_begin, message["content"], t.user_end]
            elif message["role"] == "assistant":
                said = [t.assistant_begin, message["content"], t.assistant_end]
                if index in trained:
                    begin = length + len(said[0])
                    end = begin + len(said[1]) + len(self.end)
                    answers.append(Answer(begin, [(begin, end)]))
            elif index:
                raise UnfitRow("a system message stands after others; expected it first")
            else:
                continue
            parts += said
            length += sum(map(len, said))
        return Written(text="".join(parts)[: answers[-1].end], answers=answers)

    def _begin(self, system: str) -> str:
        t = self._template
        block = t.system_begin + system + t.system_end
        return t.text_begin + ("" if t.system_optional and not system else block)


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
    shipped = {
        file.relative_to(folder).with_suffix("").as_posix(): file for file in folder.rglob("*.yaml")
    }
    if name not in shipped:
        known = [*sorted(shipped), *(["chat"] if kind == "template" else [])]
        raise DataError(
            f"prompt.{kind}: {name!r} is not known; expected {', '.join(known)}, or a .yaml file"
        )
    return shipped[name]


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


def cut_after_stop(text: str, stops: Sequence[str]) -> str | None:
    """`text` up to the end of the first stop token in it; None if there is none."""
    found = [(text.index(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    start, stop = min(found)
    return text[: start + len(stop)]
