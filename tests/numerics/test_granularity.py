import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.numerics.granularity import Layout, from_rows, rows_of

SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple)


@given(SHAPES, st.integers(1, 9) | st.none())
def test_rows_and_back(shape: tuple[int, ...], group_size: int | None) -> None:
    x = torch.randn(shape)
    rows = rows_of(x, group_size)
    assert torch.equal(from_rows(rows, x.shape), x)
    assert rows.shape[0] == shape[0] * (1 if group_size is None else -(-x[0].numel() // group_size))


@given(SHAPES, st.integers(1, 9))
def test_each_row_is_a_run_of_inputs_of_one_output_channel(shape: tuple[int, ...], group_size: int) -> None:
    x = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    expected = []
    for channel in x.reshape(shape[0], -1):
        for start in range(0, channel.size, group_size):
            group = channel[start : start + group_size]
            expected.append(np.pad(group, (0, group_size - group.size)))
    assert np.array_equal(rows_of(torch.from_numpy(x), group_size).numpy(), np.stack(expected))


def test_rows_of_a_channels_last_weight_follow_its_logical_order() -> None:
    x = torch.randn(3, 4, 2, 2)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(rows_of(last, 8), rows_of(x, 8))


LAYOUTS = {
    "tensor": Layout(),
    "channel": Layout(kind="channel"),
    "channel 1": Layout(kind="channel", axis=1),
    "channel -1": Layout(kind="channel", axis=-1),
    "group": Layout(kind="group", group_size=5),
    "group of channels": Layout(kind="group", group_size=2, weight=False, axis=1),
    "group of the last": Layout(kind="group", group_size=3, weight=False, axis=-1),
    "block": Layout(kind="block", block_size=(2, 3)),
    "block of channels": Layout(kind="block", block_size=(2, -1)),
    "block of inputs": Layout(kind="block", block_size=(-1, 4)),
    "token": Layout(kind="token", weight=False),
}


def owner(layout: Layout, shape: tuple[int, ...], index: tuple[int, ...]) -> tuple[int, ...]:
    """Which scale an element belongs to, spelled out."""
    column = int(np.ravel_multi_index(index[1:], shape[1:]))
    inputs = int(np.prod(shape[1:]))
    if layout.kind == "channel":
        return (index[layout.axis],)
    if layout.kind == "group" and layout.weight:
        return (index[0], column // layout.group_size)
    if layout.kind == "group":
        axis = layout.axis % len(shape)
        return (*index[:axis], *index[axis + 1 :], index[axis] // layout.group_size)
    if layout.kind == "block":
        r, c = (size if size > 0 else n for size, n in zip(layout.block_size, (shape[0], inputs), strict=True))
        return (index[0] // r, column // c)
    if layout.kind == "token":
        return index[:1] if len(shape) >= 4 else index[:-1]
    return ()


@given(SHAPES, st.sampled_from(sorted(LAYOUTS)))
def test_elements_share_a_row_exactly_where_they_share_a_scale(shape: tuple[int, ...], name: str) -> None:
    layout = LAYOUTS[name]
    numbers = torch.arange(1.0, np.prod(shape) + 1).reshape(shape)
    rows = layout.rows(numbers)
    owners = {float(numbers[index]): owner(layout, shape, index) for index in np.ndindex(shape)}
    of_rows = [{owners[value] for value in row.tolist() if value} for row in rows]
    assert all(len(found) == 1 for found in of_rows)
    keys = [next(iter(found)) for found in of_rows]
    assert len(set(keys)) == len(keys)
    assert keys == sorted(keys)  # in the order of the scale's own dimensions
    assert rows.shape[0] == int(np.prod(layout.scale_shape(shape)))


@given(SHAPES, st.sampled_from(sorted(LAYOUTS)), st.booleans())
def test_restore_undoes_rows(shape: tuple[int, ...], name: str, strided: bool) -> None:
    layout, x = LAYOUTS[name], torch.randn(shape)
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if strided else x
    assert torch.equal(layout.restore(layout.rows(x), x.shape), x)


@pytest.mark.parametrize("name", ["tensor", "channel", "channel 1", "channel -1"])
def test_scales_that_broadcast(name: str) -> None:
    layout, x = LAYOUTS[name], torch.randn(3, 4, 5)
    scale = torch.rand(layout.scale_shape(x.shape))
    expected = layout.restore(layout.rows(x) * scale.reshape(-1, 1), x.shape)
    assert torch.equal(x * layout.broadcast(scale, x), expected)
    assert not layout.by_rows


def test_empty_batches() -> None:
    for shape in ((0, 4), (0, 4, 3), (0, 3, 2, 2)):
        for layout in (LAYOUTS["tensor"], LAYOUTS["token"], LAYOUTS["channel 1"], LAYOUTS["group of channels"]):
            x = torch.zeros(shape)
            assert layout.restore(layout.rows(x), x.shape).shape == x.shape
