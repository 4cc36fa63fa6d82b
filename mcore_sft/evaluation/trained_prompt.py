"""The record in a model's folder and what is asked for in, the prompt of an evaluation out.

A model is asked in the way that most of its training examples had, unless a key says otherwise. A
folder without a record is asked as the configuration says; nothing is ever guessed.
"""

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcore_sft.config import PromptConfig, parse_section
from mcore_sft.data.encode.prompt_record import MODEL_FILE, Way, ways
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.render import Instruction, Template, read_instruction, read_template
from mcore_sft.data.text.tokenizer import Tokenizer
from mcore_sft.evaluation.errors import EvaluationError

_EXCERPT = 60
_GIVEN = ("variables", "date")
"""Parts of a prompt that a chat template is given."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is said of the prompt by whoever evaluates.

    keys: `prompt.*` of the command line, by their last name: asked for, whatever was trained.
    configured: the experiment's section, if there is one. It says how training made its prompts, so
    that a key in it which was never trained is most likely another experiment's.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    configured: PromptConfig | None = None


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A prompt, and one line that says which it is and why."""

    prompt: Prompt
    why: str


def choose(model: Path, tokenizer: Tokenizer, asked: Asked) -> Chosen:
    """The prompt to ask `model` with.

    `EvaluationError` if nothing says how, or if the experiment file names a prompt of which the
    record says that it was never trained.
    """
    told = _read(model / MODEL_FILE)
    if told and told["had"]:
        return _of_record(model, tokenizer, asked, told["prompt"], told["had"])
    trained = told["prompt"] if told else {}
    if asked.configured is not None:
        said = asked.configured.model_dump()
        why = "as the configuration says"
    elif trained or asked.keys.get("template"):
        said = {**PromptConfig().model_dump(), **_fitting(trained, asked.keys), **asked.keys}
        why = "as the command line says" if asked.keys else f"as {MODEL_FILE} says"
    else:
        raise EvaluationError(_nothing(model, tokenizer))
    prompt = _prompt(said, tokenizer)
    return Chosen(prompt=prompt, why=f"prompt: {_words(prompt)}; {why}")


def _of_record(
    model: Path,
    tokenizer: Tokenizer,
    asked: Asked,
    trained: Mapping[str, Any],
    had: Mapping[str, Any],
) -> Chosen:
    """The most frequent way of training that has all that is asked for, or exactly that."""
    own = Prompt.restore(trained, tokenizer)
    found = ways(had, own.system)
    stated = _stated(asked, trained)
    wanted = stated | dict(asked.keys)
    total = sum(
        had[key] for key in ("with_instruction", "without_instruction", "tokenized_elsewhere")
    )
    if not found and not wanted:
        return Chosen(prompt=own, why=f"prompt: {_words(own)}; as {MODEL_FILE} says")
    for way, count in found.items():
        keys = _keys(way, trained)
        if _resolved(keys | wanted) == _resolved(keys):
            prompt = _prompt(keys, tokenizer)
            share = f"{count:,} of {total:,} training examples had it"
            return Chosen(prompt=prompt, why=f"prompt: {_words(prompt)}; {share}")
    known = _is_known(wanted, trained, had)
    if stated and known:
        raise EvaluationError(
            f"{model}: none of its {total:,} training examples had the {_names(stated)} of the "
            f"experiment file ({_excerpt(stated)}). Fix: take that out to ask as it was trained, "
            "or give it on the command line as KEY=VALUE to use it anyway"
        )
    usual = next(iter(found), Way(instruction=own.has_instruction, system=own.system))
    prompt = _prompt(_fitting(_keys(usual, trained), wanted) | wanted, tokenizer)
    whether = f"none of {total:,} training examples had it" if known else "perhaps never trained"
    why = f"prompt: {_words(prompt)}; {whether}, asked for by {_names(wanted)}"
    return Chosen(prompt=prompt, why=why)


def _is_known(wanted: dict[str, Any], trained: Mapping[str, Any], had: Mapping[str, Any]) -> bool:
    """Whether a record that lists no way with all that is `wanted` says that there was none.

    A system text that is not listed may have been trained, as may what others have tokenized.
    """
    if had["tokenized_elsewhere"]:
        return False
    had_both = False
    for instruction, key in ((True, "with_instruction"), (False, "without_instruction")):
        keys = _keys(Way(instruction=instruction, system=None), trained)
        same = _resolved({**keys, **wanted})[:2] == _resolved(keys)[:2]
        had_both |= had[key] > 0 and same  # template and instruction
    listed = len({each["text"] for each in had["system_texts"]})
    return not had_both or listed == had["distinct_system_texts"]


