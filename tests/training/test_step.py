"""What a step asks of the device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mcore_sft.data.packs.batch import collate
from mcore_sft.training.step import token_loss
from tests.data.test_batch import PACK


class Seen(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_number_of_tokens_is_made_on_the_device() -> None:
    """A copy from the host's memory would wait for the forward pass."""
    batch = collate([PACK], 8, pad_id=9)
    loss = torch.tensor(1.5)
    with Seen() as seen:
        _, tokens, _ = token_loss(batch, loss)
    assert tokens.dtype == torch.int
    assert tokens.item() == batch.supervised > 0
    assert seen.names == {"full", "detach"}
