"""Every function, method and attribute that CALLS names, called: one network holds them all, and is lowered."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.calls import CALLS, Operation
from tests.whole_way import config

Given = Callable[[Any, Tensor, Tensor], tuple[Any, ...]]

ARGUMENTS: dict[str, Given] = {
    **dict.fromkeys(
        ("relu6", "sigmoid", "tanh", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu",
         "elu", "softplus", "selu", "celu", "logsigmoid", "softsign", "sin", "cos", "neg", "abs", "exp", "square",
         "normalize", "instance_norm"), lambda s, y, z: (y,)),
    **dict.fromkeys(("add", "sub", "mul", "matmul", "maximum", "minimum"), lambda s, y, z: (y, z)),
    **dict.fromkeys(("log", "sqrt", "rsqrt"), lambda s, y, z: (y * y + 1,)),
    **dict.fromkeys(("softmax", "log_softmax", "sum", "argmax", "argmin", "amax", "amin", "flatten", "unsqueeze"),
                    lambda s, y, z: (y, 1)),
    **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne"), lambda s, y, z: (y, 0.1)),
    **dict.fromkeys(("layer_norm", "rms_norm"), lambda s, y, z: (y, (6,))),
    "rsub": lambda s, y, z: (y, 2.0), "pow": lambda s, y, z: (y, 2), "clamp": lambda s, y, z: (y, -0.2, 0.3),
    "div": lambda s, y, z: (y, z * z + 1), "einsum": lambda s, y, z: ("bchw,bchw->bchw", y, z),
    "pad": lambda s, y, z: (y, (1, 0, 2, 1)),
    "max_unpool": lambda s, y, z: unpooling(F.max_pool2d(y, 2, return_indices=True), 2),
    "transpose": lambda s, y, z: (y, 1, 2), "movedim": lambda s, y, z: (y, 1, -1),
    "squeeze": lambda s, y, z: (y[:, :1], 1), "unflatten": lambda s, y, z: (y, 1, (2, 2)),
    "expand": lambda s, y, z: (y[:, :1], -1, 4, -1, -1), "expand_as": lambda s, y, z: (y[:, :1], z),
    "repeat": lambda s, y, z: (y, (1, 2, 1, 1)), "select": lambda s, y, z: (y, 1, 2),
    "narrow": lambda s, y, z: (y, 2, 1, 3), "flip": lambda s, y, z: (y, (2, 3)), "roll": lambda s, y, z: (y, 1, 2),
    "chunk": lambda s, y, z: (y, 2, 1), "split": lambda s, y, z: (y, 2, 1), "unbind": lambda s, y, z: (y, 1),
    "pixel_shuffle": lambda s, y, z: (y, 2), "pixel_unshuffle": lambda s, y, z: (y, 2),
    "adaptive_max_pool": lambda s, y, z: (y, 3), "interpolate": lambda s, y, z: (y, None, 2),
    "masked_fill": lambda s, y, z: (y, s.w > 0, 0.0), "where": lambda s, y, z: (s.w > 0, y, z),
    "glu": lambda s, y, z: (y, 1), "prelu": lambda s, y, z: (y, s.slope), "group_norm": lambda s, y, z: (y, 2),
    "batch_norm": lambda s, y, z: (y, s.mean, s.var), "lp_pool1d": lambda s, y, z: (y[:, 0], 2.0, 2),
    "lp_pool2d": lambda s, y, z: (y, 2.0, 2), "lp_pool3d": lambda s, y, z: (y[:, None], 2.0, 2),
    "logical_not": lambda s, y, z: (y > 0.1,),
}  # fmt: skip
"""Name of an operation -> what it is called with."""
OF_KEYS: dict[Any, Given] = {
    **dict.fromkeys(("t", torch.t, (getattr, "T")), lambda s, y, z: (y[:, 0, 0],)),
    **dict.fromkeys((torch.bmm, "bmm"), lambda s, y, z: (y[:, 0], z[:, 0])),
    **dict.fromkeys((torch.mm, "mm"), lambda s, y, z: (y[:, 0, 0], s.w)),
    (getattr, "mT"): lambda s, y, z: (y,),
    F.max_unpool1d: lambda s, y, z: unpooling(F.max_pool1d(y[:, 0], 2, return_indices=True), 2),
    F.max_unpool3d: lambda s, y, z: unpooling(F.max_pool3d(y[:, None], (1, 2, 2), return_indices=True), (1, 2, 2)),
    F.adaptive_max_pool1d: lambda s, y, z: (y[:, 0], 3), F.adaptive_max_pool3d: lambda s, y, z: (y[:, None], 2),
    **dict.fromkeys((operator.iadd, operator.isub, operator.imul, operator.imatmul),
                    lambda s, y, z: (y.clone(), z)),
    operator.itruediv: lambda s, y, z: (y.clone(), z * z + 1),
}  # fmt: skip
"""Keys of CALLS that are called with something else."""
OWN = {key for key in CALLS if str(getattr(key, "__module__", "")).startswith("qat.")}
"""Functions that stand for steps of attention and for smoothing: nobody calls them."""
KEYS = [key for key in CALLS if not isinstance(key, type) and key not in OWN]


def unpooling(pooled: tuple[Tensor, Tensor], window: Any) -> tuple[Any, ...]:
    """Maxima, their places and the window."""
    values, places = pooled
    return values, places, window


def called(key: Any, operation: Operation, s: Any, y: Tensor, z: Tensor) -> Any:
    """What a key's call returns."""
    args = OF_KEYS.get(key, ARGUMENTS[operation.name])(s, y, z)
    if isinstance(key, tuple):
        return getattr(args[0], key[1])
    made = getattr(args[0], key)(*args[1:]) if isinstance(key, str) else key(*args)
    return made[1] if operation.name in ("chunk", "split", "unbind") else made


class All(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.w, self.slope = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.rand(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, z = self.a(x), self.b(x)
        return tuple(called(key, CALLS[key], self, y, z) for key in KEYS)


def test_every_call_is_prepared_and_lowered() -> None:
    torch.manual_seed(0)
    net, x = All().eval(), torch.randn(6, 3, 8, 8)
    prepared = qat.prepare(net, config(8), x)
    names = {operation.name for operation in (CALLS.get(n.target) for n in prepared.graph.nodes) if operation}
    assert {CALLS[key].name for key in KEYS if not isinstance(key, tuple)} <= names  # none was taken apart by torch
    for key, expected, got in zip(KEYS, net(x), prepared(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=str(key))
    qat.calibrate(prepared, [x])
    with torch.no_grad():
        simulated, lowered = prepared(x), qat.lower(prepared)(x)
    for key, expected, got in zip(KEYS, simulated, lowered, strict=True):
        assert got.dtype == expected.dtype, key
        if expected.is_floating_point():
            assert (got - expected).abs().mean() <= 0.02 * expected.std(), key
        else:
            assert (got == expected).float().mean() >= 0.99, key
