"""Functions of real numbers in ONNX: what each name of the runtime's FUNCTIONS is in operations.

Where ONNX's own operation means something else than torch's, or has no kernel in ONNX Runtime, it is written out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from qat.export.onnx_model import Model
from qat.runtime.functions import windows
from qat.runtime.layers import RuntimeLayer
from qat.runtime.network import Node
from qat.runtime.operations import Function


class Steps:
    """Writes operations that make one tensor, and names what is between them.

    Attributes:
        given: parameter -> name of its tensor, or its setting.
        source: the first input.
        shape, result: of the first input and of the result.
    """

    def __init__(self, model: Model, node: Node, given: dict[str, Any]) -> None:
        self.model, self.name, self.given, self.count = model, node.name, given, 0
        self.source = node.inputs[0]
        self.shape = list(model.shapes[self.source])
        self.result = list(model.shapes[node.name])

    def __call__(self, kind: str, *inputs: Any, **attributes: Any) -> str:
        """Append an operation; numbers among the inputs become constants. Returns the name of its result."""
        names = [self.number(x) if isinstance(x, int | float) else x for x in inputs]
        self.count += 1
        return self.model.op(kind, names, f"{self.name}.{kind}{self.count}", **attributes)

    def number(self, value: Any, dtype: Any = np.float32) -> str:
        """A constant."""
        self.count += 1
        return self.model.constant(f"{self.name}.constant{self.count}", value, dtype)

    def ints(self, *values: int) -> str:
        """A list of int64."""
        return self.number(list(values), np.int64)

    def get(self, parameter: str, default: Any = None) -> Any:
        """A parameter."""
        return self.given.get(parameter, default)

    def real(self, parameter: str) -> str:
        """A parameter that is a tensor, kept from being computed with in integers (`Model.in_float`)."""
        return self.model.in_float(self.given[parameter], f"{self.name}.{parameter}_in_float")

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """`x` in another shape; 0 copies, -1 infers."""
        return self("Reshape", x, self.ints(*shape))

    def slice(self, x: str, axis: int, start: int, stop: int, step: int = 1) -> str:
        """`x[start:stop:step]` along one axis."""
        return self("Slice", x, *(self.ints(v) for v in (start, stop, axis, step)))

    @property
    def rank(self) -> int:
        """Of the first input."""
        return len(self.shape)


Emit = Callable[[Steps], str]


def function(model: Model, node: Node, layer: RuntimeLayer) -> None:
    """Write a Function.

    Raises:
        ValueError: ONNX has no operations for it.
    """
    assert isinstance(layer, Function)
    given: dict[str, Any] = dict(zip(layer.inputs, node.inputs, strict=True)) | layer.settings
    given |= {k: model.constant(f"{node.name}.{k}", layer.constant(k)) for k in layer.constants}
    finish_steps(model, node, layer, Steps(model, node, given), FUNCTIONS[layer.name])


def finish_steps(model: Model, node: Node, layer: RuntimeLayer, steps: Steps, emit: Emit) -> None:
    """Let `emit` write its operations; the last makes the layer's tensor, or what is quantized to it."""

    def write(output: str) -> str:
        last = emit(steps)
        assert model.nodes[-1].output[0] == last
        model.nodes[-1].output[0] = output
        return output

    model.finish(layer, node.name, write)


def _unary(kind: str) -> Emit:
    return lambda s: s(kind, s.get("input"))


def _binary(kind: str) -> Emit:
    return lambda s: s(kind, s.get("input"), s.get("other"))


def _scaled(kind: str, first: str, second: str) -> Emit:
    """`first + alpha * second`, or its difference."""

    def emit(s: Steps) -> str:
        a, b, alpha = s.get(first), s.get(second), s.get("alpha", 1)
        return s(kind, a, b if alpha == 1 else s("Mul", b, float(alpha)))

    return emit


def _clamp(s: Steps) -> str:
    x = s.real("input")
    for kind, parameter in (("Max", "min"), ("Min", "max")):
        if s.get(parameter) is not None:
            x = s(kind, x, s.get(parameter))
    return x if x != s.get("input") else s("Identity", x)


def _clip(low: float | None = None, high: float | None = None) -> Emit:
    return lambda s: s("Clip", s.real("input"), s.get("min_val", low), s.get("max_val", high))


def _glu(s: Steps) -> str:
    """Half of the values, times the sigmoid of the other half."""
    axis = s.get("dim")
    half = s.shape[axis] // 2
    return s("Mul", s.slice(s.get("input"), axis, 0, half), s("Sigmoid", s.slice(s.get("input"), axis, half, 2 * half)))


