"""Two curves and the gates between them in, what passed and what did not out; nothing is run."""

from dataclasses import dataclass

from mcore_sft.evaluation.statistics import Share
from mcore_sft.nightly.curve import Curve
from mcore_sft.nightly.tier import Gates


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one gate says."""

    gate: str
    passed: bool
    value: float | None = None
    """What was measured; None where there is no finite number."""
    limit: float | None = None
    """What it is held against."""
    step: int | None = None
    """The first step that departs; None where none does, or where it is not about steps."""
    sentence: str
    """The same for people."""


def judge(
    measured: Curve,
    reference: Curve | None,
    gates: Gates,
    *,
    accuracy: Share | None = None,
    peer_tokens_per_second: float | None = None,
    resumed: Curve | None = None,
) -> list[Finding]:
    """What each gate that is set says; NaN and missing inputs never pass."""
    raise NotImplementedError
