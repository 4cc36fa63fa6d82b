"""Solved examples that stand before a problem, where NeMo-Skills' prompts have `{examples}`.

shipped name or YAML file  ->  FewShot  ->  text of its first n examples
"""

from pathlib import Path

import yaml
from pydantic import ValidationError

from mcore_sft.config import Section
from mcore_sft.evaluation.errors import EvaluationError

_SHIPPED = Path(__file__).with_name("few_shot")


class Example(Section):
    """One solved problem."""

    problem: str
    solution: str


class FewShot(Section):
    """Examples, and what stands before, around and after them."""

    prefix: str
    template: str
    """One example, with {problem} and {solution}."""
    suffix: str
    examples: tuple[Example, ...]


def examples(name: str, count: int) -> str:
    """What stands before a problem: the first `count` of the shipped examples called `name`, or of
    those of a YAML file. Nothing where `count` is 0."""
    if count == 0:
        return ""
    read = _read(name)
    if count > len(read.examples):
        raise EvaluationError(
            f"evaluation.few_shot {count}: {name} has {len(read.examples)} examples; ask for fewer"
        )
    made = (
        read.template.replace("{problem}", each.problem).replace("{solution}", each.solution)
        for each in read.examples[:count]
    )
    return read.prefix + "".join(made) + read.suffix


def _read(name: str) -> FewShot:
    path = Path(name) if name.endswith((".yaml", ".yml")) else _SHIPPED / f"{name}.yaml"
    shipped = ", ".join(sorted(file.stem for file in _SHIPPED.glob("*.yaml")))
    try:
        return FewShot.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise EvaluationError(
            f"evaluation.few_shot_examples {name}: cannot be read ({error.strerror}); give a YAML "
            f"file, or one of the shipped: {shipped}"
        ) from None
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"evaluation.few_shot_examples {name}: {error}; expected prefix, template, suffix and "
            "examples of problem and solution"
        ) from None
