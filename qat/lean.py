"""GELU, SiLU and LayerNorm as a prepared network computes them: torch's values, in less memory.

Results of GELU and SiLU are the widest tensors of a transformer, and live for a moment: between the linear layer, whose
result is kept for their gradient, and the quantizer. In torch's heap each leaves a hole behind that what is kept then
breaks up, so they lie in the memory of the kernels. LayerNorm keeps its input: of one on a grid, the integers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.attention import one_operation
from qat.numerics import codes, fast, native


@one_operation
def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """`F.gelu`."""
    return native.gelu(input, approximate) if _taken(input) else F.gelu(input, approximate=approximate)


@one_operation
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.silu`."""
    return native.silu(input) if not inplace and _taken(input) else F.silu(input, inplace)


@one_operation
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm`."""
    with codes.kept_as_integers(input):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)


def _taken(x: Tensor) -> bool:
    """Whether C++ computes it."""
    if torch.compiler.is_compiling() or fast.transformed() or not codes.ordinary(x) or x.dtype not in fast.DTYPES:
        return False
    return codes.dense(x) and native.module() is not None


class GELU(nn.GELU):
    """`nn.GELU`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return gelu(input, self.approximate)


class SiLU(nn.SiLU):
    """`nn.SiLU`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return silu(input, self.inplace)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


FUNCTIONS: dict[Any, Callable[..., Tensor]] = {F.gelu: gelu, F.silu: silu, F.layer_norm: layer_norm}
"""Torch's function -> ours."""

MODULES: dict[type[nn.Module], type[nn.Module]] = {nn.GELU: GELU, nn.SiLU: SiLU, nn.LayerNorm: LayerNorm}
"""Torch's module -> ours."""
