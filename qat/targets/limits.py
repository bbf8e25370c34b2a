"""What a target is: the kernels that it has for each type of layer, and what it does around them. Data, no code."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FAMILIES: dict[str, tuple[str, ...]] = {
    "convolution": ("Conv1d", "Conv2d", "Conv3d"),
    "transposed convolution": ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
    "linear": ("Linear", "NonDynamicallyQuantizableLinear"),
    "bilinear": ("Bilinear",),
    "embedding": ("Embedding", "EmbeddingBag"),
    "lstm": ("LSTM", "LSTMCell"),
    "recurrent": ("GRU", "GRUCell", "RNN", "RNNCell"),
}
"""Kind of layer -> the types, as rules name them (`type:Conv2d`)."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a kernel takes as one of its operands.

    Attributes:
        formats: format -> bits; empty: it takes floats.
        symmetric: whether the zero point is 0; None for either way.
        signed: whether integers have a sign; None for either.
        narrow: whether 8-bit integers leave out -128, as any other's smallest; None for either.
        granularities: names of `Granularity`, the usual one first.
        group_sizes: of granularity `group`; empty for any.
        ranges: `static` ranges are known before the network runs, `dynamic` ones are computed from what is at hand.
        why: the reason of the limit, for messages.
    """

    formats: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    symmetric: bool | None = None
    signed: bool | None = None
    narrow: bool | None = None
    granularities: tuple[str, ...] = ("tensor",)
    group_sizes: tuple[int, ...] = ()
    ranges: Literal["any", "static", "dynamic"] = "any"
    why: str = ""

    @property
    def quantized(self) -> bool:
        """Whether it takes quantized values at all."""
        return bool(self.formats)

    def describe(self) -> str:
        """One phrase for tables.

        >>> Limits(formats={"int": (4, 8)}, symmetric=True, granularities=("channel", "tensor")).describe()
        'int 4, 8; symmetric; channel, tensor'
        """
        if not self.formats:
            return "float"
        formats = ", ".join(
            f"int {_span(bits)}" if name == "int" else name if len(bits) == 1 else f"{name} {_span(bits)}"
            for name, bits in self.formats.items()
        )
        words = {"symmetric": {True: "symmetric", False: "affine"}, "signed": {True: "signed", False: "unsigned"},
                 "narrow": {True: "without -128"}}  # fmt: skip
        notes = [words[name].get(getattr(self, name), "") for name in words]
        groups = f" of {', '.join(map(str, self.group_sizes))}" if self.group_sizes else ""
        where = ", ".join(self.granularities).replace("group", f"group{groups}")
        return "; ".join(filter(None, [formats, *notes, where, self.ranges.replace("any", "")]))


def _span(bits: tuple[int, ...]) -> str:
    whole = len(bits) > 2 and list(bits) == list(range(bits[0], bits[-1] + 1))
    return f"{bits[0]}-{bits[-1]}" if whole else ", ".join(map(str, bits))


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """One way in which an engine computes a layer.

    Attributes:
        name: the engine's own name for it.
        weight: what it takes as weights.
        activation: what it takes as inputs; None: anything, as it does not read them quantized.
        integers: whether it multiplies integers; else it multiplies floats that it has dequantized.
        stored: what the file format of its engine calls its weights, where there is one (`qat.targets.vllm`).
    """

    name: str
    weight: Limits
    activation: Limits | None
    integers: bool = True
    stored: str = ""


FLOAT = Limits()
"""An operand in float."""

IN_FLOAT = Kernel(name="in float", weight=FLOAT, activation=None, integers=False)

ELEMENTWISE = frozenset({"sigmoid", "tanh", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "leaky_relu", "elu",
                         "prelu", "softplus", "selu", "celu", "logsigmoid", "softsign", "glu"})  # fmt: skip
NORMS = ("softmax", "log_softmax", "layer_norm", "rms_norm", "group_norm", "instance_norm")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One deployment target.

    Attributes:
        description: one sentence.
        layers: key of FAMILIES -> the kernels for its layers, the usual one first; `default` for all others.
        prefers: `weight` and `activation` -> fields of their schemes that a preset leaves open.
        operations: operations beside layers that read integers: `add`, `average` (average pooling) and names of CALLS
            that are arithmetic of two tensors. The engine computes the others in float, so they get no quantizers.
        function_inputs: functions (names of CALLS) in front of which the engine needs a quantizer, or the layer before
            them would run in float. Where there are no floats at all, every function needs one.
        bounds: function -> ends of its result, where the engine gives 8-bit results a scale of its own.
        keeps_float: functions that it computes in float, for reports.
        float_layers: layers that stay float where no rule names them, as a rule's `match` has it.
        graph: `QuantConfig.graph` of a preset.
        formats: of exported files, unless others are asked for; keys of EXPORTERS.
        pairs: whether its ONNX file holds each tensor on a grid as a pair, QuantizeLinear and DequantizeLinear of int8
            or float8 with zero point 0 and nothing in between, around operations on real numbers; else as integers.
        requantize: how an accumulator becomes the next layer's integer: `float`, by a float32 scale, or `fixed_point`,
            by an int32 multiplier and a shift.
        functions: how GELU, softmax, LayerNorm and the like are computed: in `float`, or in `integer`s of what is on a
            grid (tables, integer square roots), so that a quantizer stands in front of them.
        onnxruntime_options: session options under which ONNX Runtime computes this target exactly. The usual one takes
            its exact kernels, which take more than twice the time of the fast ones.
        exact_with_vnni: the options are left out on a processor with VNNI, whose fast kernels are exact.
        source: where the facts come from.
    """

    description: str
    layers: Mapping[str, tuple[Kernel, ...]]
    prefers: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    operations: frozenset[str] = frozenset({"add", "average", "sub", "mul", "div", "matmul", "einsum"})
    function_inputs: frozenset[str] = frozenset()
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    keeps_float: tuple[str, ...] = ()
    float_layers: tuple[str, ...] = ()
    graph: str = "auto"
    formats: tuple[str, ...] = ("int8", "onnx")
    pairs: bool = False
    requantize: Literal["float", "fixed_point"] = "float"
    functions: Literal["float", "integer"] = "float"
    onnxruntime_options: Mapping[str, str] = field(default_factory=lambda: {"session.x64quantprecision": "1"})
    exact_with_vnni: bool = False
    source: str = ""

    def kernels(self, layer_type: str) -> tuple[Kernel, ...]:
        """The kernels for a type of layer (`Conv2d`, as rules name it)."""
        family = next((name for name, types in FAMILIES.items() if layer_type in types), "default")
        return self.layers.get(family, self.layers["default"])

    @property
    def usual(self) -> tuple[Kernel, ...]:
        """The kernels for what most networks are made of: the default's, and those of linear layers."""
        return tuple(dict.fromkeys((*self.layers["default"], *self.layers.get("linear", ()))))

    @property
    def ties(self) -> Literal["even", "up"]:
        """Which way exact ties are rounded where it requantizes: as `affine.quantize` and `fixed_point` do it."""
        return "up" if self.requantize == "fixed_point" else "even"

    @property
    def rounding(self) -> str:
        """The same in words."""
        return {"even": "halves to even", "up": "halves up"}[self.ties]

    @property
    def weight_bits(self) -> int:
        """The widest integer weight of its usual kernel."""
        return max(self.layers["default"][0].weight.formats["int"])
