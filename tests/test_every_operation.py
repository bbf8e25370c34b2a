"""Every layer and operation that can stand in a traced network, by name, each with networks that go the whole way.

`NAMED` says what is supported. Each of its networks is prepared, calibrated, trained a step, saved and loaded, lowered,
and compared with training layer by layer. The networks are those of the tables in other files, which look at each more
closely (16 bits, ONNX, what runs in integers); those that only this file needs are below.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.kinds import IDENTITIES, KINDS
from tests import test_attention, test_functional, test_layer_family, test_lower, test_operations, test_recurrent
from tests.whole_way import Inputs, assert_files_agree, assert_sixteen_bits_are_float, config, trained


class Own(NamedTuple):
    """A forward, its modules, and shapes of its inputs."""

    forward: Callable[..., Any]
    parts: Callable[[], dict[str, nn.Module]]
    shapes: tuple[tuple[int, ...], ...] = ((3, 6, 6),)


class OneInput(nn.Module):
    def __init__(self, own: Own) -> None:
        super().__init__()
        self.own = own
        for name, part in own.parts().items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.own.forward(self, x)


class TwoInputs(OneInput):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.own.forward(self, x, y)


def op(make: Callable[[], nn.Module], channels: int = 4, shape: tuple[int, ...] = (3, 6, 6)) -> Own:
    """`make()` between two convolutions."""
    conv: Any = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}[len(shape)]
    return Own(
        lambda s, x: s.b(s.op(s.a(x))), lambda: {"a": conv(3, 4, 3), "op": make(), "b": conv(channels, 2, 1)}, (shape,)
    )


def several(s: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two inputs, three outputs, one of them read inside, too."""
    a, b = s.a(x).relu(), s.b(y)
    joined = torch.cat([a, b], 1)
    return s.c(joined), a + b, torch.sigmoid(b).mean((2, 3))


def convs(**sizes: int) -> Callable[[], dict[str, nn.Module]]:
    """1x1 convolutions to 4 channels (c: to 2), of so many inputs."""
    return lambda: {name: nn.Conv2d(size, 2 if name == "c" else 4, 1) for name, size in sizes.items()}


