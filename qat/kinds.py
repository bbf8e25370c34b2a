"""What an operation of a network means for quantization."""

import operator
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from qat.calls import CALLS
from qat.layers import SWAPS


class Kind(Enum):
    """What an operation means for quantization."""

    input = auto()
    structure = auto()  # tensors together: a dict that the network takes, a dataclass that it returns
    layer = auto()  # a quantized layer
    float_layer = auto()  # a layer that stays float
    batch_norm = auto()
    relu = auto()
    add = auto()
    concat = auto()
    arithmetic = auto()  # of two tensors, other than their sum
    select = auto()  # takes each value from one of two tensors
    result = auto()  # a part of what a recurrent layer returns
    average = auto()  # average pooling, mean, linear interpolation
    passes = auto()  # moves or selects values: the scale passes through
    constant = auto()  # a parameter or buffer that forward reads
    size = auto()  # sizes of tensors and what is computed of them: no tensor
    quantizer = auto()
    output = auto()
    other = auto()  # computed in float


KINDS: dict[Any, Kind] = {
    **{key: Kind[operation.kind] for key, operation in CALLS.items()},
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), Kind.batch_norm),
    **dict.fromkeys(SWAPS, Kind.float_layer),
    **dict.fromkeys((nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), Kind.relu),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), Kind.add),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate, torch.stack), Kind.concat),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d), Kind.average),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d), Kind.average),
    **dict.fromkeys((nn.AvgPool3d, nn.AdaptiveAvgPool3d, F.avg_pool3d, F.adaptive_avg_pool3d), Kind.average),
    **dict.fromkeys((torch.mean, "mean"), Kind.average),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), Kind.passes),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d), Kind.passes),
    **dict.fromkeys((torch.max_pool1d, torch.max_pool2d, torch.max_pool3d), Kind.passes),
    **dict.fromkeys((torch.reshape, torch.permute, operator.getitem), Kind.passes),
    **dict.fromkeys((pack_padded_sequence, pad_packed_sequence), Kind.passes),
    **dict.fromkeys((pack_sequence,), Kind.concat),
    **dict.fromkeys(("reshape", "view", "permute"), Kind.passes),
}

IDENTITIES = {
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    "contiguous", "clone", torch.clone, "cpu",
}  # fmt: skip
"""Operations that hand their input on when the network is evaluated."""

KINDS |= dict.fromkeys(IDENTITIES, Kind.passes)

WITH_PLACES: dict[Any, Any] = {
    F.max_pool1d_with_indices: F.max_pool1d, F.max_pool2d_with_indices: F.max_pool2d,
    F.max_pool3d_with_indices: F.max_pool3d, torch.max_pool1d_with_indices: F.max_pool1d,
    F.adaptive_max_pool1d_with_indices: F.adaptive_max_pool1d, torch.adaptive_max_pool1d: F.adaptive_max_pool1d,
    F.adaptive_max_pool2d_with_indices: F.adaptive_max_pool2d,
    F.adaptive_max_pool3d_with_indices: F.adaptive_max_pool3d,
    F.fractional_max_pool2d_with_indices: None, F.fractional_max_pool3d_with_indices: None,
}  # fmt: skip
"""Poolings that return (maxima, their places) -> the one that returns the maxima; modules have `return_indices`."""

SIZE_METHODS = ("size", "dim", "numel", "new_zeros", "new_ones")
"""Methods whose result depends on nothing but the size of the tensor."""

NONNEGATIVE = {"relu6", "sigmoid", "hardsigmoid", "softmax", "softplus", "abs", "exp", "square", "sqrt", "rsqrt"}
"""Operations (of CALLS) whose result cannot be negative."""

KEEPS_SIGN = {"mul", "div", "matmul", "einsum"}
"""Arithmetic whose result is not negative where no operand is."""

POINTWISE = {
    "add", "sub", "rsub", "mul", "div", "pow", "relu6", "sigmoid", "tanh", "gelu", "silu", "mish", "hardswish",
    "hardsigmoid", "hardtanh", "leaky_relu", "elu", "prelu", "softplus", "clamp", "neg", "abs", "exp", "log", "sqrt",
    "rsqrt", "square", "selu", "celu", "logsigmoid", "softsign", "sin", "cos", "gt", "ge", "lt", "le", "eq", "ne",
    "logical_not",
}  # fmt: skip
"""Operations (of CALLS) that make each value from one value of a tensor (and numbers)."""

ROW_WISE = {"softmax", "layer_norm", "rms_norm", "group_norm", "instance_norm", "sum", "argmax", "argmin", "max_places"}
"""Operations of one tensor that make values from many of its values."""

NEAREST, AVERAGED = ("nearest", "nearest-exact"), ("linear", "bilinear", "trilinear", "area")
"""Modes of interpolation that move values, and that average them; others make values outside their input's range."""
