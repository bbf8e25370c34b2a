"""A quantized weight as it is stored: codes, levels and scales."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.fake_quant import FakeQuantize
from qat.fitted import Codebook, Mean, Product
from qat.numerics.rounding import ROUNDING, adaptive, settled


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A weight as it is stored, in rows that share a scale: `scale * (levels[codes] - zero_point)`.

    Attributes:
        codes: shape [rows, values]: integers (float tensor), or with `levels` indices into them.
        levels: float32, shape [1 or rows, entries]; None where codes are the integers themselves.
        scale, zero_point: shape [rows].
        low, high: smallest and largest code; equal where codes are floats that stand for themselves.
        step: distance of neighbouring integers (2 for binary weights).
    """

    codes: Tensor
    levels: Tensor | None
    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    step: int = 1

    def dequantize(self) -> Tensor:
        """The rows' values, float32."""
        values = self.codes.float()
        if self.levels is not None:
            values = self.levels.expand(self.codes.shape[0], -1).gather(1, self.codes.long())
        return (values - self.zero_point.unsqueeze(1)) * self.scale.unsqueeze(1)


@torch.no_grad()
def encode(quantizer: FakeQuantize, x: Tensor) -> Encoded:
    """The weight `x` on its levels: what the quantizer's forward in eval mode computes, before it is multiplied out.

    Raises:
        TypeError: the quantizer encodes vectors, not values (`product`).
    """
    rows = quantizer.rows(x)
    count = rows.shape[0]
    ones, zeros = torch.ones(count, device=x.device), torch.zeros(count, device=x.device)
    fitted, scheme, grid = quantizer.fitted, quantizer.scheme, quantizer.grid
    if isinstance(fitted, Mean):
        q, scale = fitted.integers(rows)
        ends, step = (fitted.levels[0], fitted.levels[-1]), fitted.levels[1] - fitted.levels[0]
        return Encoded(codes=q, levels=None, scale=scale, zero_point=zeros, low=ends[0], high=ends[1], step=step)
    if isinstance(fitted, Codebook):
        levels = fitted.entries.detach()
        return Encoded(
            codes=fitted.indices.float(), levels=levels, scale=ones, zero_point=zeros, low=0, high=levels.shape[1] - 1
        )
    if isinstance(fitted, Product):
        raise TypeError(f"'{quantizer.name}': product quantization has one code for a vector, not for a value")
    scale, zero_point = (t.reshape(-1).expand(count).clone() for t in quantizer.qparams(x))
    low, high = quantizer.quant_min, quantizer.quant_max
    rounding = ROUNDING[settled(scheme.rounding)]
    v = quantizer.range.transform(rows).float() / scale.unsqueeze(1)
    if grid is None:
        rounded = adaptive(v, quantizer.rows(quantizer.logits), soft=False) if quantizer.adapts else rounding(v)
        q = (rounded + zero_point.unsqueeze(1)).clamp(low, high)
        return Encoded(codes=q, levels=None, scale=scale, zero_point=zero_point, low=int(low), high=int(high))
    q = grid.snap(v, rounding)
    if quantizer.format.unit_scale:  # a float type of 16 bits or so: values stand for themselves
        dtype = next(d for d in (torch.bfloat16, torch.float16, torch.float32) if torch.equal(q.to(d).float(), q))
        return Encoded(codes=q.to(dtype), levels=None, scale=scale, zero_point=zero_point, low=0, high=0)
    if scheme.format == "int":
        return Encoded(codes=q, levels=None, scale=scale, zero_point=zero_point, low=int(low), high=int(high), step=2)
    levels = grid.values().to(x.device)
    return Encoded(
        codes=torch.searchsorted(levels, q).float(), levels=levels.unsqueeze(0), scale=scale, zero_point=zero_point,
        low=0, high=len(levels) - 1,
    )  # fmt: skip
