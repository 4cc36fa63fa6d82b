"""What was said in, text out: what stands around it, by fixed strings or a chat template.

    problem, solution -> prompt, answer        messages -> text, answer, text, answer, ...

An answer ends with its stop token, and is what is trained.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from mcore_sft.config import ConfigError, Section, parse_section
from mcore_sft.data.chat_template import Messages, Tools
from mcore_sft.data.conversation import UnfitRow, unknown_keys
from mcore_sft.data.errors import DataError
from mcore_sft.data.tokenizer import Tokenizer
from mcore_sft.data.written import passed_over, require_written

_HERE = Path(__file__).parent
_ANSWER = "forty-two"


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


class Renderer(Protocol):
    """Text before an answer, and an answer up to and including its stop token."""

    stop_tokens: tuple[str, ...]

    def prompt(self, problem: str) -> str:
        """All that stands before the answer to `problem`."""

    def pair(self, problem: str, solution: str) -> list[str]:
        """The prompt, and `solution` as it is learned, stop token included."""

    def turns(self, messages: Messages, tools: Tools | None) -> list[str]:
        """The text of a conversation in pieces: what stands before an answer, it, and so on.

        What follows the last stop token is left out. `UnfitRow` if something that the conversation
        says would be left out too.
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
        end = "" if self.verbatim else _cut_after_stop(template.assistant_end, self.stop_tokens)
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

    def pair(self, problem: str, solution: str) -> list[str]:
        """The prompt; `solution` and the stop token."""
        return [self.prompt(problem), solution + self.end]

    def pairs(
        self, problems: pa.LargeStringArray, solutions: pa.LargeStringArray
    ) -> pa.LargeStringArray:
        """`pair` of each of N rows, end to end: prompts and answers in turn, [2N]."""
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

    def turns(self, messages: Messages, tools: Tools | None) -> list[str]:
        """The pieces of a conversation; tools have no markup here."""
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
        pieces, before = [], self._begin(messages[0]["content"] if has_system else "")
        for message in messages[has_system:]:
            text = message["content"]
            if message["role"] == "user":
                before += t.user_begin + text + t.user_end
            elif message["role"] == "assistant":
                pieces += [before + t.assistant_begin, text + self.end]
                before = t.assistant_end[len(self.end) :]
            else:
                raise UnfitRow("a system message stands after others; expected it first")
        return pieces

    def _begin(self, system: str) -> str:
        t = self._template
        block = t.system_begin + system + t.system_end
        return t.text_begin + ("" if t.system_optional and not system else block)


class Chat:
    """The tokenizer's own chat template.

    What is trained is what its `{% generation %}` blocks hold. Without such, a conversation is
    rendered up to each assistant turn and once more with it, and what the turn adds is trained.
    """

    def __init__(self, wording: Instruction, system: str | None, tokenizer: Tokenizer) -> None:
        self._wording = wording
        self._system = system
        self._path = tokenizer.path
        if tokenizer.chat_template is None:
            raise DataError(
                f"{tokenizer.path}: prompt.template is `chat`, but the tokenizer has no chat "
                "template; give one in chat_template.jinja, or name another prompt.template"
            )
        self._template = tokenizer.chat_template
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
        self.stop_tokens: tuple[str, ...] = (stop,)
        self.pair("1 + 1", _ANSWER)

    def prompt(self, problem: str) -> str:
        """All that stands before the answer."""
        return self._template.render(self._asked(problem), add_generation_prompt=True)

    def pair(self, problem: str, solution: str) -> list[str]:
        """The prompt; `solution` as the template writes it, up to the stop token."""
        return self.turns(self.messages(problem, solution), None)

    def messages(self, problem: str, solution: str) -> list[dict[str, str]]:
        """A problem and its solution as a conversation."""
        return [*self._asked(problem), {"role": "assistant", "content": solution}]

    def turns(self, messages: Messages, tools: Tools | None) -> list[str]:
        """The pieces of a conversation."""
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = [
            self._template.render(messages[:i], tools=tools, add_generation_prompt=True)
            for i in answers
        ]
        if self._template.marks_answers:
            pieces = self._marked(messages, tools, prompts)
        else:
            pieces = self._grown(messages, tools, prompts, answers)
        require_written(self._template, messages, tools, pieces, stop=self.stop_tokens[0])
        return pieces

    def _grown(
        self,
        messages: Messages,
        tools: Tools | None,
        prompts: Sequence[str],
        answers: Sequence[int],
    ) -> list[str]:
        pieces, done = [], ""
        for prompt, i in zip(prompts, answers, strict=True):
            whole = self._template.render(messages[: i + 1], tools=tools)
            if not prompt.startswith(done) or not whole.startswith(prompt):
                raise DataError(
                    f"{self._path}: its chat template changes the prompt once an answer follows, "
                    f"or another turn (message {i + 1}), and has no {{% generation %}} blocks: "
                    "neither way can tell what to train; name another prompt.template"
                )
            answer = self._up_to_stop(whole[len(prompt) :])
            pieces += [prompt[len(done) :], answer]
            done = prompt + answer
        return pieces

    def _marked(self, messages: Messages, tools: Tools | None, prompts: Sequence[str]) -> list[str]:
        text, spans = self._template.render_marked(messages, tools=tools)
        begins = [begin for begin, _ in spans]
        if begins != [len(prompt) for prompt in prompts] or not all(map(text.startswith, prompts)):
            raise DataError(
                f"{self._path}: the {{% generation %}} blocks of its chat template do not begin "
                "where an assistant is asked to speak (add_generation_prompt): "
                f"at characters {begins}, expected {[len(prompt) for prompt in prompts]}; mend it, "
                "or name another prompt.template"
            )
        pieces, done = [], 0
        for begin, end in spans:
            answer = self._up_to_stop(text[begin:end])
            pieces += [text[done:begin], answer]
            done = begin + len(answer)
        return pieces

    def _up_to_stop(self, text: str) -> str:
        answer = _cut_after_stop(text, self.stop_tokens)
        if answer is None:
            raise DataError(
                f"{self._path}: its chat template ends the answer {text[-60:]!r} without "
                f"{self.stop_tokens[0]}; name another prompt.template"
            )
        return answer

    def _asked(self, problem: str) -> list[dict[str, str]]:
        said = [{"role": "user", "content": self._wording.fill(problem)}]
        if self._system is None:
            return said
        return [{"role": "system", "content": self._system}, *said]


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


def _cut_after_stop(text: str, stops: Sequence[str]) -> str | None:
    """`text` up to the end of the first stop token in it; None if there is none."""
    found = [(text.index(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    start, stop = min(found)
    return text[: start + len(stop)]
