"""Random small networks: a recipe of steps, each of which reads earlier values of the network.

A value is a volume [C, D, H, W], an image [C, H, W], a signal [C, L], a sequence of vectors [T, D], or a vector [D],
each behind a batch dimension. STEPS says which steps a value of each shape can take.
"""

import contextlib
import itertools
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4
Shape = tuple[int, ...]


class Step(NamedTuple):
    """What is computed, in words and as a function of the network, of which earlier values (-1: the newest)."""

    words: str
    compute: Callable[..., Tensor]
    reads: tuple[int, ...] = (-1,)


class Network(nn.Module):
    """Runs the steps of a recipe, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.more: tuple[int, ...] = ()
        self.parts = nn.ModuleDict()

    def add(self, module: nn.Module) -> str:
        """The name under which a step finds `module`."""
        name = f"{type(module).__name__.lower()}{len(self.parts)}"
        self.parts[name] = module
        return name

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.outputs_of([x])

    def outputs_of(self, values: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """The newest value, and earlier ones where `more` asks for them."""
        for step in self.steps:
            values.append(step.compute(self, *(values[i] for i in step.reads)))
        return (values[-1], *(values[i] for i in self.more)) if self.more else values[-1]


class OfTwo(Network):
    """Of two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        return self.outputs_of([x, y])


class DegenerateError(Exception):
    """Nearly one number, as the mean of what was normalized is: nothing but float32's own rounding is left.

    Engines leave other digits of it. Parity says so where it finds one (`tests/test_exact_sums.py`).
    """