OWN: dict[str, Own] = {
    "ReLU": op(lambda: nn.ReLU(inplace=True)),
    "Dropout": op(lambda: nn.Dropout(0.2)), "Dropout2d": op(lambda: nn.Dropout2d(0.2)),
    "Dropout1d": op(lambda: nn.Dropout1d(0.2), shape=(3, 9)),
    "Dropout3d": op(lambda: nn.Dropout3d(0.2), shape=(3, 4, 4, 4)),
    "AlphaDropout": op(lambda: nn.AlphaDropout(0.2)), "FeatureAlphaDropout": op(lambda: nn.FeatureAlphaDropout(0.2)),
    "ZeroPad2d": op(lambda: nn.ZeroPad2d((1, 0, 2, 1))),
    "ReflectionPad2d": op(lambda: nn.ReflectionPad2d(1)),
    "ReplicationPad3d": op(lambda: nn.ReplicationPad3d(1), shape=(3, 4, 4, 4)),
    **{f"CircularPad{i}d": op(make, shape=(3, *(5,) * i)) for i, make in enumerate(
        (lambda: nn.CircularPad1d(2), lambda: nn.CircularPad2d((1, 0, 2, 1)), lambda: nn.CircularPad3d(1)), 1)},
    "PixelUnshuffle": op(lambda: nn.PixelUnshuffle(2), channels=16),
    "LPPool2d": op(lambda: nn.LPPool2d(2, 2)),
    "BatchNorm1d in front": Own(lambda s, x: s.a(F.relu(s.n(x))),
                                lambda: {"n": nn.BatchNorm1d(3), "a": nn.Conv1d(3, 4, 3)}, ((3, 9),)),
    "BatchNorm2d in front": Own(lambda s, x: s.a(s.n(x)), lambda: {"n": nn.BatchNorm2d(3), "a": nn.Conv2d(3, 4, 3)}),
    "BatchNorm3d in front": Own(lambda s, x: s.a(s.n(x)), lambda: {"n": nn.BatchNorm3d(3), "a": nn.Conv3d(3, 4, 3)},
                                ((3, 4, 4, 4),)),
    "BatchNorm1d alone": op(lambda: nn.Sequential(nn.MaxPool1d(2), nn.BatchNorm1d(4)), shape=(3, 9)),
    "BatchNorm3d alone": op(lambda: nn.Sequential(nn.MaxPool3d(2), nn.BatchNorm3d(4)), shape=(3, 6, 6, 6)),
    "BatchNorm after Linear": Own(
        lambda s, x: s.b(s.n(s.a(x))), lambda: {"a": nn.Linear(6, 5), "n": nn.BatchNorm1d(5), "b": nn.Linear(5, 3)},
        ((6,),)),
    "BatchNorm after ConvTranspose": Own(lambda s, x: s.n(s.a(x)),
                                         lambda: {"a": nn.ConvTranspose2d(3, 4, 2, 2), "n": nn.BatchNorm2d(4)}),
    "methods": Own(lambda s, x: s.c(s.a(x).add(s.b(x)).mul(s.a(x)).div(x.abs().mean((1, 2, 3), True).add(1))),
                   convs(a=3, b=3, c=4)),
    "torch.add, torch.mul": Own(lambda s, x: s.c(torch.mul(torch.add(s.a(x), s.b(x)), s.b(x))), convs(a=3, b=3, c=4)),
    "in place": Own(lambda s, x: s.c(F.relu_(s.a(x).mul_(0.5)).add_(s.b(x))), convs(a=3, b=3, c=4)),
    "iadd": Own(lambda s, x: s.c(_iadd(s.a(x), s.b(x))), convs(a=3, b=3, c=4)),
    "constants": Own(lambda s, x: s.c((s.a(x) * 2 + 1) / 3 - torch.ones(4, 1, 1)), convs(a=3, c=4)),
    "twice": Own(lambda s, x: s.b(torch.relu(s.b(torch.relu(s.a(x))) * 3)), convs(a=3, b=4)),
    "several inputs and outputs": Own(several, convs(a=3, b=2, c=8), ((3, 6, 6), (2, 6, 6))),
    "residual": Own(lambda s, x: s.c(F.relu(s.b(F.relu(y := s.a(x))) + y)), convs(a=3, b=4, c=4)),
    "dense": Own(lambda s, x: s.c(torch.cat([x, y := F.relu(s.a(x)), F.relu(s.b(torch.cat([x, y], 1)))], 1)),
                 convs(a=3, b=7, c=11)),
}  # fmt: skip


