import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.numerics.granularity import from_rows, group_count, rows_of

SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple)


@given(SHAPES, st.integers(1, 9) | st.none())
def test_rows_and_back(shape: tuple[int, ...], group_size: int | None) -> None:
    x = torch.randn(shape)
    rows = rows_of(x, group_size)
    assert torch.equal(from_rows(rows, x.shape), x)
    assert rows.shape[0] == shape[0] * (1 if group_size is None else group_count(shape, group_size))


@given(SHAPES, st.integers(1, 9))
def test_each_row_is_a_run_of_inputs_of_one_output_channel(shape: tuple[int, ...], group_size: int) -> None:
    x = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    expected = []
    for channel in x.reshape(shape[0], -1):
        for start in range(0, channel.size, group_size):
            group = channel[start : start + group_size]
            expected.append(np.pad(group, (0, group_size - group.size)))
    assert np.array_equal(rows_of(torch.from_numpy(x), group_size).numpy(), np.stack(expected))


@pytest.mark.parametrize(("inputs", "size", "groups"), [(32, 32, 1), (33, 32, 2), (31, 32, 1), (64, 32, 2), (1, 1, 1)])
def test_group_count(inputs: int, size: int, groups: int) -> None:
    assert group_count((7, inputs), size) == groups


def test_rows_of_a_channels_last_weight_follow_its_logical_order() -> None:
    x = torch.randn(3, 4, 2, 2)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(rows_of(last, 8), rows_of(x, 8))
