"""How this process was started: torchrun's variables, or the same ones set by hand.

RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT -> Launch
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

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
        rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
        local_rank = _number("LOCAL_RANK", 0)
        if size <= 1:
            return cls()
        if rank >= size:
            raise UserError(
                f"RANK is {rank}, expected less than WORLD_SIZE {size}. Fix: {_BY_HAND}"
            )
        address = os.environ.get("MASTER_ADDR", "").strip("[]")  # of an IPv6 literal
        port = _number("MASTER_PORT", 29500)
        if not 0 < port < 2**16:
            raise UserError(f"MASTER_PORT is {port}, expected 1 to 65535. Fix: {_BY_HAND}")
        if not address:
            raise UserError(f"WORLD_SIZE is {size}, and MASTER_ADDR is not set. Fix: {_BY_HAND}")
        return cls(rank=rank, size=size, local_rank=local_rank, address=address, port=port)

    @property
    def has_agent(self) -> bool:
        """Whether torchrun keeps the rendezvous's store, and not rank 0."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    @property
    def attempt(self) -> int:
        """How often torchrun has started the ranks anew."""
        return _number("TORCHELASTIC_RESTART_COUNT", 0)

    def check_restarts(self) -> None:
        """Raise `UserError` where torchrun would start ranks that fail anew."""
        restarts = _number("TORCHELASTIC_MAX_RESTARTS", 0)
        if restarts:
            raise UserError(
                f"torchrun --max-restarts {restarts}: ranks of a second try do not find each other "
                "(torch keeps the keys of the first). Fix: start without it, and start the whole "
                "command again when it fails, as a loop or a Slurm requeue does; it goes on from "
                "the newest checkpoint"
            )

    def check(self, nodes: int | None, machines: int) -> None:
        """Raise `UserError` where not as many machines have come as were started, or more may come.

        Expected are `nodes` (train.nodes), else as many as Slurm gives, else torchrun's --nnodes.
        torchrun says how many have come; without it, the ranks have met on `machines`.
        """
        came = _number("GROUP_WORLD_SIZE", machines)
        name, expected = _expected(nodes)
        if expected is not None and str(came) != expected:
            raise UserError(
                f"{came} machine(s) started, expected {expected} ({name}). Fix: start torchrun "
                "with the same number for --nnodes on each machine (a range such as 1:2 begins "
                "with fewer, and --rdzv-backend c10d leaves out a machine whose clock is behind), "
                f"or set train.nodes={came}"
            )


def _expected(nodes: int | None) -> tuple[str, str | None]:
    """Who says how many machines there are, and how many."""
    if nodes is not None:
        return "train.nodes", str(nodes)
    for variable in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES"):
        if os.environ.get(variable):
            return variable, os.environ[variable]
    return "torchrun --nnodes", _asked_of_torchrun()


def _asked_of_torchrun() -> str | None:
    """What stands behind --nnodes on the command line of the agent that started this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    found = re.search(r"\0--nnodes[=\0]([0-9:]+)\0", "\0" + "\0".join(words) + "\0")
    return found[1] if found else os.environ.get("PET_NNODES")


def host() -> str:
    """The name of this machine."""
    return os.uname().nodename or "localhost"


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