def _names(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"prompt.{name}" for name in sorted(keys))


def _stated(asked: Asked, trained: Mapping[str, Any]) -> dict[str, Any]:
    """What the experiment file sets otherwise than the training of this model did."""
    if asked.configured is None:
        return {}
    set_there = asked.configured.model_dump(exclude_unset=True)
    return {
        name: value
        for name, value in set_there.items()
        if name not in asked.keys
        and not (name == "template" and value is None)  # whichever was trained
        and _part(name, value) != _part(name, trained.get(name))
    }


def _keys(way: Way, trained: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `prompt` that ask in `way`."""
    if way.instruction:
        return dict(trained)
    kept = {name: trained[name] for name in ("template", *_GIVEN) if name in trained}
    return {**kept, "instruction": None, "system": way.system}


def _resolved(keys: Mapping[str, Any]) -> tuple[Any, str, str | None]:
    """What decides the text of a prompt, whichever way it is named."""
    wording = _part("instruction", keys["instruction"])
    system = keys.get("system")
    system = system if system is not None else wording.system or None
    markup = [_part(name, keys.get(name)) for name in ("template", *_GIVEN)]
    return markup, wording.user, system


def _part(name: str, value: Any) -> Any:
    """A part of a prompt, whichever way it is named."""
    if name in _GIVEN:
        return str(value) if isinstance(value, datetime.date) else value or None
    if name not in ("template", "instruction") or value == "chat":
        return value
    if isinstance(value, Mapping):
        return parse_section(Template if name == "template" else Instruction, value)
    return read_template(value) if name == "template" else read_instruction(value)


def _prompt(said: Mapping[str, Any], tokenizer: Tokenizer) -> Prompt:
    """The prompt of `said`, whose parts may be names, files, or what a record holds of files."""
    if isinstance(said["template"], Mapping) or isinstance(said["instruction"], Mapping):
        return Prompt.restore(said, tokenizer)
    return Prompt.load(PromptConfig(**said), tokenizer)


def _fitting(trained: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was trained, but for what only a chat template is given where another is asked for."""
    other = asked.get("template", "chat") != "chat"
    return {name: part for name, part in trained.items() if not (other and name in _GIVEN)}


def _read(record: Path) -> dict[str, Any]:
    """What a model's folder tells of its training: the prompt, and what its examples had of it."""
    if not record.is_file():
        return {}
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        prompt = {name: content["prompt"][name] for name in ("template", "instruction")}
        for name in ("system", *_GIVEN):
            if (part := content["prompt"].get(name)) is not None:
                prompt[name] = part
        had = content.get("trained_prompts")
        if had:
            ways(had, None)  # or it says what is missing
        return {"prompt": prompt, "had": had}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise EvaluationError(
            f"{record}: the prompt of training cannot be read ({error!r}); export the model again, "
            "or take the file away and give prompt.template and prompt.instruction"
        ) from None


def _nothing(model: Path, tokenizer: Tokenizer) -> str:
    hint = (
        "prompt.template=chat for the tokenizer's own chat template"
        if tokenizer.has_chat_template
        else "prompt.template=llama3-instruct"
    )
    return (
        f"{model}: nothing says how to ask this model (no {MODEL_FILE}); give --config FILE, or "
        f"{hint}, with prompt.instruction=generic/math where problems of mathematics are asked so"
    )


def _words(prompt: Prompt) -> str:
    """The prompt in a few words."""
    described = prompt.describe()
    names = {
        name: part if part is None or isinstance(part, str) else "of a file"
        for name, part in described.items()
    }
    given = "".join(f", {name} {_excerpt(described[name])}" for name in _GIVEN if name in described)
    instruction = (
        f"instruction {names['instruction']}" if names["instruction"] else "no instruction"
    )
    system = "no system text" if prompt.system is None else f"system text {_excerpt(prompt.system)}"
    return f"template {names['template']}, {instruction}, {system}{given}"


def _excerpt(said: Any) -> str:
    text = repr(said)
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "..."