def _iadd(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


def network(case: str) -> tuple[nn.Module, Inputs]:
    """(float network, inputs) of "TABLE: NAME"."""
    table, name = case.split(": ", 1)
    torch.manual_seed(3)
    if table == "own":
        own = OWN[name]
        kind = TwoInputs if len(own.shapes) == 2 else OneInput
        return kind(own), tuple(torch.randn(48, *shape) + 0.2 for shape in own.shapes)
    if table == "family":
        family = test_layer_family.CASES[name]
        return family.make(), family.inputs(48)
    if table == "operations":
        net, x = test_operations.build(test_operations.CASES[name])
        return net, (x,)
    if table == "attention":
        return test_attention.CASES[name].build()
    if table == "recurrent":
        return test_recurrent.build(name)
    if table == "functional":
        net, x = test_functional.CASES[name].build()
        return net, (x,)
    case_of_lower = test_lower.CASES[name]
    net, x = case_of_lower.make(), torch.randn(48, *case_of_lower.shape) + 0.2
    net(x[:2])  # lazy layers
    return nn.Sequential(net) if isinstance(net, nn.Linear) else net, (x,)


def of(table: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{table}: {name}" for name in names)


def modes(name: str) -> tuple[str, ...]:
    return of("family", *(f"{mode}_{name}" for mode in ("reflect", "replicate", "circular")))


LAYERS: dict[str, tuple[str, ...]] = {
    "Linear": of("lower", "linear", "linear_sequence"),
    "Bilinear": of("family", "bilinear", "bilinear_sequence"),
    "Conv1d": (*of("lower", "conv1d"), *modes("1d")),
    "Conv2d": (*of("lower", "conv2d"), *modes("2d")),
    "Conv3d": (*of("family", "conv3d"), *modes("3d")),
    **{f"ConvTranspose{i}d": of("family", f"transposed_{i}d") for i in (1, 2, 3)},
    "Embedding": of("family", "embedding", "two_embeddings"),
    "EmbeddingBag": of("family", "bag_sum", "bag_mean_padded", "bag_max", "bag_weighted"),
    **{name: of("recurrent", f"{name}_stacked_both_ways") for name in ("LSTM", "GRU", "RNN")},
    **{name: of("recurrent", name) for name in ("LSTMCell", "GRUCell", "RNNCell")},
    "packed sequences": of("recurrent", "GRU_packed", "LSTM_packed", "RNN_packed_sorted"),
    "MultiheadAttention": of("attention", *test_attention.ATTENTION),
    "TransformerEncoderLayer, TransformerDecoderLayer": of("attention", *test_attention.LAYERS),
    "F.scaled_dot_product_attention": of("operations", "sdpa", "sdpa, causal", "sdpa, float mask",
                                         "sdpa, grouped queries"),
    "BatchNorm1d": (*of("lower", "mlp_batch_norm"),
                    *of("own", "BatchNorm1d in front", "BatchNorm1d alone", "BatchNorm after Linear")),
    "BatchNorm2d": (*of("lower", "conv2d", "batch_norm_alone"),
                    *of("own", "BatchNorm2d in front", "BatchNorm after ConvTranspose")),
    "BatchNorm3d": (*of("family", "conv3d_affine_false"), *of("own", "BatchNorm3d in front", "BatchNorm3d alone")),
    **{name: of("operations", f"nn.{name}") for name in (
        "LayerNorm", "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "RMSNorm", "PReLU", "LeakyReLU",
        "ELU", "GELU", "SiLU", "Mish", "Hardswish", "Hardsigmoid", "Hardtanh", "ReLU6", "Sigmoid", "Tanh", "Softmax",
        "LogSoftmax", "Softplus", "SELU", "CELU", "LogSigmoid", "Softsign", "GLU", "Unflatten", "MaxPool1d",
        "MaxPool3d", "AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveMaxPool3d", "AvgPool3d", "AdaptiveAvgPool1d",
        "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "LPPool1d", "LPPool3d",
        "ConstantPad1d", "ConstantPad2d", "ConstantPad3d", "Upsample", "UpsamplingNearest2d",
        "UpsamplingBilinear2d")},
    "poolings with places": of("operations", "MaxPool2d, values", "F.max_pool1d, values", "AdaptiveMaxPool3d, values",
                               "torch.adaptive_max_pool1d"),
    **{f"MaxUnpool{i}d": of("operations", f"MaxUnpool{i}d") for i in (1, 2, 3)},
    "PixelShuffle": of("operations", "pixel shuffle"),
    "interpolation": of("operations", "nearest", "nearest-exact", "linear", "bilinear", "bilinear, corners",
                        "trilinear", "bicubic", "area"),
    "MaxPool2d": of("lower", "max_pool_module"),
    "AvgPool1d": of("lower", "average_pool_1d"),
    "AvgPool2d": of("lower", "average_pool", "average_pool_exclude_pad"),
    "Flatten, Identity": of("lower", "dropout_identity"),
    **{name: of("own", name) for name in (
        "ReLU", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout", "ZeroPad2d",
        "ReflectionPad2d", "ReplicationPad3d", "CircularPad1d", "CircularPad2d", "CircularPad3d",
        "PixelUnshuffle", "LPPool2d")},
}  # fmt: skip
OPERATIONS: dict[str, tuple[str, ...]] = {
    "+": of("lower", "add", "add_twice_the_same"), "-": of("operations", "sub"), "*": of("operations", "mul"),
    "/": of("operations", "div"), "@": of("operations", "attention", "matmul by a parameter"),
    "torch.cat": of("lower", "cat", "cat_of_integers_and_floats"), "torch.stack": of("operations", "stack"),
    "torch.add, torch.mul": of("own", "torch.add, torch.mul"), "torch.matmul": of("operations", "torch.matmul"),
    "torch.bmm": of("operations", "bmm"), "torch.einsum": of("operations", "einsum", "einsum of three"),
    "layers as functions": of("functional", *(name for name in test_functional.CASES if name != "computed weight")),
    "functions": of("operations", *test_operations.FUNCTIONS),
    "methods": (*of("own", "methods"), *of("operations", "method sub", "method softmax")),
    "in place": (*of("own", "in place", "iadd"), *of("lower", "add_in_place"),
                 *of("operations", "isub", "imul", "sub_", "mul_", "clamp_", "sigmoid_", "F.leaky_relu in place")),
    "slicing": (*of("lower", "slice", "slice_ellipsis"), *of("operations", "index", "index with all", "select")),
    "chunk, split": of("operations", "chunk", "torch.chunk, uneven", "split", "split by sizes", "unbind"),
    "permute, reshape": (*of("lower", "permute", "reshape", "view_shape", "flatten"),
                         *of("operations", "transpose", "sizes")),
    "padding": (*of("lower", "pad", "pad_channels"), *of("family", "pad_functions"),
                *of("operations", "pad with a value", "pad what is not negative", "pad for a function")),
    "pooling": (*of("lower", "max_pool", "adaptive_pool", "mean"),
                *of("operations", "F.avg_pool3d", "F.lp_pool2d", "torch.max_pool2d")),
    "max, min along a dimension": of("operations", "max", "min of torch, named", "amax"),
    "expand": of("operations", "expand", "expand_as"),
    "torch.where": of("operations", "where", "where with a number", "masks"),
    "constants": (*of("own", "constants"),
                  *of("operations", "one minus", "plus a parameter", "times a parameter", "positions", "class token")),
    "one module several times": (*of("own", "twice"), *of("lower", "layer_called_twice"),
                                 *of("family", "embedding_twice", "bilinear_twice")),
    "several inputs and outputs": of("own", "several inputs and outputs"),
    "residual, dense": of("own", "residual", "dense"),
    "squeeze-excite": of("operations", "squeeze-excite", "squeeze-excite on the left"),
}  # fmt: skip
NAMED = LAYERS | OPERATIONS
CASES = list(dict.fromkeys(case for cases in NAMED.values() for case in cases))


@pytest.mark.sampled(6)  # the tables' own tests run them all
@pytest.mark.parametrize("case", CASES)
def test_the_whole_way(case: str, tmp_path: Path) -> None:
    net, inputs = network(case)
    prepared = trained(net, inputs)
    lowered = assert_files_agree(prepared, inputs, tmp_path, onnx=False)
    with torch.no_grad():
        simulated, results = prepared(*inputs), lowered(*inputs)
    pairs = [(simulated, results)] if isinstance(simulated, Tensor) else list(zip(simulated, results, strict=True))
    for expected, got in pairs:
        assert (got - expected).abs().mean() <= 0.02 * expected.std()


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", [case for case in CASES if "Unpool" not in case])  # test_operations counts its ties
def test_sixteen_bits_are_float(case: str) -> None:
    assert_sixteen_bits_are_float(*network(case))


def test_every_module_of_torch_that_is_known_is_named() -> None:
    names = {name for entry in LAYERS for name in entry.split(", ")}
    known = {kind.__name__ for kind in KINDS if inspect.isclass(kind) and kind.__module__.startswith("torch.")}
    parts = {"NonDynamicallyQuantizableLinear"}  # of MultiheadAttention
    assert known - parts <= names
    assert nn.Identity in IDENTITIES


def test_a_module_called_twice_has_one_weight_quantizer_and_two_of_activations() -> None:
    net, inputs = network("own: twice")
    prepared = qat.prepare(net, config(8), inputs)
    qat.calibrate(prepared, [inputs])
    calls = [node for node in prepared.graph.nodes if node.target == "b"]
    first, second = (prepared.get_submodule(str(node.args[0].target)) for node in calls)
    assert first is not second
    assert float(second.scale) != float(first.scale)
    weights = [name for name, _ in prepared.named_modules() if name.endswith("weight_quantizer")]
    assert weights == ["a.weight_quantizer", "b.weight_quantizer"]
