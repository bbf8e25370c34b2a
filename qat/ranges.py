"""Where a quantizer's scale and zero point come from. RANGES is the table that configurations choose from.

Calibration gives every range a start (`set`). From there it stays (`fixed`), follows the training batches (`running`),
is computed anew from each tensor (`dynamic`), or is learned by the optimizer, each method in its own parameters. The
gradient of scale and zero point is `qat.numerics.gradients`'; here are the formulas from a method's parameters to them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from qat.numerics.affine import SMALLEST_SCALE
from qat.numerics.formats import Grid
from qat.numerics.rounding import round_ste, straight_through, with_gradient


@dataclass(frozen=True, kw_only=True)
class RangeOptions:
    """What a range is told.

    Attributes:
        shape: of the scale.
        quant_min, quant_max: the smallest and largest level, in units of the scale.
        unit: learned scales are kept times this, so that they are of one size for all formats: that of an integer's.
        decay: weight of the L2 term of `pact`.
    """

    shape: tuple[int, ...]
    quant_min: float
    quant_max: float
    unit: float = 1.0
    decay: float = 0.0


class Range(nn.Module):
    """Base.

    Attributes:
        learned: the optimizer moves it.
        follows: training batches go on moving it.
        dynamic: it has no state; the quantizer computes it from the tensor at hand.
        scaled: the gradient of its parameters is multiplied by `1 / sqrt(values * quant_max)`.
        residual: the scale's gradient takes part in rounding (LSQ), not only in clipping.
        kept: the tensor `scale` is the scale in use, but for its sign.
        affine: it needs a zero point (true), cannot have one (false), or takes either (None).
        formats: the kinds of format that it is defined for: "any", or "int".
        roles: the tensors that it is made for.
        tables: it also says what becomes of a table of fitted levels: it stays, or is learned.
        ratios: scales are powers of two or constants, so that those of different tensors stand in simple ratios, and
            what is computed of several lies on exact ties.
        odd: weights are squashed as a whole onto odd integers, without zero (`transform`, `weight_grid`: DoReFa).
    """

    learned: ClassVar[bool] = False
    follows: ClassVar[bool] = False
    dynamic: ClassVar[bool] = False
    scaled: ClassVar[bool] = False
    residual: ClassVar[bool] = True
    kept: bool = False
    affine: ClassVar[bool | None] = None
    formats: ClassVar[str] = "any"
    roles: ClassVar[tuple[str, ...]] = ("weight", "activation")
    tables: ClassVar[bool] = False
    ratios: ClassVar[bool] = False
    odd: ClassVar[bool] = False

    def __init__(self, options: RangeOptions) -> None:
        super().__init__()
        self.fit(options)

    def fit(self, options: RangeOptions) -> None:
        """Take other ends of the grid: the scale stays, what depends on the ends follows."""
        self.options = options

    @property
    def calibrated(self) -> bool:
        """Whether a range is known."""
        return not any(bool(t.isnan().any()) for t in (*self.parameters(), *self.buffers()))

    def set(self, scale: Tensor, zero_point: Tensor) -> None:
        """Start from what an observed range gives."""
        raise NotImplementedError

    def qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point), of the scale's shape; scale > 0, differentiable where learned."""
        raise NotImplementedError

    def transform(self, rows: Tensor) -> Tensor:
        """What is quantized in place of the values, shape [rows, values]."""
        return rows

    @staticmethod
    def weight_grid(bits: int) -> Grid | None:
        """Levels of its own in place of the format's, for weights."""
        return None

    def _nan(self) -> Tensor:
        return torch.full(self.options.shape, torch.nan, dtype=torch.float32)


