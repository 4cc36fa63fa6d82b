"""The configuration in, the engine that it names out."""

from collections.abc import Collection
from pathlib import Path

from mcore_sft.config import EvaluationConfig
from mcore_sft.evaluation.engines.engine import Decode, Engine, eos_ids


def open_engine(
    config: EvaluationConfig,
    folder: Path,
    *,
    stop_ids: Collection[int],
    decode: Decode,
    log: Path | None = None,
) -> Engine:
    """The engine that `config.engine` names, for the Hugging Face folder `folder`.

    Answers end at one of `stop_ids` or at one of the folder's own EOS tokens. `log` is where vLLM
    logs; without it, a temporary file that is kept where vLLM fails. Raises `EvaluationError` where
    the engine is not there.
    """
    stop_ids = frozenset(stop_ids) | eos_ids(folder)
    # Imported late: torch and transformers take seconds, and two of the engines need neither.
    if config.engine == "vllm":
        from mcore_sft.evaluation.engines.vllm_engine import VllmEngine

        return VllmEngine(folder, config, stop_ids=stop_ids, decode=decode, log=log)
    if config.engine == "server":
        from mcore_sft.evaluation.engines.server_engine import ServerEngine

        return ServerEngine(folder, config, stop_ids=stop_ids, decode=decode)
    from mcore_sft.evaluation.engines.transformers_engine import TransformersEngine

    return TransformersEngine(folder, config, stop_ids=stop_ids, decode=decode)
