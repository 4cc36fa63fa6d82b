"""Every difference between the releases of Megatron-core that we run with, and nothing else.

All other code is written for 0.19; what 0.16.1, the last for Python 3.11, lacks is added here. Each
part says when it can go. No other file asks which version of a package it meets: `make check` holds
that.
"""

import importlib.util
import io
import queue
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from packaging.version import Version

from mcore_sft import installed
from mcore_sft.base.errors import UserError
from mcore_sft.runtime.patches import replaced

FOUND = Version(version("megatron-core"))
_OLD, _NEW = Version("0.16.1"), Version("0.19")
_IS_OLD = FOUND.release[:2] == _OLD.release[:2]


def check_version(found: Version = FOUND) -> None:
    """Raise `UserError` unless `found` is a release of Megatron-core that has been read."""
    if found.release[:2] not in (_OLD.release[:2], _NEW.release[:2]):
        wanted = _OLD if sys.version_info < (3, 12) else f"{_NEW}.*"
        raise UserError(
            f"megatron-core {found} is installed, expected {_OLD} (Python 3.11) or {_NEW}.x "
            f"(Python 3.12 and newer); pip install 'megatron-core=={wanted}'"
        )


def _ignore_what_pip_left() -> None:
    """Hide the empty folder that `pip uninstall transformer-engine` leaves behind.

    Python imports it as a package, and Megatron-core then fails to import. This can go when
    Megatron-core checks the version of the package before it uses it.
    """
    if installed.left_behind("transformer_engine"):
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("a kernel of Megatron-core's mixture of experts needs triton")


def _import_without_triton() -> None:
    """Stand in for the one module of 0.19 that imports triton, undeclared, come what may.

    It holds kernels of mixtures of experts, which no model of ours has. A CPU build of torch comes
    without triton. This can go when `import megatron.core` works there.
    """
    name = "megatron.core.transformer.moe.ops.paged_stash"
    if not _IS_OLD and name not in sys.modules and importlib.util.find_spec("triton") is None:
        kernels = ModuleType(name)
        kernels.GLOBAL_BLOCK_SIZE = 1024  # type: ignore[attr-defined]
        kernels.paged_stash_copy_kernel = _refuse  # type: ignore[attr-defined]
        kernels.paged_stash_pop_kernel = _refuse  # type: ignore[attr-defined]
        sys.modules[name] = kernels


_ignore_what_pip_left()
_import_without_triton()

from torch.distributed.checkpoint.state_dict_loader import load as load_whole  # noqa: E402

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core import optimizer as megatron_optimizer  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.models.gpt import GPTModel as _GPTModel  # noqa: E402


class _WithOutputProcessor(_GPTModel):
    """0.16.1's model with the hook that 0.19's has. This can go with 0.16.1."""

    _processor: Callable[..., Any] | None = None

    def forward(
        self, *args: Any, output_processor: Callable[..., Any] | None = None, **kwargs: Any
    ) -> Any:
        """Megatron-core's forward pass, `output_processor` in place of output layer and loss."""
        self._processor = output_processor
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._processor = None

    def _postprocess(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if self._processor is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, **kwargs)
        return self._processor(hidden_states=hidden_states, **kwargs)


GPTModel: Any = _WithOutputProcessor if _IS_OLD else _GPTModel


Results = queue.SimpleQueue[dict[int, list[Any]]]
"""What a writer wrote, by the place of its file."""


def torch_adamw() -> AbstractContextManager[None]:
    """Let Megatron-core take torch's AdamW, where Transformer Engine's or Apex's is installed."""
    return replaced(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", True)


def save_async(state: dict[str, Any], folder: str) -> tuple[Any, Results]:
    """Begin to save `state` with Megatron-core's own writer: an AsyncRequest, and its results.

    Whoever writes puts what was written into the results before the request is completed.
    Megatron-core would start a process that holds them, which Slurm's warning, sent to all
    processes of a job, would end; so a queue of this save stands in for Megatron-core's while it
    looks for that. 0.19 takes another package's writer unless told; that can go with 0.16.1.
    """
    asked = {} if _IS_OLD else {"async_strategy": "mcore"}
    results: Results = queue.SimpleQueue()
    with replaced(filesystem_async, "_results_queue", results):
        request = dist_checkpointing.save(state, folder, async_sharded_save=True, **asked)
    return request, results


def load(state: dict[str, Any], folder: str, *, validate_access_integrity: bool) -> Any:
    """Fill `state` from what either release saved.

    0.16.1 keeps what is no tensor in a file, common.pt; 0.19 keeps it among the tensors, and reads
    both. This can go with 0.16.1.
    """
    asked = {"common_strategy": _common_of_new()} if _IS_OLD and _is_new(folder) else {}
    return dist_checkpointing.load(
        state, folder, validate_access_integrity=validate_access_integrity, **asked
    )


def _is_new(folder: str) -> bool:
    return not Path(folder, "common.pt").exists()


def _common_of_new() -> Any:
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    class Common(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: str | Path) -> Any:
            name = "common_state/shard_0_1"
            read: dict[str, Any] = {name: io.BytesIO()}
            load_whole(read, checkpoint_id=str(checkpoint_dir), no_dist=True)
            (common,) = read[name]
            return common

    return Common()
