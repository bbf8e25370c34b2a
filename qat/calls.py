"""What a call in a traced network is, whatever its form: CALLS maps modules, functions and methods to operations.

An operation is a name that the runtime knows, what it means for quantization, and torch's own parameters in order. A
module's settings are its attributes of the same names.
"""

import ast
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qat import lean
from qat.attention import add_mask, causal, mask_out, matmul
from qat.places import max_places
from qat.smoothing import scale_channels


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        name: key of the runtime's FUNCTIONS or MOVES.
        kind: name of a member of `qat.graph.Kind`: `passes`, `arithmetic`, `select` or `other`.
        parameters: names in torch's order; the first is the tensor. One that starts with `*` takes all that follow.
        defaults: of the parameters that may be left out.
    """

    name: str
    kind: str
    parameters: tuple[str, ...]
    defaults: dict[str, Any]

    def bind(self, node: fx.Node, module: nn.Module | None = None) -> dict[str, Any]:
        """Parameter -> what the call gives for it: a node, a number, a tensor of the module.

        Raises:
            ValueError: an argument that the operation does not have, or one that it lacks.
        """
        names = [name.lstrip("*") for name in self.parameters]
        given: dict[str, Any] = {}
        if module is not None:
            given = {n: getattr(module, n) for n in names[1:] if hasattr(module, n)}
            given[names[0]] = node.args[0] if node.args else next(iter(node.kwargs.values()))
        else:
            args = node.args[:1] if node.target is getattr else node.args
            for i, (parameter, value) in enumerate(zip(self.parameters, args, strict=False)):
                rest = args[i:]
                many = parameter.startswith("*") and not isinstance(value, list | tuple)
                given[names[i]] = tuple(rest) if many else value
            if len(args) > len(names) and not self.parameters[-1].startswith("*"):
                raise ValueError(f"'{node.name}': {len(args)} arguments, {self.name} takes {', '.join(names)}")
            unknown = {k for k, v in node.kwargs.items() if not (k == "out" and v is None)} - {*names, "inplace"}
            if unknown:
                raise ValueError(f"'{node.name}': {self.name} has no argument {', '.join(sorted(unknown))} here")
            given |= node.kwargs
        missing = set(names) - set(given) - set(self.defaults)
        if missing:
            raise ValueError(f"'{node.name}': {self.name} needs {', '.join(sorted(missing))}")
        return {name: given.get(name, self.defaults.get(name)) for name in names}


_TABLE: tuple[tuple[str, str, str, tuple[Any, ...]], ...] = (
    # ---- arithmetic of tensors (of a tensor and a number: `other`) --------------------------------------------------
    ("add", "add", "input other alpha=1", (operator.add, operator.iadd, torch.add, "add")),
    ("sub", "arithmetic", "input other alpha=1",
     (operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "subtract")),
    ("rsub", "other", "input other alpha=1", (torch.rsub,)),
    ("mul", "arithmetic", "input other", (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "multiply")),
    ("div", "arithmetic", "input other rounding_mode=None",
     (operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "divide", "true_divide")),
    ("matmul", "arithmetic", "input other", (operator.matmul, operator.imatmul, torch.matmul, "matmul", matmul)),
    ("matmul", "arithmetic", "input mat2", (torch.bmm, torch.mm, "bmm", "mm")),
    ("einsum", "arithmetic", "equation *operands", (torch.einsum,)),
    # ---- what moves or selects values -------------------------------------------------------------------------------
    ("transpose", "passes", "input dim0 dim1",
     (torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims")),
    ("transpose", "passes", "input dim0=-2 dim1=-1", ((getattr, "mT"),)),
    ("transpose", "passes", "input dim0=0 dim1=1", ((getattr, "T"), "t", torch.t)),
    ("movedim", "passes", "input source destination", (torch.movedim, torch.moveaxis, "movedim", "moveaxis")),
    ("squeeze", "passes", "input dim=None", (torch.squeeze, "squeeze")),
    ("unsqueeze", "passes", "input dim", (torch.unsqueeze, "unsqueeze")),
    ("flatten", "passes", "input start_dim=0 end_dim=-1", (torch.flatten, "flatten", nn.Flatten)),
    ("unflatten", "passes", "input dim sizes", (torch.unflatten, "unflatten")),
    ("unflatten", "passes", "input dim unflattened_size", (nn.Unflatten,)),
    ("expand", "passes", "input *sizes", ("expand",)),
    ("expand_as", "passes", "input other", ("expand_as",)),
    ("repeat", "passes", "input *sizes", ("repeat",)),
    ("repeat", "passes", "input *dims", (torch.tile, "tile")),
    ("select", "passes", "input dim index", (torch.select, "select")),
    ("narrow", "passes", "input dim start length", (torch.narrow, "narrow")),
    ("flip", "passes", "input *dims", (torch.flip, "flip")),
    ("roll", "passes", "input shifts dims", (torch.roll, "roll")),
    ("chunk", "passes", "input chunks dim=0", (torch.chunk, "chunk")),
    ("split", "passes", "tensor split_size_or_sections dim=0", (torch.split,)),
    ("split", "passes", "tensor split_size dim=0", ("split",)),
    ("unbind", "passes", "input dim=0", (torch.unbind, "unbind")),
    ("amax", "passes", "input dim=() keepdim=False", (torch.amax, "amax")),
    ("amin", "passes", "input dim=() keepdim=False", (torch.amin, "amin")),
    ("pixel_shuffle", "passes", "input upscale_factor", (F.pixel_shuffle, nn.PixelShuffle)),
    ("pixel_unshuffle", "passes", "input downscale_factor", (F.pixel_unshuffle, nn.PixelUnshuffle)),
    ("adaptive_max_pool", "passes", "input output_size return_indices=False",
     (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
      nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)),
    ("pad", "passes", "input pad mode='constant' value=None", (F.pad,)),
    ("max_unpool", "passes", "input indices kernel_size stride=None padding=0 output_size=None",
     (F.max_unpool1d, F.max_unpool2d, F.max_unpool3d)),
    ("masked_fill", "passes", "input mask value", (torch.masked_fill, "masked_fill")),
    ("where", "select", "condition input other", (torch.where,)),
    ("interpolate", "other",
     "input size=None scale_factor=None mode='nearest' align_corners=None recompute_scale_factor=None antialias=False",
     (F.interpolate, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)),
    # ---- functions of one tensor ------------------------------------------------------------------------------------
    ("relu6", "other", "input", (nn.ReLU6, F.relu6)),
    ("sigmoid", "other", "input", (nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid")),
    ("tanh", "other", "input", (nn.Tanh, torch.tanh, F.tanh, "tanh")),
    ("gelu", "other", "input approximate='none'", (nn.GELU, F.gelu, lean.GELU, lean.gelu)),
    ("silu", "other", "input", (nn.SiLU, F.silu, lean.SiLU, lean.silu)),
    ("mish", "other", "input", (nn.Mish, F.mish)),
    ("hardswish", "other", "input", (nn.Hardswish, F.hardswish)),
    ("hardsigmoid", "other", "input", (nn.Hardsigmoid, F.hardsigmoid)),
    ("hardtanh", "other", "input min_val=-1.0 max_val=1.0", (nn.Hardtanh, F.hardtanh)),
    ("leaky_relu", "other", "input negative_slope=0.01", (nn.LeakyReLU, F.leaky_relu)),
    ("elu", "other", "input alpha=1.0", (nn.ELU, F.elu)),
    ("selu", "other", "input", (nn.SELU, F.selu, torch.selu)),
    ("celu", "other", "input alpha=1.0", (nn.CELU, F.celu, torch.celu)),
    ("logsigmoid", "other", "input", (nn.LogSigmoid, F.logsigmoid)),
    ("softsign", "other", "input", (nn.Softsign, F.softsign)),
    ("glu", "other", "input dim=-1", (nn.GLU, F.glu)),
    ("prelu", "other", "input weight", (nn.PReLU, F.prelu, torch.prelu, "prelu")),
    ("softplus", "other", "input beta=1 threshold=20", (nn.Softplus, F.softplus)),
    ("softmax", "other", "input dim", (nn.Softmax,)),
    ("softmax", "other", "input dim _stacklevel=3 dtype=None", (F.softmax,)),
    ("softmax", "other", "input dim dtype=None", (torch.softmax, "softmax")),
    ("log_softmax", "other", "input dim", (nn.LogSoftmax,)),
    ("log_softmax", "other", "input dim _stacklevel=3 dtype=None", (F.log_softmax,)),
    ("log_softmax", "other", "input dim dtype=None", (torch.log_softmax, "log_softmax")),
    ("clamp", "other", "input min=None max=None", (torch.clamp, torch.clip, "clamp", "clip")),
    ("neg", "other", "input", (operator.neg, torch.neg, "neg")),
    ("abs", "other", "input", (abs, operator.abs, torch.abs, "abs")),
    ("exp", "other", "input", (torch.exp, "exp")),
    ("log", "other", "input", (torch.log, "log")),
    ("sqrt", "other", "input", (torch.sqrt, "sqrt")),
    ("rsqrt", "other", "input", (torch.rsqrt, "rsqrt")),
    ("square", "other", "input", (torch.square, "square")),
    ("sin", "other", "input", (torch.sin, "sin")),
    ("cos", "other", "input", (torch.cos, "cos")),
    ("maximum", "other", "input other", (torch.maximum, "maximum")),
    ("minimum", "other", "input other", (torch.minimum, "minimum")),
    ("pow", "other", "input exponent", (operator.pow, torch.pow, "pow")),
    ("sum", "other", "input dim keepdim=False", (torch.sum, "sum")),
    ("argmax", "other", "input dim=None keepdim=False", (torch.argmax, "argmax")),
    ("argmin", "other", "input dim=None keepdim=False", (torch.argmin, "argmin")),
    ("max_places", "other", "input kernel_size stride=None padding=0 dilation=1 ceil_mode=False", (max_places,)),
    # ---- normalisation ----------------------------------------------------------------------------------------------
    ("layer_norm", "other", "input normalized_shape weight=None bias=None eps=1e-05",
     (nn.LayerNorm, F.layer_norm, lean.LayerNorm, lean.layer_norm)),
    ("rms_norm", "other", "input normalized_shape weight=None eps=None", (nn.RMSNorm, F.rms_norm, torch.rms_norm)),
    ("group_norm", "other", "input num_groups weight=None bias=None eps=1e-05", (nn.GroupNorm, F.group_norm)),
    ("instance_norm", "other",
     "input running_mean=None running_var=None weight=None bias=None use_input_stats=True momentum=0.1 eps=1e-05",
     (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, F.instance_norm)),
    ("batch_norm", "other",
     "input running_mean running_var weight=None bias=None training=False momentum=0.1 eps=1e-05", (F.batch_norm,)),
    ("normalize", "other", "input p=2.0 dim=1 eps=1e-12", (F.normalize,)),
    # ---- pooling that makes new values ------------------------------------------------------------------------------
    ("lp_pool1d", "other", "input norm_type kernel_size stride=None ceil_mode=False", (F.lp_pool1d, nn.LPPool1d)),
    ("lp_pool2d", "other", "input norm_type kernel_size stride=None ceil_mode=False", (F.lp_pool2d, nn.LPPool2d)),
    ("lp_pool3d", "other", "input norm_type kernel_size stride=None ceil_mode=False", (F.lp_pool3d, nn.LPPool3d)),
    ("causal", "other", "scores", (causal,)),
    ("mul", "other", "input other", (scale_channels,)),
    ("add_mask", "other", "scores mask", (add_mask,)),
    ("mask_out", "other", "scores mask", (mask_out,)),
    # ---- masks ------------------------------------------------------------------------------------------------------
    ("gt", "other", "input other", (operator.gt, torch.gt, torch.greater, "gt")),
    ("ge", "other", "input other", (operator.ge, torch.ge, torch.greater_equal, "ge")),
    ("lt", "other", "input other", (operator.lt, torch.lt, torch.less, "lt")),
    ("le", "other", "input other", (operator.le, torch.le, torch.less_equal, "le")),
    ("eq", "other", "input other", (operator.eq, torch.eq, "eq")),
    ("ne", "other", "input other", (operator.ne, torch.ne, "ne")),
    ("logical_not", "other", "input", (operator.invert, torch.logical_not, "logical_not")),
)  # fmt: skip


def _read(name: str, kind: str, signature: str) -> Operation:
    parts = [part.partition("=") for part in signature.split()]
    return Operation(
        name,
        kind,
        tuple(parameter for parameter, _, _ in parts),
        {parameter: ast.literal_eval(value) for parameter, equals, value in parts if equals},
    )


CALLS: dict[Any, Operation] = {
    key: operation
    for name, kind, signature, keys in _TABLE
    for operation in [_read(name, kind, signature)]
    for key in keys
}
"""Module type, function, name of a method, or (getattr, attribute) -> the operation."""

SIZE_ATTRIBUTES = ("shape", "ndim", "dtype", "device")
"""Attributes of a tensor that are no tensors."""


def values_of(operation: Operation, bound: dict[str, Any]) -> list[fx.Node]:
    """The tensors among a call's arguments, one that it reads twice twice; the equation of an einsum is none."""
    found: list[fx.Node] = []
    for name in operation.parameters:
        value = bound[name.lstrip("*")]
        found += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, fx.Node)]
    return found