def _mish(s: Steps) -> str:
    return s("Mul", s.get("input"), s("Tanh", s("Softplus", s.get("input"))))


def _prelu(s: Steps) -> str:
    slope = s.get("weight")
    return s("PRelu", s.get("input"), s.reshape(slope, [-1, *[1] * (s.rank - 2)]) if s.rank > 2 else slope)


def _softplus(s: Steps) -> str:
    beta = s.get("beta", 1)
    return s("Softplus", s.get("input")) if beta == 1 else (
        s("Div", s("Softplus", s("Mul", s.get("input"), beta)), beta)
    )  # fmt: skip


def _masked(s: Steps) -> str:
    return s("Where", s.get("mask"), s.get("value"), s.get("input"))


def _add_mask(s: Steps) -> str:
    scores, mask = s.get("scores"), s.get("mask")
    boolean = s.model.dtypes.get(mask) == torch.bool
    return s("Where", mask, scores, -math.inf) if boolean else s("Add", scores, mask)


def _mask_out(s: Steps) -> str:
    scores, mask = s.get("scores"), s.get("mask")
    boolean = s.model.dtypes.get(mask) == torch.bool
    if len(s.model.shapes[mask]) == 3 and s.rank == 4:
        mask = s.reshape(mask, [-1, *s.shape[1:]])
    return s("Where", mask, -math.inf, scores) if boolean else s("Add", scores, mask)


def _causal(s: Steps) -> str:
    later = np.triu(np.ones(s.shape[-2:], dtype=bool), 1)
    return s("Where", s.number(later, np.bool_), -math.inf, s.get("scores"))


