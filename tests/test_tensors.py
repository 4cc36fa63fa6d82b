"""The comparison that the equalities share fails where it must, and says where."""

import pytest
import torch

from tests import tensors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((1, 2, 1.5), "layout tp2: b differs first: max abs 0.5 (bound 1e-05) at [1, 2]"),
        ((0, 1, torch.nan), "layout tp2: b differs first: max abs nan (bound 1e-05) at [0, 1]"),
        ((0, 1, 1 + 0.9e-5), None),
    ],
)
def test_the_first_tensor_beyond_its_bound_is_named(
    change: tuple[int, int, float], said: str | None
) -> None:
    expected = {name: torch.ones(2, 3) for name in "abc"}
    found = {name: tensor.clone() for name, tensor in expected.items()}
    row, column, value = change
    found["b"][row, column] = found["c"][row, column] = value
    if said is None:
        tensors.assert_close(found, expected, "tp2", share=1e-5)
        with pytest.raises(AssertionError, match=r"b differs first: .* \(bound 0\)"):
            tensors.assert_close(found, expected, "tp2")
    else:
        with pytest.raises(AssertionError) as ended:
            tensors.assert_close(found, expected, "tp2", share=1e-5)
        assert str(ended.value).splitlines()[0] == said


@pytest.mark.parametrize(
    "found", [{}, {"a": torch.ones(2), "z": torch.ones(1)}, {"a": torch.ones(3)}]
)
def test_other_names_or_shapes_are_named(found: dict[str, torch.Tensor]) -> None:
    with pytest.raises(AssertionError, match=r"layout pp2: [az] (is in one|has shape)"):
        tensors.assert_close(found, {"a": torch.ones(2)}, "pp2", bound=9.0)
