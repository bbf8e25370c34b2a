"""What a quantization scheme does to a standard Gaussian, measured: the curves that pictures show, and the noise."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.fake_quant import FakeQuantize
from qat.fitted import Codebook, Product, Table, Ternary
from qat.mode import Mode
from qat.numerics.codebook import assign
from qat.numerics.formats.fitted import THRESHOLD
from qat.numerics.gradients import GRADIENTS
from qat.numerics.rounding import ROUNDING
from qat.ranges import RANGES
from qat.scheme import Granularity, TensorScheme

WEIGHT = (256, 64, 3, 3)
"""A convolution of 256 output channels, each with 576 weights."""
BATCH = (4, 576)
"""A batch of activations: 4 tokens of 576 channels."""
REACH = 4.0
"""Curves are drawn over so many standard deviations to either side."""
CLOUD = 4000
"""Points of a cloud."""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """What is drawn of a scheme.

    Attributes:
        x: inputs, ascending.
        y: dequantized outputs, by the median of the scales.
        ideal: what outputs would be without rounding and clipping: `x` itself, unless the method squashes weights.
        gradients: d y / d x that training sees, by label; the label is empty where there is but one.
        clip: smallest and largest value of the grid.
        levels: values that the output takes in evaluation, within the picture.
        random: whether equal inputs can give different outputs: points, not a line.
    """

    x: Tensor
    y: Tensor
    ideal: Tensor
    gradients: dict[str, Tensor]
    clip: tuple[float, float]
    levels: Tensor
    random: bool = False


@dataclass(frozen=True, kw_only=True)
class Curve(Lines):
    """A scheme on a standard Gaussian.

    Attributes:
        text: the scheme in words.
        notes: what one should know to read the picture.
        sqnr_db: signal to quantization noise, with every scale that the scheme has.
        width: bits that a value's code takes in storage.
        bits: the same, with the value's share of scales and tables.
    """

    text: str
    notes: tuple[str, ...]
    sqnr_db: float
    width: float
    bits: float


def sqnr_db(x: Tensor, x_dq: Tensor) -> float:
    """Signal to quantization noise, `10 log10(sum x^2 / sum (x_dq - x)^2)`; infinite where there is no noise."""
    noise = float((x_dq - x).double().square().sum())
    return 10 * math.log10(float(x.double().square().sum()) / noise) if noise else math.inf


def measure(scheme: TensorScheme, part: str, points: int = 4001, seed: int = 0) -> Curve:
    """Quantize a standard Gaussian by a scheme, as training does, after calibration.

    Args:
        scheme: quantized.
        part: `weight`, `activation` or `input`.
        points: inputs of the curves.
        seed: of the sample, and of random rounding (torch's generators are left as they were).

    Raises:
        ValueError: the scheme does not fit the sample's shape.
    """
    weight = part == "weight"
    shape = WEIGHT if weight else BATCH
    if scheme.axis is not None and not -len(shape) <= scheme.axis < len(shape):
        raise ValueError(f"quant.{part}.axis={scheme.axis}: the sample has the shape {list(shape)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _measure(scheme, part, points)


def words(scheme: TensorScheme) -> str:
    """The scheme in words, with rounding and gradient where they are not the usual ones."""
    text = scheme.describe()
    if scheme.rounding != "nearest":
        text += f", {scheme.rounding}"
    return text if GRADIENTS[scheme.gradient].plain else f"{text}, {scheme.gradient}"


def _measure(scheme: TensorScheme, part: str, points: int) -> Curve:
    sample = torch.randn(WEIGHT)
    batches = [sample] if part == "weight" else list(sample.reshape(-1, *BATCH))
    text, notes = words(scheme), []
    if ROUNDING[scheme.rounding].learned:
        notes.append("adaptive rounding has learned nothing yet: drawn as nearest")
        scheme = dataclasses.replace(scheme, rounding="nearest")
    if scheme.signed is False and scheme.symmetric:
        notes.append("no negative levels: measured on relu(x)")
        batches = [batch.relu() for batch in batches]
    quantizer = _calibrated(scheme, part, batches)
    with torch.no_grad():
        stored = torch.stack([quantizer(batch) for batch in batches])
        target = torch.stack([_target(quantizer, batch) for batch in batches])
        random = ROUNDING[scheme.rounding].settled is not None or GRADIENTS[scheme.gradient].noisy
        if random:
            settled = torch.stack([quantizer.eval()(batch) for batch in batches])
            notes.append(f"as in training; evaluation rounds to nearest, SQNR {sqnr_db(target, settled):.2f} dB")
        seen = batches if quantizer.dynamic else batches[:1]
        scales = torch.cat([quantizer.scales(batch).flatten() for batch in seen])
    if quantizer.grid is not None and scheme.format == "int":
        notes.append("the noise is what differs from tanh(w) / max |tanh(w)|, the dotted line")
    if isinstance(quantizer.fitted, Product):
        drawn = _vectors(quantizer, sample, stored[0])
        notes.append(
            f"vectors of {scheme.group_size} have no transfer curve: each point is a weight and what is stored"
        )
    elif quantizer.fitted is not None:
        drawn = _fitted(quantizer, sample, scales, points)
    else:
        drawn = _staircase(quantizer, part, batches, points)
    if len(scales.unique()) > 1 and not isinstance(quantizer.fitted, Product):
        notes.append(f"drawn with the median of {len(scales):,} scales")
    if random:
        drawn = dataclasses.replace(drawn, random=True)
    return Curve(
        **vars(drawn), text=text, notes=tuple(notes), sqnr_db=sqnr_db(target, stored), width=_width(quantizer),
        bits=_width(quantizer) + _shared(quantizer, scales),
    )  # fmt: skip


def _calibrated(scheme: TensorScheme, part: str, batches: Sequence[Tensor]) -> FakeQuantize:
    """A quantizer of the scheme in training mode, calibrated; its range is not moved by what is measured."""
    scheme = dataclasses.replace(scheme, range="fixed") if RANGES[scheme.range].follows else scheme
    if part == "weight":
        quantizer = FakeQuantize(scheme, batches[0].shape)
        quantizer.set_range_from(batches[0])
    else:
        quantizer = FakeQuantize(scheme, activation=BATCH)
        if not quantizer.dynamic:
            for batch in batches:
                quantizer.observe(batch)
            quantizer.set_range_from_observer()
    quantizer.mode = Mode.quantize
    return quantizer


def _target(quantizer: FakeQuantize, x: Tensor) -> Tensor:
    """What rounding starts from: `x`, unless the method transforms weights first."""
    if quantizer.shape is None:
        return x
    return quantizer.layout.restore(quantizer.range.transform(quantizer.rows(x)), x.shape)


def _width(quantizer: FakeQuantize) -> float:
    """Bits of a value's code."""
    width = quantizer.fitted.values().shape[2] if isinstance(quantizer.fitted, Product) else 1
    return (quantizer.scheme.bits or 32) / width


def _shared(quantizer: FakeQuantize, scales: Tensor) -> float:
    """Bits a value for what values share: scales of 32 bits (8 in block formats), tables of 32-bit entries."""
    if quantizer.format.unit_scale:
        return 0.0
    fitted, each = quantizer.fitted, 8 if quantizer.format.block else 32
    return each * (fitted.values().numel() if isinstance(fitted, Table) else len(scales)) / math.prod(WEIGHT)


def _staircase(quantizer: FakeQuantize, part: str, batches: Sequence[Tensor], points: int) -> Lines:
    """The curves of one scale: the median of the tensor's, in a quantizer of its own."""
    scale, zero_point = (torch.cat(found) for found in zip(
        *([t.detach().flatten() for t in quantizer.qparams(batch)] for batch in batches), strict=True
    ))  # fmt: skip
    middle = scale.argsort()[len(scale) // 2]
    one = dataclasses.replace(
        quantizer.scheme, granularity=Granularity.tensor, axis=None, group_size=None, block_size=None,
        range=quantizer.scheme.range if RANGES[quantizer.scheme.range].odd else "fixed",
    )  # fmt: skip
    step = 2 * REACH / (points - 1)
    x = torch.linspace(-REACH - step, REACH + step, points + 2)  # the ends carry what squashing owes to the largest
    drawn = FakeQuantize(one, x.shape if part == "weight" else None)
    drawn.range.set(scale[middle], zero_point[middle])
    drawn.mode = Mode.quantize
    gradients = {}
    rule = GRADIENTS[one.gradient]
    first, last = one.gradient_strength or rule.strengths or (1.0, 1.0)
    for progress, strength in [(0.0, first), (1.0, last)][: 1 + (first != last)]:
        drawn.progress.fill_(progress)
        for sign in (1, -1) if rule.by_sign else (1,):
            leaf = x.clone().requires_grad_()
            y = drawn(leaf)
            (gradient,) = torch.autograd.grad(y, leaf, torch.full_like(y, sign))
            label = f"{rule.symbol} = {strength:g}" if rule.symbol else ""
            label += f", g {'>' if sign > 0 else '<'} 0" if rule.by_sign else ""
            if label and first != last:
                label += f" ({'first' if progress == 0 else 'last'} step)"
            gradients[label] = sign * gradient[1:-1]
    with torch.no_grad():
        ideal, levels = _target(drawn, x), drawn.eval()(x).unique()
        ends = (torch.tensor([drawn.quant_min, drawn.quant_max]) - drawn.zero_point) * drawn.scale
    squashed = drawn.grid is not None and one.format == "int"  # nothing is clipped
    clip = (-math.inf, math.inf) if squashed else (float(ends[0]), float(ends[1]))
    return Lines(x=x[1:-1], y=y.detach()[1:-1], ideal=ideal[1:-1], gradients=gradients, clip=clip, levels=levels)


def _fitted(quantizer: FakeQuantize, sample: Tensor, scales: Tensor, points: int) -> Lines:
    """The levels of the row whose scale, or largest entry, is the median."""
    x = torch.linspace(-REACH, REACH, points)
    middle = int(scales.argsort()[len(scales) // 2])
    if isinstance(quantizer.fitted, Codebook):
        entries = quantizer.fitted.values()[middle : middle + 1]
        y = entries[0, assign(x.unsqueeze(0), entries)[0].long()]
    elif isinstance(quantizer.fitted, Ternary):
        threshold = THRESHOLD * quantizer.rows(sample)[middle].abs().mean()
        y = x.sign() * scales[middle] * (x.abs() > threshold)
    else:
        y = torch.where(x < 0, -scales[middle], scales[middle])
    levels = y.unique()
    clip = float(levels[0]), float(levels[-1])
    return Lines(x=x, y=y, ideal=x, gradients={"": torch.ones_like(x)}, clip=clip, levels=levels)


def _vectors(quantizer: FakeQuantize, sample: Tensor, stored: Tensor) -> Lines:
    x, order = sample.flatten()[:CLOUD].sort()
    y, levels = stored.flatten()[:CLOUD][order], stored.unique()
    clip = (-math.inf, math.inf)
    return Lines(x=x, y=y, ideal=x, gradients={"": torch.ones_like(x)}, clip=clip, levels=levels, random=True)