class Builder:
    """Draws a network; the shapes of its values come from running it.

    Args:
        rng: everything is drawn from it.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.floats = {"volume": (rng.choice((1, 2)), 4, rng.randint(4, 5), 4),
                       "image": (rng.choice((1, 2, 3)), rng.randint(5, 8), rng.randint(5, 8)),
                       "signal": (rng.choice((2, 3)), rng.randint(8, 16)),
                       "sequence": (rng.randint(3, 6), rng.choice((4, 6))),
                       "vector": (rng.randint(4, 10),)}  # fmt: skip
        self.kind = rng.choice(
            (
                "image",
                "image",
                "image",
                "signal",
                "signal",
                "sequence",
                "sequence",
                "vector",
                "indices",
                "volume",
                "bags",
            )
        )
        self.two = self.kind in self.floats and rng.random() < 0.15
        self.net = OfTwo() if self.two else Network()
        self.values: list[Tensor] = []

    # ---- what steps are made of -------------------------------------------------------------------------------------

    def one(self, choices: Sequence[Any]) -> Any:
        return self.rng.choice(choices)

    def step(self, words: str, compute: Callable[..., Tensor], *reads: int) -> None:
        """Append a step, and run it."""
        step = Step(words, compute, reads or (-1,))
        with torch.no_grad():
            self.values.append(compute(self.net, *(self.values[i] for i in step.reads)))
        made, read = self.values[-1], self.values[-2]
        if made.std() == 0 or (read.is_floating_point() and made.std() < 0.02 * read.std()):
            raise DegenerateError(words)
        assert made.isfinite().all(), words
        self.net.steps.append(step)

    def module(self, module: nn.Module, *reads: int) -> str:
        """Append a call of a new module."""
        name = self.net.add(module)
        self.step(repr(module).split("\n")[0], lambda net, x: net.parts[name](x), *reads)
        return name

    @property
    def shape(self) -> Shape:
        """Of the newest value, without the batch dimension."""
        return tuple(self.values[-1].shape[1:])

    # ---- the network ------------------------------------------------------------------------------------------------

    def build(self, inputs: tuple[Tensor, ...]) -> Network:
        self.values = list(inputs)
        if self.kind == "indices":
            self.module(nn.Embedding(int(inputs[0].max()) + 1, self.one((4, 6))))
            self.kind = "sequence"
        elif self.kind == "bags":
            self.module(nn.EmbeddingBag(int(inputs[0].max()) + 1, self.one((4, 6)), mode=self.one(("sum", "mean"))))
            self.kind = "vector"
        elif self.two:
            joined = self.one((torch.add, torch.sub, torch.mul))
            self.step(f"{joined.__name__} of both inputs", lambda net, x, y: joined(x, y), 0, 1)
        for _ in range(self.rng.randint(2, 6)):
            steps = STEPS[self.kind]
            steps[self.rng.randrange(len(steps))](self)
        if self.rng.random() < 0.9 or not any(p.dim() > 1 for p in self.net.parameters()):
            self.head()
        made = range(len(inputs), len(self.values) - 1)
        if made and self.rng.random() < 0.15:
            self.net.more = (self.one(made),)
        return self.net

    def head(self) -> None:
        if self.kind in ("volume", "image", "signal"):
            dims = tuple(range(2, self.values[-1].dim()))
            how = self.one(("mean", "flatten", "pool"))
            if how == "mean":
                self.step(f"mean over {dims}", lambda net, x: x.mean(dims))
            elif how == "pool":
                self.module((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[len(dims) - 1](1))
            if how != "mean":
                self.step("flatten", lambda net, x: torch.flatten(x, 1))
        elif self.kind == "sequence":
            how = self.one(("mean", "last", "flatten"))
            function = {"mean": lambda net, x: x.mean(1), "last": lambda net, x: x[:, -1],
                        "flatten": lambda net, x: x.flatten(1)}[how]  # fmt: skip
            self.step(f"{how} of sequence", function)
        self.module(nn.Linear(self.shape[0], CLASSES, bias=self.one((True, False))))


# ---- steps -----------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "relu method": lambda x: x.relu(), "relu6": F.relu6, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "gelu": F.gelu, "gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "mish": F.mish,
    "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "hardtanh": lambda x: F.hardtanh(x, -0.7, 1.2),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1), "elu": F.elu, "softplus": F.softplus,
    "softmax": lambda x: x.softmax(-1), "log_softmax": lambda x: x.log_softmax(1), "clamp": lambda x: x.clamp(-0.5, 2),
    "clamp below": lambda x: x.clamp(min=0.1), "neg": operator.neg, "abs": torch.abs,
    "exp": lambda x: torch.exp(-x.abs()),
    "log": lambda x: torch.log(x.abs() + 1), "sqrt": lambda x: (x.abs() + 0.1).sqrt(), "square": torch.square,
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 1), "pow": lambda x: x**2, "normalize": lambda x: F.normalize(x, dim=-1),
    "times a number": lambda x: x * 0.5, "one minus": lambda x: 1 - x,
}  # fmt: skip
MODULES: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, lambda: nn.ReLU(inplace=True), nn.ReLU6, nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.PReLU, nn.Softplus, lambda: nn.Softmax(-1), nn.Identity,
    lambda: nn.Dropout(0.1),
)  # fmt: skip


def activation(b: Builder) -> None:
    if b.one((True, False)):
        b.module(b.one(MODULES)())
    else:
        name = b.one(list(ACTIVATIONS))
        b.step(name, lambda net, x: ACTIVATIONS[name](x))


def maybe(b: Builder, step: Callable[[Builder], None]) -> None:
    if b.one((True, False)):
        step(b)


def batch_norm(b: Builder) -> None:
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(b.shape)]
    b.module(normed(b, kind(b.shape[0], affine=b.one((True, True, False)))))


def normed(b: Builder, norm: Any) -> nn.Module:
    """Gains of both signs, offsets and statistics that are not those of the start."""
    generator = torch.Generator().manual_seed(b.rng.randrange(2**31))
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, -1, 1.5, generator=generator)
        nn.init.normal_(norm.bias, std=0.3, generator=generator)
    if getattr(norm, "running_mean", None) is not None:
        nn.init.normal_(norm.running_mean, std=0.3, generator=generator)
        nn.init.uniform_(norm.running_var, 0.3, 1.5, generator=generator)
    return norm


def new_convolution(b: Builder, channels: int | None = None, same: bool = False) -> nn.Module:
    """A convolution of the newest value; `same` keeps its height and width."""
    c, rank = b.shape[0], len(b.shape) - 1
    kernel, dilation = b.one((1, 3)), b.one((1, 1, 2))
    groups = b.one((1, 1, c))
    out = channels or groups * b.one((1, 2)) if groups > 1 else channels or b.one((2, 3, 4, 6))
    groups = groups if out % groups == 0 else 1
    padding = dilation * (kernel // 2)
    if not same and min(b.shape[1:]) > dilation * (kernel - 1):
        padding = b.one((0, padding))
    stride = 1 if same else b.one((1, 1, 2))
    modes = ("zeros", "zeros", "reflect", "replicate", "circular")
    mode = b.one(modes) if padding < min(b.shape[1:]) else "zeros"
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](
        c, out, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=b.one((True, False)),
        padding_mode=mode,
    )  # fmt: skip


def convolution(b: Builder) -> None:
    b.module(new_convolution(b))
    maybe(b, batch_norm)
    maybe(b, activation)


def transposed(b: Builder) -> None:
    if max(b.shape[1:]) > 16:
        convolution(b)
        return
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[len(b.shape) - 2]
    groups = b.one((1, b.shape[0]))
    stride = b.one((1, 2))
    b.module(kind(b.shape[0], groups * b.one((1, 2)), b.one((2, 3)), stride=stride, padding=b.one((0, 1)),
                  output_padding=stride - 1, groups=groups, bias=b.one((True, False))))  # fmt: skip
    maybe(b, batch_norm)
    maybe(b, activation)


def pooling(b: Builder) -> None:
    if min(b.shape[1:]) < 3:
        activation(b)
        return
    i = len(b.shape) - 2
    average = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[i]
    largest = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[i]
    choices: tuple[Callable[[], nn.Module], ...] = (
        lambda: largest(2), lambda: largest(3, 2, 1, ceil_mode=True), lambda: average(2), lambda: average(3, 1, 1),
        lambda: average(3, 2, 1, count_include_pad=False),
        lambda: (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[i](2),
        lambda: (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)[i](3),
    )  # fmt: skip
    b.module(b.one(choices)())


def branch(b: Builder) -> int:
    """Another value of the newest one's shape, beside it; where the newest one now is."""
    before = len(b.values) - 1
    if len(b.shape) == 1 or b.kind == "sequence":
        b.module(nn.Linear(b.shape[-1], b.shape[-1]))
    else:
        b.module(new_convolution(b, channels=b.shape[0], same=True))
        maybe(b, batch_norm)
    maybe(b, activation)
    return before


