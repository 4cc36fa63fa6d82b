"""How numbers are scaled to 8 bits."""

from collections.abc import Callable
from enum import Enum

from pydantic.dataclasses import dataclass


class Format(Enum):
    """Number formats, with the largest values forward and backward."""

    E4M3 = (448, 448)
    HYBRID = (448, 57344)


class Recipe:
    """What all recipes are."""


@dataclass
class DelayedScaling(Recipe):
    """By the largest values of past steps; what it does not know it ignores, as the real one."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str | Callable = "max"
    scaling_factor_compute_algo: Callable | None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class Float8CurrentScaling(Recipe):
    """By one scale a tensor."""

    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class Float8BlockScaling(Recipe):
    """By one scale for each 128 neighbours."""

    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class MXFP8BlockScaling(Recipe):
    """Not used here."""
