import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.numerics.rounding import ROUNDING, round_ste

# The truth table of IEEE 754's roundings, by hand.
VALUES = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.4, -2.6]
TABLE = {
    "nearest": [-2, -2, 0, 0, 2, 2, 2, -3],
    "floor": [-3, -2, -1, 0, 1, 2, 2, -3],
    "ceil": [-2, -1, 0, 1, 2, 3, 3, -2],
    "truncate": [-2, -1, 0, 0, 1, 2, 2, -2],
}
PYTHON = {"nearest": round, "floor": math.floor, "ceil": math.ceil, "truncate": math.trunc}


@pytest.mark.parametrize("mode", TABLE)
def test_truth_table(mode: str) -> None:
    assert ROUNDING[mode](torch.tensor(VALUES)).tolist() == TABLE[mode]


@given(st.lists(st.floats(-(2**23), 2**23, width=32), min_size=1), st.sampled_from(sorted(PYTHON)))
def test_equals_python(values: list[float], mode: str) -> None:
    assert ROUNDING[mode](torch.tensor(values)).tolist() == [PYTHON[mode](value) for value in values]


@pytest.mark.parametrize("mode", TABLE)
def test_ste_rounds_forward_and_is_the_identity_backward(mode: str) -> None:
    x = torch.tensor(VALUES, requires_grad=True)
    y = round_ste(x, mode)
    assert y.tolist() == TABLE[mode]
    grad = torch.randn(len(VALUES))
    y.backward(grad)
    assert torch.equal(x.grad, grad)


def test_ste_keeps_nothing_for_backward() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        round_ste(torch.randn(8, requires_grad=True))
    assert kept == []