def residual(b: Builder) -> None:
    before = branch(b)
    words = b.one(("+", "torch.add", "-", "in place"))
    compute = {"+": operator.add, "torch.add": torch.add, "-": operator.sub, "in place": lambda x, y: x.add(y)}[words]
    b.step(words, lambda net, x, y: compute(x, y), before, -1)
    maybe(b, activation)


def concatenation(b: Builder) -> None:
    before = branch(b)
    dim = -1 if b.kind == "sequence" else 1
    b.step(f"cat {dim}", lambda net, x, y: torch.cat([x, y], dim), before, -1)


def product(b: Builder) -> None:
    before = branch(b)
    gate = b.one((torch.sigmoid, torch.tanh, None))
    b.step(f"times {gate}", lambda net, x, y: x * (gate(y) if gate else y), before, -1)


def excite(b: Builder) -> None:
    before = len(b.values) - 1
    dims = tuple(range(2, len(b.shape) + 1))
    b.step("mean", lambda net, x: x.mean(dims, keepdim=True))
    b.module((nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(dims) - 1](b.shape[0], b.shape[0], 1))
    gate = b.one((torch.sigmoid, F.hardsigmoid))
    b.step("excite", lambda net, x, y: x * gate(y), before, -1)


def same_layer_twice(b: Builder) -> None:
    vectors = len(b.shape) == 1 or b.kind == "sequence"
    name = b.module(
        nn.Linear(b.shape[-1], b.shape[-1]) if vectors else new_convolution(b, channels=b.shape[0], same=True)
    )
    activation(b)
    b.step(f"{name} again", lambda net, x: net.parts[name](x))


def moves(b: Builder) -> None:
    choices: list[tuple[str, Callable[[Any, Tensor], Tensor]]] = [
        ("flip", lambda net, x: x.flip(-1)), ("roll", lambda net, x: torch.roll(x, 1, 1)),
        ("repeat", lambda net, x: torch.cat([x, x], -1)), ("x[..., 1:]", lambda net, x: x[..., 1:]),
        ("unsqueeze, squeeze", lambda net, x: x.unsqueeze(1).squeeze(1)),
        ("pad", lambda net, x: F.pad(x, (1, 1))),
    ]  # fmt: skip
    if len(b.shape) == 3:
        choices += [("transpose", lambda net, x: x.transpose(2, 3)), ("permute", lambda net, x: x.permute(0, 1, 3, 2)),
                    ("nearest", lambda net, x: F.interpolate(x, scale_factor=2)),
                    ("bilinear", lambda net, x: F.interpolate(x, scale_factor=2, mode="bilinear"))]  # fmt: skip
        if b.shape[0] % 4 == 0:
            choices.append(("pixel shuffle", lambda net, x: F.pixel_shuffle(x, 2)))
    if b.shape[0] % 2 == 0:
        choices += [("chunk", lambda net, x: operator.add(x.chunk(2, 1)[0], x.chunk(2, 1)[1])),
                    ("x[:, ::2]", lambda net, x: x[:, ::2])]  # fmt: skip
    if b.shape[-1] < 4:
        choices = [c for c in choices if c[0] != "x[..., 1:]"]
    if max(b.shape) > 16:
        choices = [c for c in choices if c[0] not in ("repeat", "nearest", "bilinear", "pad", "pixel shuffle")]
    b.step(*b.one(choices))


