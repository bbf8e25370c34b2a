"""FakeQuantize: one scheme on one tensor."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch
from torch import Tensor, nn

from qat.numerics.affine import SMALLEST_SCALE, choose_qparams
from qat.numerics.fake_quantize import fake_quantize
from qat.numerics.granularity import from_rows, group_count, rows_of
from qat.numerics.rounding import SETTLED
from qat.observers import OBSERVERS, ObserverOptions
from qat.scheme import Granularity, RangeMode, TensorScheme


class Mode(Enum):
    """What a FakeQuantize does. The mode is not a tensor: it is set from outside (`set_mode`), never by `forward`."""

    float = "float"
    """Pass through (an absorbed ReLU still applies)."""
    observe = "observe"
    """Pass through and record the range."""
    quantize = "quantize"
    """Fake-quantize; running ranges follow training batches, learned scales get gradients."""
    frozen = "frozen"
    """Fake-quantize with ranges as they are."""


class FakeQuantize(nn.Module):
    """Quantize-dequantize one tensor with straight-through gradients.

    Scale shape: [] (tensor), [out] (channel) or [out, groups] (group). It holds NaN until a range is known, so that a
    network that was never calibrated cannot pass for one that was.

    Args:
        scheme: how; `scheme.bits` must be set.
        shape: shape of the weight; None for an activation.
        nonnegative: values cannot be negative, so that a symmetric scheme of open sign takes an unsigned grid.
        relu: apply ReLU as part of quantization.
        sites: how many edges share this node (the inputs of a concatenation).
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        scheme: TensorScheme,
        shape: torch.Size | None = None,
        *,
        nonnegative: bool = False,
        relu: bool = False,
        sites: int = 1,
    ) -> None:
        super().__init__()
        self.scheme, self.shape, self.relu, self.sites = scheme, shape, relu, sites
        self.quant_min, self.quant_max = scheme.bounds(nonnegative or relu)
        self.mode = Mode.float
        scale_shape = self._scale_shape()
        self.observer = OBSERVERS[scheme.observer](
            ObserverOptions(
                rows=math.prod(scale_shape),
                sites=sites,
                symmetric=scheme.symmetric,
                quant_min=self.quant_min,
                quant_max=self.quant_max,
                percentiles=(scheme.percentiles[0], scheme.percentiles[1]),
                momentum=scheme.momentum,
                norm=scheme.norm,
                sigmas=scheme.sigmas,
            )
        )
        if scheme.range is not RangeMode.dynamic:
            scale = torch.full(scale_shape, torch.nan)
            if scheme.range is RangeMode.learned:
                self.scale = nn.Parameter(scale)
            else:
                self.register_buffer("scale", scale)
            self.register_buffer("zero_point", torch.zeros(scale_shape))

    def _scale_shape(self) -> tuple[int, ...]:
        if self.shape is None or self.scheme.granularity is Granularity.tensor:
            return ()
        if self.scheme.granularity is Granularity.channel:
            return (self.shape[0],)
        return (self.shape[0], group_count(self.shape, self._group_size))

    @property
    def _group_size(self) -> int:
        assert self.scheme.group_size is not None
        return self.scheme.group_size

    @property
    def calibrated(self) -> bool:
        """Whether a range is known."""
        return self.scheme.range is RangeMode.dynamic or not bool(self.scale.isnan().any())

    @property
    def rounding_in_use(self) -> str:
        """Key of ROUNDING: the scheme's; what stands in for it (SETTLED) once `frozen`, or in eval mode.

        So what is evaluated is what `fold` exports, although a random rounding never gives the same integers twice.
        """
        rounding = self.scheme.rounding
        settled = self.mode is Mode.frozen or not self.training
        return SETTLED.get(rounding, rounding) if settled else rounding

    def rows(self, x: Tensor) -> Tensor:
        """View `x` with one row a scale, shape [rows, values]."""
        if self.shape is None or self.scheme.granularity is Granularity.tensor:
            return x.reshape(1, -1)
        return rows_of(x, self.scheme.group_size)

    @torch.no_grad()
    def observe(self, x: Tensor, site: int = 0) -> None:
        """Record the range of `x` (after the absorbed ReLU). Empty tensors are ignored."""
        if x.numel():
            self.observer.update(self.rows(x.clamp(min=0) if self.relu else x), site)

    @torch.no_grad()
    def set_range_from_observer(self) -> None:
        """Take scale and zero point from what was observed. Raises RuntimeError when nothing was."""
        if self.scheme.range is not RangeMode.dynamic:
            self._set(*self.observer.range())

    @torch.no_grad()
    def set_range_from(self, x: Tensor) -> None:
        """Take scale and zero point from this one tensor; observers keep what they saw."""
        if self.scheme.range is not RangeMode.dynamic:
            self._set(*self.observer.measure(self.rows(x)))

    def _set(self, low: Tensor, high: Tensor) -> None:
        scale, zero_point = self._choose(low, high)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def _choose(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = choose_qparams(low, high, self.quant_min, self.quant_max, self.scheme.symmetric)
        shape = self._scale_shape()
        return scale.reshape(shape), zero_point.reshape(shape)

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) in use, of the scale shape; a dynamic range reads the tensor `x`."""
        if self.scheme.range is RangeMode.dynamic:
            if x is None:
                raise ValueError("a dynamic range has no scale of its own: pass the tensor")
            with torch.no_grad():
                return self._choose(*self.observer.measure(self.rows(x.detach())))
        if self.scheme.range is RangeMode.learned:
            return self.scale.abs().clamp(min=SMALLEST_SCALE), self.zero_point
        return self.scale, self.zero_point

    def forward(self, x: Tensor, site: int = 0) -> Tensor:
        """Fake-quantize `x` (any shape for activations, `shape` for weights) as the mode says."""
        if self.mode in (Mode.float, Mode.observe):
            if self.mode is Mode.observe:
                self.observe(x, site)
            return torch.relu(x) if self.relu else x
        if self.scheme.range is RangeMode.running and self.mode is Mode.quantize and self.training:
            self.observe(x, site)
            self.set_range_from_observer()
        scale, zero_point = self.qparams(x)
        learned = self.scheme.range is RangeMode.learned and self.mode is Mode.quantize
        if not learned:
            scale = scale.detach()
        features = math.prod(x.shape[1:]) if self.shape is None else x.numel() // max(scale.numel(), 1)
        grad_scale = (max(features, 1) * self.quant_max) ** -0.5 if learned else None
        grouped = self.shape is not None and self.scheme.granularity is Granularity.group
        y = fake_quantize(
            self.rows(x) if grouped else x,
            self._broadcast(scale, x),
            self._broadcast(zero_point, x),
            self.quant_min,
            self.quant_max,
            relu=self.relu,
            rounding=self.rounding_in_use,
            grad_scale=grad_scale,
        )
        return from_rows(y, x.shape) if grouped else y

    def _broadcast(self, scale: Tensor, x: Tensor) -> Tensor:
        if scale.dim() == 0:
            return scale
        return scale.reshape(-1, 1) if scale.dim() == 2 else scale.reshape(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:  # noqa: D102
        relu = ", relu" if self.relu else ""
        return f"{self.scheme.describe()}, [{self.quant_min}, {self.quant_max}]{relu}, mode={self.mode.value}"


def quantizers(net: nn.Module) -> Iterator[tuple[str, FakeQuantize]]:
    """Every FakeQuantize of a network with its module path."""
    return ((name, module) for name, module in net.named_modules() if isinstance(module, FakeQuantize))


def set_mode(net: nn.Module, mode: Mode | str) -> None:
    """Set the mode of every FakeQuantize in `net`.

    Args:
        net: a prepared network.
        mode: `float`, `observe`, `quantize` or `frozen`.

    Raises:
        ValueError: an unknown mode.
        RuntimeError: `quantize` or `frozen` before ranges are known; names the first such node.
    """
    try:
        mode = Mode(mode)
    except ValueError:
        raise ValueError(f"mode={mode!r} is not known (valid: {', '.join(m.value for m in Mode)})") from None
    if mode in (Mode.quantize, Mode.frozen):
        missing = [name for name, quantizer in quantizers(net) if not quantizer.calibrated]
        if missing:
            raise RuntimeError(
                f"{len(missing)} quantizers have no range yet, the first is '{missing[0]}'; "
                f"run qat.calibrate(net, batches) before mode '{mode.value}'"
            )
    for _, quantizer in quantizers(net):
        quantizer.mode = mode


@contextmanager
def eval_mode(*nets: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode; afterwards each is in the mode it was in."""
    training = {module: module.training for net in nets for module in net.modules()}
    for net in nets:
        net.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def get_mode(net: nn.Module) -> Mode:
    """The mode of a prepared network (of its first FakeQuantize); `float` when it has none."""
    return next((quantizer.mode for _, quantizer in quantizers(net)), Mode.float)
