"""YAML and dotted overrides in, checked sections out; sections in, YAML and a schema out.

An unknown key, a wrong type or an impossible combination raises `ConfigError`, which names the key,
what was expected and the nearest known key.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mcore_sft.config.run import RunConfig
from mcore_sft.config.section import ConfigError, PlaceOrName, Section


def load(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the experiment at `path`, apply `overrides` ("optimizer.lr=1e-5") and check it all."""
    return parse(read_tree(Path(path)), overrides)


def read_tree(path: Path) -> dict[str, Any]:
    """The keys and values in `path`, unchecked; raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path.absolute()}: cannot be read ({error.strerror}); give --config FILE"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    try:
        tree = _yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(tree).__name__}")
    return tree


def parse(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Check the nested mapping `tree` with `overrides` applied; raises `ConfigError`."""
    return cast(RunConfig, parse_section(RunConfig, tree, overrides))


def parse_section(
    section: type[Section], tree: Mapping[str, Any], overrides: Sequence[str] = ()
) -> Section:
    """Check `tree` as one section, for a command that has no experiment file."""
    plain = _plain(tree)
    for override in overrides:
        _apply(plain, override)
    try:
        return section.model_validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(section, error)) from None


def dump(config: Section) -> str:
    """The whole configuration, defaults included, as YAML that `load` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def without_paths(section: Section, prefix: str = "") -> dict[str, Any]:
    """Each value by its dotted key, in JSON's types, but those that are paths or may be."""
    plain = section.model_dump(mode="json")
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        parts = value if isinstance(value, tuple | list) else [value]
        if parts and all(isinstance(part, Section) for part in parts):
            for number, part in enumerate(parts):
                within = f"{prefix}{name}." if part is value else f"{prefix}{name}[{number}]."
                found |= without_paths(part, within)
        elif not (isinstance(value, Path) or _is_place(field)):
            found[prefix + name] = plain[name]
    return found


def _is_place(field: FieldInfo) -> bool:
    """Whether a field is a `PlaceOrName`, or may be none."""
    within = get_args(PlaceOrName)[1:]
    return any(one in within for one in field.metadata) or PlaceOrName in get_args(field.annotation)


def schema() -> dict[str, Any]:
    """JSON schema of an experiment file, for editors."""
    return RunConfig.model_json_schema()


_DEEPEST = 20
"""Levels of a key, more than any has."""
_TOO_DEEP = "nested too deeply"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-5` as text; here it is the number it looks like. No key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; the second of two equal keys would silently win."""
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"line {node.start_mark.line + 1}: the key {key} stands twice")
        return dict(super().construct_mapping(node, deep=deep))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _yaml(text: str) -> Any:
    """The value that `text` spells."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # the latter for a number of 5,000 digits
        raise ConfigError(f"not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(_TOO_DEEP) from None


def _plain(tree: Any) -> Any:
    """A copy in JSON's types."""
    try:
        return json.loads(json.dumps(tree, default=str))
    except (RecursionError, ValueError):  # the latter for what holds itself
        raise ConfigError(_TOO_DEEP) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one "dotted.key=value" in `tree`; numbers in the key index lists."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected KEY=VALUE, such as optimizer.lr=1e-5")
    try:
        value = _plain(_yaml(text))
    except ConfigError as error:
        raise ConfigError(f"override {override:.60}: {error}") from None
    *parents, last = key.split(".")
    if len(parents) > _DEEPEST:
        raise ConfigError(f"override {key:.60}...: a key of {len(parents) + 1} levels is not known")
    node: Any = tree
    for depth, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[: depth + 1]))
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"override {override!r}: {'.'.join(parents)} is not a section")


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    if not isinstance(node, dict):
        raise ConfigError(f"override {key}: {key.rpartition('.')[0]} is not a section")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"override {key}: expected an index below {len(node)}, given {part!r}")
    return int(part)


def _explain(section: type[Section], error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {key}{_suggestion(section, key)}")
        elif problem["type"] == "missing":
            lines.append(f"{key}: required, but not given")
        elif problem["type"] == "value_error":
            lines.append(
                f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
            )
        else:
            expected = problem["msg"][0].lower() + problem["msg"][1:]
            lines.append(f"{key}: {expected}, given {problem['input']!r}")
    return "\n".join(lines)


# Options of NeMo-Skills that go by another name here.
_ELSEWHERE = {
    "remove_code_errors": "filters.drop_if_contains, whose help has its strings",
    "remove_matplotlib": "filters.drop_if_contains, whose help has its strings",
    "remove_verification_code": "filters.drop_if_contains",
    "remove_no_code": "filters.drop_if_missing",
    "remove_no_think_tags": "filters.drop_if_missing, whose help has its strings",
    "do_shuffle": "filters.order: nemo_skills",
}


def _suggestion(section: type[Section], key: str) -> str:
    """The known key nearest to `key`: first by its whole path, then by its last word."""
    plain = ".".join(part for part in key.split(".") if not part.isdigit())
    if elsewhere := _ELSEWHERE.get(plain.rpartition(".")[2]):
        return f"; use {elsewhere}"
    known = list(_keys(section))
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.75)
    if not near:
        last = {name.rpartition(".")[2]: name for name in reversed(known)}
        near = [
            last[word] for word in difflib.get_close_matches(plain.rpartition(".")[2], last, n=1)
        ]
    return f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(known)}"


def _keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        nested = _section_in(field.annotation)
        if nested is None:
            yield prefix + name
        else:
            yield prefix + name
            yield from _keys(nested, f"{prefix}{name}.")


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)
