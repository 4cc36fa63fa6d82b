"""Named tensors against those expected: the first that differs, where, and on which layout."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest difference of one tensor from the one expected."""

    layout: str
    name: str
    value: float
    """NaN where either tensor holds one."""
    bound: float
    at: tuple[int, ...]

    @property
    def times(self) -> float:
        """How many times the bound the difference is; infinite where it is NaN."""
        if self.value == 0.0:
            return 0.0
        return self.value / self.bound if self.bound and self.value == self.value else math.inf

    def __str__(self) -> str:
        return (
            f"layout {self.layout}: {self.name} differs first: max abs {self.value:.3g} "
            f"(bound {self.bound:.3g}) at {list(self.at)}"
        )


def differences(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    layout: str,
    *,
    share: float = 0.0,
    bound: float = 0.0,
) -> Iterator[Difference]:
    """The difference of each tensor, in the order of those expected.

    A tensor may differ by `bound` and by `share` of its largest expected number; without either,
    not at all.
    """
    names = sorted(found.keys() ^ expected.keys())
    assert not names, f"layout {layout}: {names[0]} is in one of the two alone"
    for name, theirs in expected.items():
        ours = found[name]
        assert ours.shape == theirs.shape, (
            f"layout {layout}: {name} has shape {list(ours.shape)} (expected {list(theirs.shape)})"
        )
        if ours.numel() == 0:
            continue
        apart = (ours.double() - theirs.double()).abs()
        largest = apart.argmax()  # of NaN, the first
        yield Difference(
            layout=layout,
            name=name,
            value=float(apart.flatten()[largest]),
            bound=bound + share * float(theirs.double().abs().max()),
            at=tuple(int(index) for index in torch.unravel_index(largest, apart.shape)),
        )


def assert_within(apart: Iterable[Difference]) -> None:
    """Raise AssertionError of the first difference beyond its bound."""
    for difference in apart:
        assert difference.times <= 1, str(difference)


def assert_close(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    layout: str,
    *,
    share: float = 0.0,
    bound: float = 0.0,
) -> None:
    """Raise AssertionError of the first tensor that `differences` has beyond its bound."""
    assert_within(differences(found, expected, layout, share=share, bound=bound))
