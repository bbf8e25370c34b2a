"""Observers that take in relu(x): the same range as from a copy, and no waiting for it at every step."""

import pytest
import torch

from qat.observers import OBSERVERS, Observer, ObserverOptions
from qat.observers.extremes import Extremes


def make(name: str, **options: object) -> Observer:
    return OBSERVERS[name](ObserverOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OBSERVERS)
def test_relu_of_the_values(name: str) -> None:
    copied, told = make(name, rows=2), make(name, rows=2)
    generator = torch.Generator().manual_seed(0)
    for shift in (0.0, -1.0, 3.0, -9.0):  # the last batch is all negative
        x = torch.randn(2, 500, generator=generator) + shift
        x[:, 0] = -20.0  # the largest magnitude is negative
        copied.update(x.relu())
        told.update(x, relu=True)
    for a, b in zip(copied.range(), told.range(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in OBSERVERS if isinstance(make(name), Extremes)])
def test_extremes_are_clamped_not_the_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    clamp = torch.Tensor.clamp
    monkeypatch.setattr(torch.Tensor, "clamp", lambda x, **limits: sizes.append(x.numel()) or clamp(x, **limits))
    make(name).update(torch.randn(1, 1000), relu=True)
    assert sizes == [1, 1]


@pytest.mark.parametrize("name", OBSERVERS)
def test_data_is_looked_for_once(name: str) -> None:
    """`range()` asks the tensors whether anything was seen until something was, and again after a reset or a load."""
    empty, observer = make(name), make(name)
    observer.update(torch.randn(1, 100))
    observer.range()
    observer._require(lambda: pytest.fail("asked again"))
    observer.load_state_dict(empty.state_dict())
    with pytest.raises(RuntimeError, match="no data"):
        observer.range()
    observer.update(torch.randn(1, 100))
    observer.range()
    observer.reset()
    with pytest.raises(RuntimeError, match="no data"):
        observer.range()
