import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.numerics.packing import pack_bits, unpack_bits


@st.composite
def integers(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.integers(1, 8))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))


@given(integers())
def test_stream_is_that_of_one_big_integer_and_unpacks(case: tuple[int, list[int]]) -> None:
    bits, values = case
    number = sum(value << (bits * i) for i, value in enumerate(values))  # first value in the lowest bits
    expected = number.to_bytes((len(values) * bits + 7) // 8, "little")
    packed = pack_bits(torch.tensor(values, dtype=torch.int64), bits)
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == expected
    unpacked = unpack_bits(packed, bits, len(values))
    assert unpacked.dtype == torch.uint8
    assert unpacked.tolist() == values


def test_equals_numpy_packbits_and_flattens_shapes() -> None:
    x = torch.randint(0, 2, (3, 5, 2))
    assert np.array_equal(pack_bits(x, 1).numpy(), np.packbits(x.numpy().reshape(-1), bitorder="little"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float32])
def test_any_dtype_that_holds_the_integers(dtype: torch.dtype) -> None:
    assert pack_bits(torch.tensor([1, 2, 3, 15], dtype=dtype), 4).tolist() == [0x21, 0xF3]


@pytest.mark.parametrize(("value", "bits"), [(-1, 8), (256, 8), (4, 2), (2, 1)])
def test_a_value_that_does_not_fit_is_refused(value: int, bits: int) -> None:
    with pytest.raises(ValueError, match=rf"{value}.*do not fit in {bits} bits"):
        pack_bits(torch.tensor([0, value]), bits)


@pytest.mark.parametrize("length", [2, 4])
def test_a_stream_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"5 integers of 4 bits need 3 bytes, got {length}"):
        unpack_bits(torch.zeros(length, dtype=torch.uint8), 4, 5)
