"""How this process was started: torchrun's variables, or the same ones set by hand.

RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT -> Launch
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mcore_sft.base.errors import UserError

_BY_HAND = "set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun does"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One process among those that a launcher started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this process among those of its machine."""
    address: str = ""
    """Where rank 0 is reached; empty where this process is alone."""
    port: int = 0

    @classmethod
    def read(cls) -> Self:
        """What the environment says; raises `UserError` where it says it in part."""
        rank, size, local_rank = (
            _number("RANK", 0),
            _number("WORLD_SIZE", 1),
            _number("LOCAL_RANK", 0),
        )
        if size <= 1:
            return cls()
        if rank >= size:
            raise UserError(
                f"RANK is {rank}, expected less than WORLD_SIZE {size}. Fix: {_BY_HAND}"
            )
        address = os.environ.get("MASTER_ADDR", "")
        if not address:
            raise UserError(f"WORLD_SIZE is {size}, and MASTER_ADDR is not set. Fix: {_BY_HAND}")
        return cls(
            rank=rank,
            size=size,
            local_rank=local_rank,
            address=address,
            port=_number("MASTER_PORT", 29500),
        )

    @property
    def has_agent(self) -> bool:
        """Whether torchrun keeps the rendezvous's store, and not rank 0."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def check(self, nodes: int | None) -> None:
        """Raise `UserError` where fewer machines were started than expected, or may come later.

        Expected are `nodes` (train.nodes), else as many as Slurm gives.
        """
        restarts = _number("TORCHELASTIC_MAX_RESTARTS", 0)
        if restarts:
            raise UserError(
                f"torchrun --max-restarts {restarts}: ranks of a second try do not find each other "
                "(torch keeps the keys of the first). Fix: start without it, and start the whole "
                "command again when it fails, as a loop or a Slurm requeue does; it goes on from "
                "the newest checkpoint"
            )
        name, expected = "train.nodes", nodes
        for variable in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES"):
            if expected is None and os.environ.get(variable):
                name, expected = variable, _number(variable, 1)
        came = _number("GROUP_WORLD_SIZE", 0) or self.size // _number("LOCAL_WORLD_SIZE", 1)
        if expected is not None and self.machines_are_known and came != expected:
            raise UserError(
                f"{came} machine(s) started, expected {expected} ({name}). Fix: start torchrun "
                f"with --nnodes {expected} on each (a range such as 1:{expected} begins with "
                "fewer, and so does a clock that is behind with --rdzv-backend c10d), or set "
                f"train.nodes={came}"
            )

    @property
    def machines_are_known(self) -> bool:
        """Whether the environment says how many machines were started."""
        return self.size == 1 or bool(
            {"GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"}.intersection(os.environ)
        )


def host() -> str:
    """The name of this machine."""
    return platform.node() or "localhost"


def machine() -> str:
    """What tells this machine from others, whose names may be the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{host()} {boot}"


def _number(variable: str, default: int) -> int:
    said = os.environ.get(variable) or str(default)
    if not said.isdecimal():
        raise UserError(f"{variable} is {said!r}, expected a whole number. Fix: {_BY_HAND}")
    return int(said)