def norm(b: Builder) -> None:
    c = b.shape[0]
    if b.kind == "sequence" or len(b.shape) == 1:
        b.module(normed(b, nn.LayerNorm(b.shape[-1])) if b.one((True, False)) else nn.RMSNorm(b.shape[-1]))
    elif b.one((True, False)):
        b.module(normed(b, nn.GroupNorm(b.one([g for g in (1, 2, 3) if c % g == 0]), c)))
    else:
        b.module(
            (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[len(b.shape) - 2](c)
            if min(b.shape[1:]) > 1
            else nn.ReLU()
        )


def to_sequence(b: Builder) -> None:
    b.step("image to sequence", lambda net, x: x.flatten(2).transpose(1, 2))
    b.kind = "sequence"


def to_signal(b: Builder) -> None:
    b.step("sequence to signal", lambda net, x: x.transpose(1, 2))
    b.kind = "signal"


def to_vector(b: Builder) -> None:
    b.step("flatten", lambda net, x: x.reshape(x.shape[0], -1))
    b.kind = "vector"


def linear(b: Builder) -> None:
    b.module(nn.Linear(b.shape[-1], b.one((3, 4, 6, 8)), bias=b.one((True, True, False))))
    if b.kind == "vector":
        maybe(b, batch_norm)
    maybe(b, activation)


def attention(b: Builder) -> None:
    width, how = b.shape[-1], b.one(("matmul", "sdpa", "module", "einsum"))
    if how == "module":
        name = b.net.add(nn.MultiheadAttention(width, b.one([h for h in (1, 2) if width % h == 0]), batch_first=True))
        b.step("attention module", lambda net, x: net.parts[name](x, x, x, need_weights=False)[0])
        return
    name = b.net.add(nn.Linear(width, 3 * width))

    def compute(net: Any, x: Tensor) -> Tensor:
        q, k, v = net.parts[name](x).chunk(3, -1)
        if how == "sdpa":
            return F.scaled_dot_product_attention(q, k, v)
        scores = q @ k.transpose(1, 2) if how == "matmul" else torch.einsum("bqd,bkd->bqk", q, k)
        return (scores * width**-0.5).softmax(-1) @ v

    b.step(f"attention by {how}", compute)


def recurrent(b: Builder) -> None:
    kind = b.one((nn.LSTM, nn.GRU, nn.RNN))
    name = b.net.add(kind(b.shape[-1], b.one((3, 4)), batch_first=True, bidirectional=b.one((True, False))))
    b.step(f"{kind.__name__}", lambda net, x: net.parts[name](x)[0])


def encoder(b: Builder) -> None:
    # Of four or six numbers, rows with hardly any variance would be common. ONNX Runtime makes one
    # SkipLayerNormalization of an addition and the LayerNorm behind it, which seems to take the variance as that of
    # two large numbers (up to 6 steps were seen; the cause is inferred).
    b.module(nn.Linear(b.shape[-1], 12))
    b.module(nn.TransformerEncoderLayer(12, b.one((1, 2, 3)), 8, 0.0, b.one(("relu", "gelu")), batch_first=True,
                                        norm_first=b.one((True, False))))  # fmt: skip


_SPATIAL = (convolution,) * 5 + (transposed, pooling, pooling, residual, residual, concatenation, product, excite,
            same_layer_twice, moves, norm, activation, batch_norm, to_vector)  # fmt: skip
STEPS: dict[str, tuple[Callable[[Builder], None], ...]] = {
    "volume": _SPATIAL, "image": (*_SPATIAL, to_sequence), "signal": _SPATIAL,
    "sequence": (linear, linear, linear, attention, attention, residual, concatenation, product, same_layer_twice,
                 moves, norm, activation, recurrent, encoder, to_signal, to_vector),
    "vector": (linear, linear, linear, residual, concatenation, product, same_layer_twice, activation, batch_norm,
               norm),
}  # fmt: skip
"""Kind of value -> steps, those that are drawn more often several times."""


def random_network(seed: int, samples: int = 32) -> tuple[Network, tuple[Tensor, ...]]:
    """(network in evaluation mode, inputs)."""
    for attempt in itertools.count():
        torch.manual_seed(seed)
        with contextlib.suppress(DegenerateError):
            return _drawn(random.Random(f"{seed} {attempt}"), samples)
    raise AssertionError


def _drawn(rng: random.Random, samples: int) -> tuple[Network, tuple[Tensor, ...]]:
    builder = Builder(rng)
    inputs: tuple[Tensor, ...]
    if builder.kind in ("indices", "bags"):
        inputs = (torch.randint(0, 12, (samples, 5)),)
    else:
        spread, offset = builder.rng.choice((0.1, 1, 1, 5)), builder.rng.choice((0, 0, 0.5, -2))
        shape = (samples, *builder.floats[builder.kind])
        inputs = tuple(torch.randn(shape) * spread + offset for _ in range(1 + builder.two))
    net = builder.build(inputs)
    return net.eval(), inputs
