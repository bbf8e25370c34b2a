"""FakeQuantize: one scheme on one tensor."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
from torch import Tensor, nn

from qat import plain
from qat.fitted import FITTED, Fitted, Mean
from qat.mode import Mode
from qat.numerics.affine import SMALLEST_SCALE, choose_qparams
from qat.numerics.draws import seeded
from qat.numerics.fake_quantize import Staircase, fake_quantize, fake_quantize_by
from qat.numerics.formats import FORMATS, Format, Grid
from qat.numerics.gradients import GRADIENTS
from qat.numerics.granularity import Layout, in_order_of
from qat.numerics.rounding import ROUNDING, adaptive, penalized, rectified_logits, settled
from qat.observers import OBSERVERS, Ema, MinMax, ObserverOptions
from qat.ranges import RANGES, RangeOptions
from qat.recompute import recomputing
from qat.scheme import Granularity, TensorScheme
from qat.scheme.checks import keeps_tensor_scale

LSQ_LEVELS = 7
"""Learned scales of other formats are kept as if their largest level were this, that of a 4-bit integer. The largest of
e4m3fn is 448: a learning rate that suits scales of integers would double such a scale in one step."""


class FakeQuantize(nn.Module):
    """Quantize-dequantize one tensor with straight-through gradients.

    Scales hold NaN until a range is known, so that a network that was never calibrated cannot pass for one that was.

    Args:
        scheme: how; `scheme.bits` must be set.
        shape: shape of the weight; None for an activation.
        nonnegative: values cannot be negative, so that a symmetric scheme of open sign takes an unsigned grid.
        relu: apply ReLU as part of quantization.
        sites: how many edges share this node (the inputs of a concatenation).
        activation: shape of an activation, batch included; needed for scales per channel.
        bounds: ends of the values, where they are known: the range is not observed then.

    Attributes:
        range: scale and zero point, or where they come from (`qat.ranges`).
        grid: the levels of a format that has no zero point; None for integers, and where levels are fitted.
        name: what errors call the tensor; with `rounding_seed`, draws depend on it.
        draws: how often random numbers were drawn, where there is a `rounding_seed`.
        reason: what chose the scheme of an activation, for reports.
        progress: share of training that has passed, for gradients and penalties that change with it (`anneals`); a
            tensor, so that a compiled or captured step reads it anew.
        local: a scale of the tensor is kept, and those of its blocks are computed from the tensor at hand with it.
        plain: few operations can do it (`qat.plain`).
        kept: what reads the result keeps it for backward, so that its integers are of use (`qat.numerics.codes`).
        watched: the next forward checks its input for NaN and infinity.
    """

    progress: Tensor
    draws: Tensor

    def __init__(
        self,
        scheme: TensorScheme,
        shape: torch.Size | None = None,
        *,
        nonnegative: bool = False,
        relu: bool = False,
        sites: int = 1,
        activation: Sequence[int] | None = None,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        assert scheme.bits is not None
        self.scheme, self.shape, self.relu, self.sites = scheme, shape, relu, sites
        self.activation, self.bounds = None if activation is None else list(activation), bounds
        self.mode, self.watched, self.kept = Mode.float, False, True
        self.name, self.reason = "tensor", ""
        self.register_buffer("progress", torch.zeros((), dtype=torch.float32), persistent=False)
        if scheme.rounding_seed is not None:
            self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        weight = shape is not None
        self.signed = scheme.takes_sign(nonnegative or relu)
        self.layout = Layout(
            kind=scheme.granularity.value,
            weight=weight,
            axis=(0 if weight else 1) if scheme.axis is None else scheme.axis,
            group_size=scheme.group_size,
            block_size=(scheme.block_size[0], scheme.block_size[1]) if scheme.block_size else None,
        )
        rule = RANGES[scheme.range]
        self.local = keeps_tensor_scale(scheme, "weight" if weight else "activation")
        self.scale_shape: tuple[int, ...] = ()
        if scheme.granularity is not Granularity.tensor and (weight or not rule.dynamic) and not self.local:
            known = shape if shape is not None else activation
            if known is None:
                raise ValueError("a scale per channel of an activation needs its shape: FakeQuantize(activation=shape)")
            self.scale_shape = self.layout.scale_shape(known)
        self.grid = self._grid()
        self.quant_min, self.quant_max = self._ends()
        self.fitted = self._fitted()
        self.observer = OBSERVERS[scheme.observer](
            ObserverOptions(
                rows=math.prod(self.scale_shape) if self.observes else 0, sites=sites, symmetric=scheme.symmetric,
                quant_min=self.quant_min, quant_max=self.quant_max,
                percentiles=(scheme.percentiles[0], scheme.percentiles[1]),
                momentum=scheme.momentum, norm=scheme.norm, sigmas=scheme.sigmas,
                grid=None if scheme.format == "int" else self.grid, scales=self.format.scales,
            )
        )  # fmt: skip
        rule = rule if self.fitted is None else RANGES["dynamic"]  # fitted levels hold what there is to learn
        self.range = rule(
            RangeOptions(
                shape=self.scale_shape,
                quant_min=self.quant_min,
                quant_max=self.quant_max,
                unit=self.quant_max / LSQ_LEVELS if self.grid is not None and scheme.format != "int" else 1.0,
                decay=scheme.range_decay,
            )
        )
        if shape is not None and self.adapts:
            self.logits = nn.Parameter(torch.full(shape, torch.nan, dtype=torch.float32))
        self.plain = plain.is_plain(self)

    def _grid(self) -> Grid | None:
        """Levels other than the integers with a zero point."""
        scheme = self.scheme
        if scheme.format == "int":
            return RANGES[scheme.range].weight_grid(scheme.bits or 0) if self.shape is not None else None
        make = None if self.format.fitted else self.format.grid
        return None if make is None else make(scheme.bits or 0, self.signed, scheme.narrow_range)

    def _ends(self) -> tuple[float, float]:
        """The smallest and the largest level."""
        if self.grid is not None:
            return self.grid.low, self.grid.high
        if self.format.fitted is not None:
            return -1, 1
        return self.scheme.bounds(not self.signed)

    def _fitted(self) -> Fitted | None:
        if self.format.fitted is None:
            return None
        assert self.shape is not None
        assert self.scheme.bits is not None
        rows = tuple(self.layout.rows(torch.empty(self.shape, device="meta")).shape)
        groups = self.scale_shape[-1] if len(self.scale_shape) == 2 else 1
        rule, scheme = RANGES[self.scheme.range], self.scheme
        return FITTED[self.format.fitted](rows, groups, scheme.bits, rule.learned, scheme.refresh, scheme.subspaces)

    @property
    def name(self) -> str:
        """What errors call the tensor."""
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        self._name, self._seed = name, ((self.scheme.rounding_seed or 0) << 32) + zlib.crc32(name.encode())

    @property
    def format(self) -> Format:
        """The scheme's format."""
        return FORMATS[self.scheme.format]

    @property
    def scale(self) -> Tensor:
        """The range's scale (the tensor that is kept, not always what is used: see `qparams`)."""
        return self.range.scale  # type: ignore[return-value]

    @property
    def zero_point(self) -> Tensor:
        """The range's zero point."""
        return self.range.zero_point  # type: ignore[return-value]

    @property
    def dynamic(self) -> bool:
        """Whether the range is computed from the tensor at hand."""
        return self.range.dynamic

    @property
    def observes(self) -> bool:
        """Whether it keeps what it sees: the range of a weight is of the weight at hand, unless it follows batches."""
        rule = RANGES[self.scheme.range]
        if rule.dynamic or self.format.fitted is not None:
            return False
        return self.shape is None or rule.follows

    @property
    def calibrated(self) -> bool:
        """Whether everything that calibration sets is known."""
        if self.fitted is not None:
            return self.fitted.calibrated
        return self.range.calibrated and not (self.adapts and bool(self.logits.isnan().any()))

    @property
    def adapts(self) -> bool:
        """Whether rounding is learned, weight by weight."""
        return ROUNDING[self.scheme.rounding].learned

    @property
    def anneals(self) -> bool:
        """Whether the share of training that has passed makes a difference."""
        first, last = self.scheme.gradient_strength or GRADIENTS[self.scheme.gradient].strengths or (1.0, 1.0)
        return self.adapts or first != last

    @property
    def integer(self) -> bool:
        """Whether an integer runtime can compute with it: static integers, one scale a tensor or output channel."""
        if self.shape is None:
            return self.scheme.format == "int" and self.layout.kind == "tensor" and not self.dynamic
        return self.foldable and self.layout.kind != "group" and (self.scheme.bits or 0) <= 8

    @property
    def foldable(self) -> bool:
        """Whether the weight is integers whose scales all lie within one output channel (`qat.fold`)."""
        first = self.shape is not None and self.layout.axis % len(self.shape) == 0
        inside = self.layout.kind in ("tensor", "group") or (self.layout.kind == "channel" and first)
        return inside and (isinstance(self.fitted, Mean) or self.scheme.format == "int")

    @property
    def rounding_in_use(self) -> str:
        """Key of ROUNDING: the scheme's; what stands in for it (`settled`) once `frozen`, or in eval mode.

        So what is evaluated is what `fold` exports, although a random rounding never gives the same integers twice.
        """
        rounding = self.scheme.rounding
        return settled(rounding) if self.mode is Mode.frozen or not self.training else rounding

    def rows(self, x: Tensor) -> Tensor:
        """View `x` with one row a scale, shape [rows, values]."""
        return self.layout.rows(x)

    @torch.no_grad()
    def observe(self, x: Tensor, site: int = 0) -> None:
        """Record the range of `x` (after the absorbed ReLU), if it `observes`. Ignores empty tensors.

        In a distributed run processes are in step while they train, and take in their parts of a batch together. What
        they observe in eval mode (calibration) is merged afterwards, unless its order matters.
        """
        if not self.observes or recomputing():
            return
        together = self.training or self.observer.ordered
        rows, real = self._with_kept_range(x)
        self.observer.update(rows, site, relu=self.relu, together=together, real=real)

    @torch.no_grad()
    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The range of this one tensor (after the absorbed ReLU), shape [rows] each; observers keep what they saw."""
        rows, real = self._with_kept_range(x)
        if self.relu and isinstance(self.observer, MinMax | Ema):  # the range of relu(x) is relu of the range
            low, high = self.observer.measure(rows, real)
            return low.clamp(min=0), high.clamp(min=0)
        return self.observer.measure(rows.relu() if self.relu else rows, real)

    def _with_kept_range(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`x` with one row a range, and which of its values count (`Layout.real`)."""
        return (x.reshape(1, -1), None) if self.local else (self.rows(x), self.layout.real(x))

    @property
    def follows(self) -> bool:
        """Whether the range moves with what is quantized now."""
        moves = self.range.follows and self.bounds is None
        return moves and self.training and self.mode is Mode.quantize and not recomputing()

    @torch.no_grad()
    def set_range_from_observer(self) -> None:
        """Take scale and zero point from what was observed.

        Raises:
            RuntimeError: nothing was.
        """
        if not self.dynamic:
            if not self.observes:
                raise RuntimeError("the range of a weight is its own: set_range_from(weight)")
            low, high = self.observer.range()
            if self.bounds is not None:
                low, high = (torch.full_like(t, end) for t, end in zip((low, high), self.bounds, strict=True))
            self.range.set(*self._choose(low, high, self.scale_shape))

    @torch.no_grad()
    def set_range_from(self, x: Tensor) -> None:
        """Take scale and zero point (tables, roundings) from this one tensor; observers keep what they saw."""
        if self.fitted is not None:
            self.fitted.fit(self.rows(x), self.layout.real(x))
            return
        if not self.dynamic:
            self.range.set(*self._choose(*self.measure(x), self.scale_shape))
        self.start_rounding(x)

    @torch.no_grad()
    def start_rounding(self, x: Tensor) -> None:
        """Let adaptive rounding start from the weight `x` itself: its fractions, which decided now round to nearest."""
        if self.adapts:
            scale, _ = self.qparams(x)
            v = self.rows(x).float() / scale.reshape(-1, 1)
            self.logits.copy_(self.layout.restore(rectified_logits(v - v.floor()), x.shape))

    @torch.no_grad()
    def decide_rounding(self) -> None:
        """Decide each adaptive rounding for good: up or down, whichever is closer, in training too."""
        ends = rectified_logits(torch.tensor([0.0, 1.0], dtype=torch.float32, device=self.logits.device))
        self.logits.copy_(torch.where(self.logits >= 0, ends[1], ends[0]))

    def _choose(self, low: Tensor, high: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the shape `shape` for observed ranges, [rows] each."""
        if self.scheme.format == "int":
            scale, zero_point = choose_qparams(
                low, high, int(self.quant_min), int(self.quant_max), self.scheme.symmetric
            )
            return scale.reshape(shape), zero_point.reshape(shape)
        largest = torch.maximum(-low.float(), high.float()).clamp(min=0)
        return self._grid_scale(largest.reshape(shape)), torch.zeros(shape, dtype=torch.float32, device=low.device)

    def _grid_scale(self, largest: Tensor) -> Tensor:
        grid, kind = self.grid, self.format
        assert grid is not None
        if kind.unit_scale:
            return torch.ones_like(largest)
        if self.local and kind.tensor_scale is not None:
            return kind.tensor_scale(largest, grid)
        if kind.scales is not None:
            return kind.scales(largest, grid)
        scale = largest / grid.high
        return torch.where(scale > SMALLEST_SCALE, scale, torch.ones_like(scale))

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) in use, of the scale's shape; a dynamic range reads the tensor `x`.

        So do the scales of blocks where their tensor's is kept (`local`), which is what they are without `x`.
        """
        if not self.dynamic and (x is None or not self.local):
            return self.range.qparams()
        if x is None:
            raise ValueError("a dynamic range has no scale of its own: pass the tensor")
        with torch.no_grad():
            if x.numel() == 0:
                one = torch.ones(self.layout.scale_shape(x.shape), dtype=torch.float32, device=x.device)
                return one, torch.zeros_like(one)
            shape = self.layout.scale_shape(x.shape)
            return self._local(x, shape) if self.local else self._choose(*self.measure(x), shape)

    def _local(self, x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the shape `shape`, of the blocks of a tensor whose scale is kept."""
        rows, of_blocks = self.rows(x), self.format.block_scales
        assert of_blocks is not None
        assert self.grid is not None
        largest = (rows.relu() if self.relu else rows.abs()).amax(dim=1)
        scale = of_blocks(largest.reshape(shape), self.range.qparams()[0], self.grid)
        return scale, torch.zeros_like(scale)

    @torch.no_grad()
    def scales(self, x: Tensor | None = None) -> Tensor:
        """The scales in use (for the weight `x`), for tables and plots; of a codebook, each row's largest entry."""
        if x is not None and isinstance(self.fitted, Mean):
            return self.fitted.integers(self.rows(x))[1]
        if self.fitted is not None:
            return self.fitted.values().abs().flatten(1).amax(dim=1)
        return self.qparams(x)[0]

    def forward(self, x: Tensor, site: int = 0, looks: bool = True) -> Tensor:
        """Fake-quantize `x` (any shape for activations, `shape` for weights) as the mode says; observe if it `looks`.

        Raises:
            ValueError: the input has NaN or infinity and the node is `watched`; names the tensor.
        """
        if self.watched:
            self._check_finite(x)
        if self.mode in (Mode.float, Mode.observe):
            if self.mode is Mode.observe and looks:
                self.observe(x, site)
            if self.adapts and self.training and torch.is_grad_enabled():
                self.start_rounding(x)  # weights still move as floats; the fractions are those when quantization starts
            return torch.relu(x) if self.relu else x
        moves = self.training and self.mode is Mode.quantize
        if self.fitted is not None:
            return in_order_of(x, self.layout.restore(self.fitted(self.rows(x), moves, self.layout.real(x)), x.shape))
        if self.plain and (taken := plain.plan(self, x)) is not None:
            return plain.quantize(self, x, taken, site, looks)
        if looks and self.follows:
            self.observe(x, site)
            self.set_range_from_observer()
        scale, zero_point = self.qparams(x)
        if self.mode is Mode.frozen:
            scale, zero_point = scale.detach(), zero_point.detach()
        by_rows = self.layout.by_rows or self.adapts or (self.grid is not None and self.scheme.format == "int")
        values = self.range.transform(self.rows(x)) if by_rows else x
        layout = dataclasses.replace(self.layout, kind="rows") if by_rows else self.layout
        with self._drawing(moves):
            y = self._quantize(values, layout.broadcast(scale, x), layout.broadcast(zero_point, x), moves)
        return in_order_of(x, self.layout.restore(y.to(x.dtype), x.shape)) if by_rows else y

    def grad_scale(self, x: Tensor, scale: Tensor) -> float:
        """What the gradient of a learned scale of `x` is multiplied by."""
        if not self.range.scaled:
            return 1.0
        features = x.numel() // max(scale.numel(), 1) if self.shape is not None else math.prod(x.shape[1:])
        return float(max(features, 1) * self.quant_max / self.range.options.unit) ** -0.5

    def _quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor, moves: bool) -> Tensor:
        """Values on the levels and back; scale and zero point broadcast against `x`."""
        scheme, grid, gradient = self.scheme, self.grid, GRADIENTS[self.scheme.gradient]
        if self.adapts:
            q = adaptive(x.float() / scale, self._rounding_logits(moves), soft=moves) + zero_point
            return ((q.clamp(self.quant_min, self.quant_max) - zero_point) * scale).to(x.dtype)
        grad_scale = self.grad_scale(x, scale)
        learned = scale.requires_grad
        plain = gradient.plain and self.range.residual and not zero_point.requires_grad
        if grid is None and plain:
            return fake_quantize(
                x, scale, zero_point, int(self.quant_min), int(self.quant_max), relu=self.relu,
                rounding=self.rounding_in_use, grad_scale=grad_scale if learned else None,
            )  # fmt: skip
        strengths = scheme.gradient_strength
        staircase = Staircase(
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            snap=None if grid is None else grid.snap,
            rounding=self.rounding_in_use,
            gradient=scheme.gradient,
            strength=gradient.strength_at(self.progress, (strengths[0], strengths[1]) if strengths else None),
            noise=gradient.noisy and moves,
            relu=self.relu,
            residual=self.range.residual,
        )
        return fake_quantize_by(x, scale, zero_point, staircase, grad_scale)

    def _drawing(self, moves: bool) -> AbstractContextManager[None]:
        """Where random numbers come from: the next ones of the scheme's seed; a repeated forward has the same again."""
        if self.scheme.rounding_seed is None or not moves:
            return nullcontext()
        if not recomputing():
            self.draws += 1
        return seeded(self._seed, self.draws)

    def _rounding_logits(self, moves: bool) -> Tensor:
        """What adaptive rounding has learned, as rows; in training with the gradient that makes it decide."""
        logits = self.logits if moves else self.logits.detach()
        return self.rows(penalized(logits, self.progress, self.scheme.rounding_penalty) if moves else logits)

    def _check_finite(self, x: Tensor) -> None:
        self.watched = False
        if bool(x.detach().sum().isfinite()):  # one pass; a sum may also overflow
            return
        bad = ~torch.isfinite(x.detach())
        if bool(bad.any()):
            nan = int(torch.isnan(x).sum())
            raise ValueError(
                f"tensor '{self.name}' has {nan} NaN and {int(bad.sum()) - nan} infinite of {x.numel()} values "
                f"(shape {list(x.shape)}, the first at {bad.nonzero()[0].tolist()})"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Let moves to another device pass, and casts to another dtype not: scales are float32 whatever the network is.

        `net.bfloat16()` would leave a scale three significant digits, and a moving average would stand still.
        """

        def keep(t: Tensor) -> Tensor:
            moved = fn(t)
            if t is self.progress and t.is_meta:  # no checkpoint has it
                return torch.zeros_like(moved)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep, recurse)

    def extra_repr(self) -> str:  # noqa: D102
        relu = ", relu" if self.relu else ""
        return f"{self.scheme.describe()}, [{self.quant_min:g}, {self.quant_max:g}]{relu}, mode={self.mode.value}"
