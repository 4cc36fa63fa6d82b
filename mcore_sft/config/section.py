"""What sections are made of: their base class, the types of their values, and their error."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mcore_sft.base.errors import UserError


class ConfigError(UserError):
    """The configuration cannot be used; the message is meant for the user."""


Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def home(said: str) -> str:
    """`said` with the home folder in place of a leading `~` or `~user`; ValueError if none has it.

    Every path that a command is given passes here once: `Place`, `PlaceOrName` and command.path.
    """
    place = os.path.expanduser(said)
    if place.startswith("~"):
        raise ValueError(f"{said}: no such home folder; give the whole path, or ./{said}")
    return place


Place = Annotated[Path, AfterValidator(lambda path: Path(home(str(path))))]
"""A path; `~` is the home folder."""
PlaceOrName = Annotated[str, AfterValidator(home)]
"""A path, or the name of something that is shipped or on the hub."""
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """One part of the configuration; a component receives its own and nothing else."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def require_effect(self, *keys: str, needs: str) -> None:
        """Raise ValueError for a key of `keys` that is set: it does nothing without `needs`."""
        for key in keys:
            if (value := getattr(self, key)) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}: {value} has no effect without {needs}. Fix: set that, or take {key} "
                    "out"
                )