class Fixed(Range):
    """Set by calibration; stays.

    Source: Wu et al. 2020, "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation",
    section 3.4 (calibration).
    """

    kept = True
    tables = True
    scale: Tensor
    zero_point: Tensor

    def __init__(self, options: RangeOptions) -> None:
        super().__init__(options)
        self.register_buffer("scale", self._nan())
        self.register_buffer("zero_point", torch.zeros(options.shape, dtype=torch.float32))

    def set(self, scale: Tensor, zero_point: Tensor) -> None:  # noqa: D102
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def qparams(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.scale, self.zero_point


class Running(Fixed):
    """Set by calibration; training batches keep updating it until ranges are frozen.

    Source: Jacob et al. 2018, section 3.1.
    """

    follows = True
    tables = False


class Dynamic(Range):
    """Computed from the tensor at hand at every use. The natural choice for weights, whose values are all known.

    Source: Jacob et al. 2018, section 3.1 (weights); Yao et al. 2022, "ZeroQuant", section 4.1 (activations, with a
    scale a token).
    """

    dynamic = True

    @property
    def calibrated(self) -> bool:  # noqa: D102
        return True

    def set(self, scale: Tensor, zero_point: Tensor) -> None:
        """Nothing to keep."""


class Lsq(Fixed):
    """The scale is a parameter.

    Its gradient is `round(v) - v` inside the range and the bound outside, times `1 / sqrt(values * quant_max)`.

    Source: Esser et al. 2020, "Learned Step Size Quantization", equation 3 and section 2.2.
    """

    learned = scaled = tables = True

    def __init__(self, options: RangeOptions) -> None:
        super().__init__(options)
        del self.scale
        self.scale = nn.Parameter(self._nan())
        self.kept = options.unit == 1

    def set(self, scale: Tensor, zero_point: Tensor) -> None:  # noqa: D102
        super().set(scale * self.options.unit, zero_point)

    def qparams(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        return positive(self.scale) / self.options.unit, self.zero_point


class LsqPlus(Range):
    """Scale and offset are parameters: the number `offset` lies at integer 0, `x = scale * q + offset`.

    The zero point is `round(-offset / scale)`, straight through, so that zero stays exactly representable and integer
    runtimes can compute it; the paper leaves the offset a real number.

    Source: Bhalgat et al. 2020, "LSQ+: Improving low-bit quantization through learnable offsets", equations 5 to 8.
    """

    learned = scaled = True
    affine = True
    formats = "int"

    def __init__(self, options: RangeOptions) -> None:
        super().__init__(options)
        self.scale, self.offset = nn.Parameter(self._nan()), nn.Parameter(self._nan())

    def set(self, scale: Tensor, zero_point: Tensor) -> None:  # noqa: D102
        self.scale.copy_(scale)
        self.offset.copy_(-zero_point * scale)

    def qparams(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        scale = positive(self.scale)
        raw = -self.offset / scale
        zero_point = raw.detach().round().clamp(self.options.quant_min, self.options.quant_max)
        return scale, straight_through(raw, zero_point)


class Pact(Range):
    """The clip `alpha` is a parameter, with a gradient from clipped values alone: 1 above it, 0 below.

    Nothing but an L2 term pulls it down; the gradient has that term's, `2 decay alpha`, as if it stood in the loss.
    Signed tensors are clipped at both ends.

    Source: Choi et al. 2018, "PACT: Parameterized Clipping Activation for Quantized Neural Networks", equations 1 to 3
    and section 3.2 (L2 term).
    """

    learned = True
    residual = False
    affine = False
    roles = ("activation",)

    def __init__(self, options: RangeOptions) -> None:
        super().__init__(options)
        self.alpha = nn.Parameter(self._nan())
        self.register_buffer("zero_point", torch.zeros(options.shape, dtype=torch.float32))

    def set(self, scale: Tensor, zero_point: Tensor) -> None:  # noqa: D102
        self.alpha.copy_(scale * self.options.quant_max)

    def qparams(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        alpha = with_gradient(self.alpha, 2 * self.options.decay * self.alpha.detach())
        return positive(alpha / self.options.quant_max), self.get_buffer("zero_point")


class Tqt(Range):
    """The logarithm of a threshold is a parameter; the scale is the power of two at or above it.

    `scale = 2 ** ceil(log2 t) / 2 ** (bits - 1)` (unsigned: `2 ** bits`), with a straight-through ceiling, so that
    `dscale / dlog2 t = scale ln 2`. Requantization is a shift.

    Source: Jain et al. 2020, "Trained Quantization Thresholds for Accurate and Efficient Fixed-Point Inference",
    equations 4 to 8.
    """

    learned = ratios = True
    affine = False
    formats = "int"

    def __init__(self, options: RangeOptions) -> None:
        super().__init__(options)
        self.log2_threshold = nn.Parameter(self._nan())
        self.register_buffer("zero_point", torch.zeros(options.shape, dtype=torch.float32))

    def fit(self, options: RangeOptions) -> None:  # noqa: D102
        super().fit(options)
        self.levels = 2 ** math.ceil(math.log2(options.quant_max + 1))

    def set(self, scale: Tensor, zero_point: Tensor) -> None:  # noqa: D102
        self.log2_threshold.copy_(torch.log2(scale * self.options.quant_max))

    def qparams(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        exponent = round_ste(self.log2_threshold, "ceil") - math.log2(self.levels)
        return torch.exp2(exponent.clamp(-126.0, 127.0)), self.get_buffer("zero_point")


class Dorefa(Range):
    """A constant range: activations are clipped to [0, 1] (signed tensors to [-1, 1]), weights squashed into [-1, 1].

    Weights: `2 quantize(tanh(w) / (2 max |tanh(w)|) + 1/2) - 1` with `quantize(r) = round(n r) / n`, `n = 2 ** bits - 1`:
    the levels are the odd multiples of `1 / n`, without zero.

    Source: Zhou et al. 2016, "DoReFa-Net", equations 5, 9 and 11.
    """  # noqa: E501

    affine = False
    formats = "int"
    odd = ratios = True

    def __init__(self, options: RangeOptions) -> None:
        super().__init__(options)
        self.register_buffer("scale", torch.full(options.shape, 1.0 / options.quant_max, dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros(options.shape, dtype=torch.float32))

    def fit(self, options: RangeOptions) -> None:  # noqa: D102
        super().fit(options)
        if "scale" in self._buffers:
            self.get_buffer("scale").fill_(1.0 / options.quant_max)

    def set(self, scale: Tensor, zero_point: Tensor) -> None:
        """The range is a constant."""

    def qparams(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.get_buffer("scale"), self.get_buffer("zero_point")

    def transform(self, rows: Tensor) -> Tensor:  # noqa: D102
        squashed = torch.tanh(rows.float())
        largest = squashed.abs().amax(dim=1, keepdim=True)
        return squashed / torch.where(largest > 0, largest, torch.ones_like(largest))

    @staticmethod
    def weight_grid(bits: int) -> Grid:  # noqa: D102
        n = 2**bits - 1
        return Grid(low=-n, high=n, snap=partial(_snap_odd, n=n), bits=bits, levels=partial(_odd, n))


def _snap_odd(v: Tensor, rounding: Callable[[Tensor], Tensor], *, n: int) -> Tensor:
    """The odd numbers from -n to n."""
    return (2 * rounding((v + n) / 2) - n).clamp(-n, n)


def _odd(n: int) -> Tensor:
    return torch.arange(-n, n + 1, 2, dtype=torch.float32)


def positive(scale: Tensor) -> Tensor:
    """What a learned scale is used as: its magnitude, never zero."""
    return scale.abs().clamp(min=SMALLEST_SCALE)


RANGES: dict[str, type[Range]] = {
    "fixed": Fixed,
    "running": Running,
    "dynamic": Dynamic,
    "learned": Lsq,
    "lsq": Lsq,
    "lsq_plus": LsqPlus,
    "pact": Pact,
    "tqt": Tqt,
    "dorefa": Dorefa,
}
"""Name -> where the range comes from; `learned` is LSQ."""
