"""Mistral: Llama with a sliding window."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mcore_sft.model.families.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Mistral(Llama):
    """Its window is always used, where config.json names one."""

    needs = ("num_key_value_heads", "sliding_window")
    whole_context: ClassVar[Mapping[str, Any]] = {"sliding_window": None}

    @classmethod
    def uses_window(cls, config: dict[str, Any]) -> bool:
        """Always."""
        return True