def _pad(s: Steps) -> str:
    pads = s.get("pad")  # of the last dimension first
    ends = [[0] * (s.rank - len(pads) // 2) + pads[side::2][::-1] for side in (0, 1)]
    return s("Pad", s.get("input"), s.ints(*ends[0], *ends[1]), s.get("value"))


def _einsum(s: Steps) -> str:
    operands = [name for parameter, name in s.given.items() if parameter.startswith("operand")]
    return s("Einsum", *operands, equation=s.get("equation").replace(" ", ""))


def _sum(s: Steps) -> str:
    dims = s.get("dim")
    axes = s.ints(*(dims if isinstance(dims, list) else [dims]))
    return s("ReduceSum", s.real("input"), axes, keepdims=int(s.get("keepdim")))


def _arg(kind: str) -> Emit:
    """The first place of an extreme along a dimension."""

    def emit(s: Steps) -> str:
        if s.get("dim") is None:
            raise ValueError(f"'{s.name}': the place in the whole batch cannot be written to ONNX; give dim=")
        return s(kind, s.get("input"), axis=s.get("dim"), keepdims=int(s.get("keepdim")))

    return emit


def _max_places(s: Steps) -> str:
    """ONNX counts places in the whole batch, torch in each image."""
    dims = len(s.get("kernel_size"))
    shape, stride, padding, dilation = (
        value if isinstance(value, list) else [value] * dims
        for value in (s.get(name) for name in ("kernel_size", "stride", "padding", "dilation"))
    )
    window = {"kernel_shape": shape, "strides": stride if None not in stride else shape, "pads": padding * 2,
              "dilations": dilation, "ceil_mode": int(s.get("ceil_mode"))}  # fmt: skip
    places = s("MaxPool", s.get("input"), unread=1, **window)
    return s("Mod", places, s.ints(math.prod(s.shape[-dims:])))


# ---- normalisation ---------------------------------------------------------------------------------------------------


def _ones(s: Steps, parameter: str, shape: Any, value: float = 1.0) -> str:
    """A parameter, or what stands for it where it was left out."""
    return s.get(parameter) or s.number(np.full(shape, value))


def _layer_norm(s: Steps) -> str:
    shape, eps = s.get("normalized_shape"), s.get("eps")
    scale, shift = _ones(s, "weight", shape), _ones(s, "bias", shape, 0)
    return s("LayerNormalization", s.get("input"), scale, shift, axis=-len(shape), epsilon=eps)


def _rms_norm(s: Steps) -> str:
    x, axes = s.get("input"), range(-len(s.get("normalized_shape")), 0)
    mean = s("ReduceMean", s("Mul", x, x), s.ints(*axes), keepdims=1)
    eps = s.get("eps") or torch.finfo(torch.float32).eps
    y = s("Div", x, s("Sqrt", s("Add", mean, eps)))
    return s("Mul", y, s.get("weight")) if s.get("weight") else y


def _group_norm(s: Steps) -> str:
    groups, column = s.get("num_groups"), [-1, *[1] * (s.rank - 2)]
    x = s.reshape(s.get("input"), [0, groups, -1])
    unit = [s.number(np.full(groups, value)) for value in (1, 0)]
    y = s.reshape(s("InstanceNormalization", x, *unit, epsilon=s.get("eps")), [0, *s.shape[1:]])
    for kind, parameter in (("Mul", "weight"), ("Add", "bias")):
        if s.get(parameter):
            y = s(kind, y, s.reshape(s.get(parameter), column))
    return y


def _instance_norm(s: Steps) -> str:
    if not s.get("use_input_stats"):
        return _batch_norm(s)
    channels, eps = s.shape[1], s.get("eps")
    scale, shift = _ones(s, "weight", channels), _ones(s, "bias", channels, 0)
    return s("InstanceNormalization", s.get("input"), scale, shift, epsilon=eps)


def _batch_norm(s: Steps) -> str:
    channels = s.shape[1]
    scale, shift = _ones(s, "weight", channels), _ones(s, "bias", channels, 0)
    statistics = s.get("running_mean"), s.get("running_var")
    return s("BatchNormalization", s.get("input"), scale, shift, *statistics, epsilon=s.get("eps"))


def _normalize(s: Steps) -> str:
    kinds = {1: "ReduceL1", 2: "ReduceL2"}
    if s.get("p") not in kinds:
        raise ValueError(f"'{s.name}': ONNX has no norm of order {s.get('p')}; 1 and 2 can be written")
    norm = s(kinds[s.get("p")], s.get("input"), s.ints(s.get("dim")), keepdims=1)
    return s("Div", s.get("input"), s("Max", norm, s.get("eps")))


# ---- pooling and interpolation ---------------------------------------------------------------------------------------


def _lp_pool(dims: int) -> Emit:
    """Torch's sum is of `x ** p`, ONNX's of `|x| ** p`."""

    def emit(s: Steps) -> str:
        p, kernel, stride = (s.get(name) for name in ("norm_type", "kernel_size", "stride"))
        kernel = kernel if isinstance(kernel, list) else [kernel] * dims
        stride = kernel if stride is None else stride if isinstance(stride, list) else [stride] * dims
        power = s("Pow", s.get("input"), float(p))
        mean = s("AveragePool", power, kernel_shape=kernel, strides=stride, ceil_mode=int(s.get("ceil_mode")))
        total = s("Mul", s("Mul", s("Sign", mean), s("Relu", s("Abs", mean))), float(math.prod(kernel)))
        return s("Pow", total, 1 / p)

    return emit


def adaptive_average(s: Steps) -> str:
    """Equal windows are an average pooling; others a product with a matrix of weights, one dimension at a time."""
    x, outputs, spatial = s.get("input"), s.result[2:], s.shape[2:]
    if all(n % m == 0 for n, m in zip(spatial, outputs, strict=True)):
        kernel = [n // m for n, m in zip(spatial, outputs, strict=True)]
        x = s.real("input") if s.model.network.layer(s.name).output is None else x
        return s("AveragePool", x, kernel_shape=kernel, strides=kernel)
    for axis, (size, output) in enumerate(zip(spatial, outputs, strict=True), start=2):
        weights = np.zeros((size, output))
        for i, (start, stop) in enumerate(windows(size, output)):
            weights[start:stop, i] = 1 / (stop - start)
        perm = list(range(s.rank))
        perm[axis], perm[-1] = perm[-1], perm[axis]
        x = s("Transpose", s("MatMul", s("Transpose", x, perm=perm), s.number(weights)), perm=perm)
    return x


def interpolate(s: Steps) -> str:
    """Resize. Where torch is given a factor, positions come from it and not from the ratio of sizes.

    Raises:
        ValueError: antialiasing, which ONNX Runtime filters in another way.
    """
    mode, corners = s.get("mode"), s.get("align_corners")
    if s.get("antialias"):
        raise ValueError(f"'{s.name}': antialiased interpolation cannot be written to ONNX; use antialias=False")
    if mode == "area":
        return adaptive_average(s)
    x, spatial = s.get("input"), s.rank - 2
    if mode == "linear":  # ONNX Runtime interpolates images
        x = s.reshape(x, [0, s.shape[1], 1, s.shape[2]])
    attributes: dict[str, Any] = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    if mode in ("nearest", "nearest-exact"):
        exact = mode == "nearest-exact"
        attributes = {"mode": "nearest", "nearest_mode": "round_prefer_ceil" if exact else "floor",
                      "coordinate_transformation_mode": "half_pixel" if exact else "asymmetric"}  # fmt: skip
    elif mode == "bicubic":
        attributes |= {"mode": "cubic", "cubic_coeff_a": -0.75}
    if corners:
        attributes["coordinate_transformation_mode"] = "align_corners"
    factor = s.get("scale_factor")
    if factor is None or s.get("recompute_scale_factor"):
        ratios = [m / n for m, n in zip(s.result[2:], s.shape[2:], strict=True)]
        exact_sizes = True
    else:
        ratios = list(factor) if isinstance(factor, list) else [factor] * spatial
        exact_sizes = False
    lead = [1.0, 1.0] + ([1.0] if mode == "linear" else [])
    if exact_sizes:
        axes = list(range(len(lead), len(lead) + spatial))
        y = s("Resize", x, "", "", s.ints(*s.result[2:]), axes=axes, **attributes)
    else:
        y = s("Resize", x, "", s.number([*lead, *map(float, ratios)]), **attributes)
    return s.reshape(y, [0, s.result[1], s.result[2]]) if mode == "linear" else y


FUNCTIONS: dict[str, Emit] = {
    "add": _scaled("Add", "input", "other"), "sub": _scaled("Sub", "input", "other"),
    "rsub": _scaled("Sub", "other", "input"), "mul": _binary("Mul"), "div": _binary("Div"),
    "matmul": _binary("MatMul"), "einsum": _einsum, "pow": lambda s: s("Pow", s.get("input"), s.get("exponent")),
    "where": lambda s: s("Where", s.get("condition"), s.get("input"), s.get("other")), "masked_fill": _masked,
    "pad": _pad, "add_mask": _add_mask, "mask_out": _mask_out, "causal": _causal,
    "relu6": _clip(0, 6), "hardtanh": _clip(), "sigmoid": _unary("Sigmoid"), "tanh": _unary("Tanh"),
    "gelu": lambda s: s("Gelu", s.get("input"), approximate=s.get("approximate", "none")),
    "silu": lambda s: s("Mul", s.get("input"), s("Sigmoid", s.get("input"))), "mish": _mish,
    "hardswish": _unary("HardSwish"), "hardsigmoid": lambda s: s("HardSigmoid", s.get("input"), alpha=1 / 6, beta=0.5),
    "leaky_relu": lambda s: s("LeakyRelu", s.get("input"), alpha=s.get("negative_slope")),
    "selu": _unary("Selu"), "celu": lambda s: s("Celu", s.get("input"), alpha=float(s.get("alpha"))),
    "softsign": _unary("Softsign"), "logsigmoid": lambda s: s("Neg", s("Softplus", s("Neg", s.get("input")))),
    "glu": _glu, "sin": _unary("Sin"), "cos": _unary("Cos"), "maximum": _binary("Max"), "minimum": _binary("Min"),
    "elu": lambda s: s("Elu", s.get("input"), alpha=float(s.get("alpha"))), "prelu": _prelu, "softplus": _softplus,
    "softmax": lambda s: s("Softmax", s.real("input"), axis=s.get("dim")),
    "log_softmax": lambda s: s("LogSoftmax", s.get("input"), axis=s.get("dim")),
    "clamp": _clamp, "neg": _unary("Neg"), "abs": _unary("Abs"), "exp": _unary("Exp"), "log": _unary("Log"),
    "sqrt": _unary("Sqrt"), "rsqrt": lambda s: s("Reciprocal", s("Sqrt", s.get("input"))),
    "square": lambda s: s("Mul", s.get("input"), s.get("input")), "sum": _sum,
    "argmax": _arg("ArgMax"), "argmin": _arg("ArgMin"), "max_places": _max_places,
    "layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm, "instance_norm": _instance_norm,
    "batch_norm": _batch_norm, "normalize": _normalize,
    "lp_pool1d": _lp_pool(1), "lp_pool2d": _lp_pool(2), "lp_pool3d": _lp_pool(3),
    "adaptive_avg_pool": adaptive_average,
    "interpolate": interpolate,
    "gt": _binary("Greater"), "ge": _binary("GreaterOrEqual"), "lt": _binary("Less"), "le": _binary("LessOrEqual"),
    "eq": _binary("Equal"), "ne": lambda s: s("Not", s("Equal", s.get("input"), s.get("other"))),
    "logical_not": _unary("Not"),
}  # fmt: skip
"""Name of a function -> what writes it."""
