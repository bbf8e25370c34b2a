"""How a real number becomes an integer. ROUNDING is the table that configurations choose from.

| x        | -2.5 | -1.5 | -0.5 | 0.5 | 1.5 | 2.5 |
|----------|------|------|------|-----|-----|-----|
| nearest  | -2   | -2   | 0    | 0   | 2   | 2   |
| floor    | -3   | -2   | -1   | 0   | 1   | 2   |
| ceil     | -2   | -1   | 0    | 1   | 2   | 3   |
| truncate | -2   | -1   | 0    | 0   | 1   | 2   |
"""

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDING: dict[str, Callable[[Tensor], Tensor]] = {
    "nearest": torch.round,  # ties to even, as ONNX's QuantizeLinear and IEEE 754 do
    "floor": torch.floor,
    "ceil": torch.ceil,
    "truncate": torch.trunc,
}


class _RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, mode: str) -> Tensor:
        return ROUNDING[mode](x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        """Nothing is kept: the gradient does not depend on the input."""

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad, None


def round_ste(x: Tensor, mode: str = "nearest") -> Tensor:
    """Round with the straight-through gradient: forward rounds, backward is the identity.

    Args:
        x: any shape, floating point.
        mode: key of `ROUNDING`.

    Source: Bengio, Leonard, Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons".

    >>> round_ste(torch.tensor([0.5, 1.5, -2.5]))
    tensor([ 0.,  2., -2.])
    """
    return _RoundSTE.apply(x, mode)
