"""What a run and an engine say to each other: prompts as token ids in, answers out.

    Requests  ->  Engine.check  ->  Engine.generate  ->  Completions, as they are done

Three engines answer to this: `transformers_engine`, `vllm_engine` and `server_engine`. All get the
same ids, never text, and stop at the same tokens, so that greedy answers in fp32 are the same.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from mcore_sft.base.foreign import what_instead
from mcore_sft.config import EvaluationConfig
from mcore_sft.evaluation.errors import EvaluationError

FinishReason = Literal["stop", "length"]
Decode = Callable[[Sequence[int]], str]
"""Ids to text, without special tokens."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to answer; `seed` decides a sampled answer, in whatever batch it falls."""

    index: int
    prompt_ids: tuple[int, ...]
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus of a sampled answer, in (0, 1]."""
    seed: int = 0
    """Below 2**63."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the model wrote: all its tokens, the stop token included, and its text without special
    tokens. A server that tells no token ids leaves `tokens` empty."""

    index: int
    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason


class Engine(ABC):
    """Something that answers prompts; leaving its context frees all that it holds."""

    def __init__(
        self, folder: Path, config: EvaluationConfig, *, stop_ids: Collection[int], decode: Decode
    ) -> None:
        """`stop_ids` are all at which an answer ends, as `open_engine` gathers them."""
        self._folder = folder
        self._config = config
        self._stop_ids = stop_ids
        self._decode = decode
        self._shape = model_shape(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what is held; most engines hold nothing."""
        return

    def check(self, requests: Sequence[Request]) -> None:
        """`EvaluationError` for what cannot be answered, before any time is spent.

        Room is made for what has been checked, so all that is to come is best checked at once.
        """
        check_fits(
            requests,
            self._folder,
            max_new_tokens=self._config.max_new_tokens,
            limits={
                "the model's max_position_embeddings": self._shape.get("max_position_embeddings"),
                **self._limits(),
            },
            rows=self._shape.get("vocab_size"),
        )

    @property
    def served(self) -> Mapping[str, Any] | None:
        """What a server says of the model that it serves; None where `folder` itself answers."""
        return None

    def _limits(self) -> Mapping[str, int | None]:
        """Lengths of prompt and answer together that are the engine's own, by their names."""
        return {}

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> Iterator[list[Completion]]:
        """Answer all `requests`, in any order; each list is what has been done since the last."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """The engine and its versions, for the report."""


def seed_of(seed: int, problem: str, sample: int) -> int:
    """A seed of its own for each answer, so that resuming and batching change no answer."""
    digest = hashlib.sha256(f"{seed}\0{problem}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def eos_ids(folder: Path) -> frozenset[int]:
    """The EOS tokens of a folder, which generation_config.json decides where it is there."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            eos = _json(folder / name).get("eos_token_id")
            ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
            if not all(isinstance(each, int) for each in ids):
                raise EvaluationError(
                    f"{folder / name}: eos_token_id is {eos!r}, expected an id or a list of ids; "
                    "mend it, or export the model again"
                )
            return frozenset(ids)
    return frozenset()


def model_shape(folder: Path) -> Mapping[str, Any]:
    """The content of the folder's config.json; `EvaluationError` if there is none."""
    if not (folder / "config.json").is_file():
        raise EvaluationError(
            f"{folder}: no config.json here; give --model a Hugging Face folder, "
            "such as one that tools/to_hf.py wrote"
        )
    shape = _json(folder / "config.json")
    for name in ("max_position_embeddings", "vocab_size"):
        if not isinstance(shape.get(name), int | None):
            raise EvaluationError(
                f"{folder / 'config.json'}: {name} is {shape[name]!r}, expected a number; "
                "mend it, or export the model again"
            )
    return shape


def check_weights(folder: Path) -> None:
    """`EvaluationError` where weights are absent or cut short; no tensor is read."""
    index = folder / "model.safetensors.index.json"
    files = {*folder.glob("*.safetensors"), *folder.glob("*.bin")}
    if index.is_file():
        shards = _json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise EvaluationError(f"{index}: it has no weight_map; export the model again")
        files |= {folder / str(name) for name in shards.values()}
    if not files:
        raise EvaluationError(
            f"{folder}: no weights here; expected model.safetensors, or shards and their index; "
            "copy them here, or export the model again"
        )
    for file in sorted(files):
        if not file.is_file():
            raise EvaluationError(
                f"{file}: it belongs to the model and is not there; copy it here, "
                "or export the model again"
            )
        _check_no_stand_in(file)
        if file.suffix == ".safetensors":
            _check_whole(file)


def _check_no_stand_in(file: Path) -> None:
    """Refuse what a download left in place of a file."""
    if instead := what_instead(file):
        raise EvaluationError(f"{file}: it is {instead}, and not the file that was meant")


def _check_whole(file: Path) -> None:
    """Refuse a file of safetensors that is longer or shorter than its header says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as content:
            start = 8 + int.from_bytes(content.read(8), "little")
            if start > size:
                raise ValueError(f"its {size} bytes end within the header")
            header = json.loads(content.read(start - 8))
        header.pop("__metadata__", None)
        expected = start + max((each["data_offsets"][1] for each in header.values()), default=0)
        if size != expected:
            raise ValueError(f"it has {size} bytes where its header says {expected}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise EvaluationError(
            f"{file}: no safetensors that can be read ({error}); copy it here again, "
            "or export the model again"
        ) from None


def check_fits(
    requests: Sequence[Request],
    folder: Path,
    *,
    max_new_tokens: int,
    limits: Mapping[str, int | None],
    rows: int | None,
) -> None:
    """Refuse prompts that are too long for one of `limits`, each by its name, or whose ids are not
    among the `rows` of the model's embedding."""
    longest = max((len(request.prompt_ids) for request in requests), default=0)
    for name, limit in limits.items():
        if limit is not None and longest + max_new_tokens > limit:
            fits = limit - longest
            mend = (
                f"set evaluation.max_new_tokens to {fits} or less"
                if fits > 0
                else "shorten the prompts or use a model of a longer context"
            )
            raise EvaluationError(
                f"{folder}: the longest prompt has {longest} tokens, which with "
                f"evaluation.max_new_tokens {max_new_tokens} makes {longest + max_new_tokens}, "
                f"above {name} {limit}; {mend}"
            )
    largest = max((max(request.prompt_ids, default=0) for request in requests), default=0)
    if rows is not None and largest >= rows:
        raise EvaluationError(
            f"{folder}: the tokenizer gives id {largest} but the model has {rows} "
            "embeddings; give the tokenizer that belongs to the model"
        )


def completion(
    index: int,
    tokens: Sequence[int],
    finish_reason: FinishReason,
    *,
    stop_ids: Collection[int],
    decode: Decode,
) -> Completion:
    """The answer of these `tokens`, whose text ends before the stop token."""
    stopped = bool(tokens) and tokens[-1] in stop_ids
    return Completion(
        index=index,
        tokens=tuple(tokens),
        text=decode(tokens[:-1] if stopped else tokens),
        finish_reason=finish_reason,
    )


def _json(path: Path) -> dict[str, Any]:
    _check_no_stand_in(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error}); export the model again") from None
    return content
