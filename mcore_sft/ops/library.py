"""The compiled operators of csrc/ in, `torch.ops.mcore_sft` out."""

from pathlib import Path

import torch

from mcore_sft.errors import UserError

_PACKAGE = Path(__file__).parent.parent


class LibraryError(UserError):
    """The compiled operators are absent, or do not fit this torch."""


def load(folder: Path = _PACKAGE) -> None:
    """Load the operators; `LibraryError` says how to build them where they are absent."""
    built = sorted(folder.glob("_C*.so"))
    if not built:
        raise LibraryError(
            f"{folder}: the compiled operators (_C*.so) are not built; "
            "run `pip install --no-build-isolation -e .` in the root of the repository"
        )
    try:
        torch.ops.load_library(built[-1])  # type: ignore[no-untyped-call]
    except OSError as error:
        raise LibraryError(
            f"{built[-1]}: torch {torch.__version__} cannot load it ({error}); build it again: "
            "`pip install --no-build-isolation -e .` in the root of the repository"
        ) from None
