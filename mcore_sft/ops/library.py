"""The compiled operators of csrc/ in, `torch.ops.mcore_sft` out."""

from pathlib import Path

import torch

from mcore_sft.base.errors import UserError

_PACKAGE = Path(__file__).parent.parent
_BUILD = "`pip install --no-build-isolation -e .` in the root of the repository"


class LibraryError(UserError):
    """The compiled operators are absent, or do not fit this torch."""


def load(folder: Path = _PACKAGE) -> None:
    """Load the operators; `LibraryError` says how to build them where they are absent."""
    built = sorted(folder.glob("_C.*so"))
    if not built:
        raise LibraryError(f"{folder}: the compiled operators (_C.*so) are not built; run {_BUILD}")
    _load(built[-1])


def load_cuda(folder: Path = _PACKAGE) -> None:
    """Load what computes the operators on CUDA tensors, beside `load`; errors as there."""
    built = sorted(folder.glob("_C_cuda.*so"))
    if not built:
        reason = folder / "_C_cuda.reason"  # setup.py's, where it tried
        if reason.exists():
            raise LibraryError(
                f"{folder}: the compiled CUDA operators (_C_cuda.*so) could not be built "
                f"({reason.read_text(encoding='utf-8').strip()}); fix that, then run {_BUILD}"
            )
        raise LibraryError(
            f"{folder}: the compiled CUDA operators (_C_cuda.*so) are not built; with nvcc at hand "
            f"(its folder on PATH, or CUDA_HOME) and a CUDA build of torch (this is "
            f"{torch.__version__}) run {_BUILD}"
        )
    _load(built[-1])


def _load(path: Path) -> None:
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise LibraryError(
            f"{path}: torch {torch.__version__} cannot load it ({error.__cause__ or error}); "
            f"build it again: {_BUILD}"
        ) from None
