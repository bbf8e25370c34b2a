"""A dense tensor in the order of memory, cut so that kernels find a scale for each run of values.

Kernels see three forms (`qat.numerics.kernels`); `layout_of` chooses one by shape, strides and the scale's shape.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

NARROW = 64
"""Runs of fewer elements with one scale are taken together with their neighbours: short loops are slow."""

LONGEST = 4096
"""Longer runs with one scale are cut, so that their sums are of few terms, and threads can share them."""

MOST_ROWS = 16
"""Rows summed at a time where the scale varies along the row: as many as stay in the first cache."""


@dataclass(frozen=True)
class Layout:
    """A dense tensor in the order of memory, seen as [outer, channels, pieces, inner] with a scale for each channel.

    Attributes:
        form: of the kernels: `flat`, `rows` of `inner` values, or `cols` of `channels * inner`.
        outer, channels, pieces, inner: extents; `pieces` are the parts that long runs are cut into (of `flat`, only
            to be summed: `strips`).
    """

    form: str
    outer: int
    channels: int
    pieces: int
    inner: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        if self.form == "flat":
            return (self.pieces * self.inner,)
        if self.form == "cols":
            return (self.outer, self.channels * self.inner)
        return (self.outer * self.channels * self.pieces, self.inner)

    @functools.cached_property
    def block(self) -> int:
        """The most rows, up to MOST_ROWS, that divide all; 1 where that leaves nothing to divide."""
        rows = min(MOST_ROWS, self.outer // 2)
        return next(n for n in range(max(rows, 1), 0, -1) if self.outer % n == 0)

    def spread(self, p: Tensor) -> Tensor:
        """One entry a scale, any shape -> what broadcasts against the values."""
        if self.form == "flat":
            return p.reshape(())
        if self.form == "cols":
            return p.reshape(-1, 1).expand(self.channels, self.inner).reshape(-1).contiguous()
        if self.outer == self.pieces == 1:
            return p.reshape(-1, 1)
        return p.reshape(1, -1, 1).expand(self.outer, self.channels, self.pieces).reshape(-1).contiguous().unsqueeze(1)

    def gather(self, p: Tensor) -> Tensor:
        """Sums of parts -> one entry a scale."""
        if self.form == "flat":
            return p.sum()
        if self.form == "cols":
            return p.sum(0).reshape(self.channels, self.inner).sum(1)
        if self.outer == self.pieces == 1:
            return p
        return p.reshape(self.outer, self.channels, self.pieces).sum((0, 2))

    def view(self, x: Tensor) -> Tensor:
        """The values of a dense tensor, without a copy."""
        shape = self.shape
        return x.as_strided(shape, (shape[-1], 1)[-len(shape) :])

    def summed(self, *tensors: Tensor) -> tuple[str, tuple[Tensor, ...]]:
        """The form that sums the gradient of the scale, and values as it sees them."""
        if self.form == "flat" and self.pieces > 1:
            return "strips", tuple(t.view(self.pieces, self.inner) for t in tensors)
        if self.form == "cols":
            return "cols", tuple(t.view(-1, self.block, t.shape[1]) for t in tensors)
        return self.form, tensors


@functools.lru_cache(maxsize=4096)
def layout_of(shape: torch.Size, stride: tuple[int, ...], scale: tuple[int, ...]) -> Layout | None:
    """None where `x` has gaps, or the scale varies along several dimensions or along one that `x` has not."""
    numel, channels = math.prod(shape), math.prod(scale)
    if numel == 0 or channels == 0 or not _dense(shape, stride):
        return None
    if channels == 1:
        if len(scale) > len(shape):
            return None
        pieces = _pieces(numel)
        return Layout("flat", 1, 1, pieces, numel // pieces)
    axes = [axis - len(scale) for axis, extent in enumerate(scale) if extent > 1]
    if len(axes) > 1 or len(scale) > len(shape) or shape[axes[0]] != channels:
        return None
    inner = stride[axes[0]]
    outer = numel // (channels * inner)
    if inner == 1 or (inner < NARROW and outer >= 8):
        return Layout("cols", outer, channels, 1, inner)
    pieces = _pieces(inner)
    return Layout("rows", outer, channels, pieces, inner // pieces)


def _pieces(run: int) -> int:
    """How many equal parts a run is cut into; 1 where it is short, or has no divisor that gives fair ones."""
    return next((n for n in range(-(-run // LONGEST), run // 256 + 1) if run % n == 0), 1)


def _dense(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether the elements fill a stretch of memory, each place once, in whatever order of dimensions."""
    expected = 1
    for step, extent in sorted((step, extent) for step, extent in zip(stride, shape, strict=True) if extent > 1):
        if step != expected:
            return False
        expected *= extent
    return True
