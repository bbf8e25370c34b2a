"""GELU, SiLU and LayerNorm of a prepared network: torch's to the bit, in less memory."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat import lean
from qat.calls import CALLS
from qat.numerics import codes, fast, native

pytestmark = pytest.mark.skipif(native.module() is None, reason="there is no compiler")

PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (lean.gelu, F.gelu),
    "gelu, tanh": (
        lambda x: lean.gelu(x, approximate="tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "silu": (lean.silu, F.silu),
}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "turned": lambda x: x.transpose(1, 3),
    "a part": lambda x: x[:, 1:],
    "every other": lambda x: x[..., ::2],
    "nothing": lambda x: x[:0],
    "one for all": lambda x: x[:1].expand(5, -1, -1, -1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PAIRS)
def test_equal_to_torch_to_the_bit(name: str, layout: str, dtype: torch.dtype) -> None:
    """Result, gradient and second derivative."""
    torch.manual_seed(0)
    leaf = (torch.randn(4, 8, 32, 32) * 3).to(dtype).requires_grad_()
    results = []
    for function in PAIRS[name]:
        y = function(LAYOUTS[layout](leaf))
        direction = torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)
        (first,) = torch.autograd.grad((y * direction).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf, retain_graph=True)
        plain = torch.autograd.grad((function(LAYOUTS[layout](leaf)) * direction).sum(), leaf)[0]
        results.append((y.detach(), first.detach(), second, plain))
    assert results[0][0].stride() == results[1][0].stride()
    for ours, torchs in zip(*results, strict=True):
        assert torch.equal(ours, torchs)


@pytest.mark.parametrize("name", PAIRS)
def test_the_result_lies_in_memory_of_the_kernels(name: str) -> None:
    native.clear_blocks()
    x = torch.randn(64, 1024, requires_grad=True)
    assert native.free_blocks() == []
    y = PAIRS[name][0](x)
    assert sum(native.free_blocks()) == 2**25 - x.nbytes
    y.sum().backward()
    del y
    native.clear_blocks()


@pytest.mark.parametrize("name", PAIRS)
def test_a_gradient_that_somebody_holds_is_not_written_to(name: str) -> None:
    ours, torchs = PAIRS[name]
    x = torch.randn(64, 1024, requires_grad=True)
    given, kept = torch.randn(64, 1024), []
    before = given.clone()
    y = ours(x)
    y.register_hook(kept.append)
    y.retain_grad()
    (passed,) = torch.autograd.grad(y, x, given)
    assert torch.equal(given, before)
    assert torch.equal(kept[0], before)
    assert torch.equal(passed, torch.autograd.grad(torchs(x), x, given)[0])
    turned = torch.randn(1024, 64).t()  # of another order of memory
    (passed,) = torch.autograd.grad(ours(x), x, turned)
    assert torch.equal(passed, torch.autograd.grad(torchs(x), x, turned)[0])


@pytest.mark.parametrize("name", PAIRS)
def test_where_torch_transforms_or_casts_it_is_torchs(name: str) -> None:
    ours, torchs = PAIRS[name]
    x = torch.randn(8, 16)
    assert torch.equal(torch.vmap(ours)(x), torchs(x))
    assert torch.equal(torch.func.jvp(ours, (x,), (x,))[1], torch.func.jvp(torchs, (x,), (x,))[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torchs(x).dtype
    assert torch.equal(torch.compile(ours, backend="eager", fullgraph=True)(x), torchs(x))


def test_in_place_is_torchs() -> None:
    x = torch.randn(64, 1024)
    expected = F.silu(x)
    assert lean.silu(x, inplace=True) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_keeps_the_integers_of_its_input(dtype: torch.dtype, affine: bool) -> None:
    """Equal to the bit, second derivatives included; a byte a value is kept in place of the numbers."""
    torch.manual_seed(0)
    x = torch.randn(8, 16, 64).to(dtype).requires_grad_()
    weight, bias = (torch.randn(64).to(dtype).requires_grad_() if affine else None for _ in range(2))
    leaves = [x, weight, bias] if affine else [x]
    results = []
    for function in (lean.layer_norm, F.layer_norm):
        grid = fast.fake_quantize(x, torch.tensor(0.03), None, -128, 127, codes=True)
        y = function(grid, (64,), weight, bias)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), x)
        plain = function(fast.fake_quantize(x, torch.tensor(0.03), None, -128, 127, codes=True), (64,), weight, bias)
        results.append((y.detach(), *first, *second, *torch.autograd.grad(plain.square().sum(), leaves)))
    for ours, torchs in zip(*results, strict=True):
        assert torch.equal(ours, torchs)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.linear(x)
        x = x + self.linear(self.norm(x))
        y: Tensor = self.head(x + self.linear(F.layer_norm(x, (64,))))
        return y


def test_what_a_norm_keeps_is_a_byte_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[object] = []
    pack = codes._pack

    def seen(known: dict[int, codes.Codes]) -> Callable[[Tensor], object]:
        inner = pack(known)
        return lambda x: (held.append(inner(x)), held[-1])[1]

    monkeypatch.setattr(codes, "_pack", seen)
    x = torch.randn(32, 64)
    prepared = qat.prepare(Residual(), qat.preset("int8"), x)
    assert type(prepared.norm) is lean.LayerNorm
    assert lean.layer_norm in {node.target for node in prepared.graph.nodes}
    qat.calibrate(prepared, [x])
    prepared.train()(x).sum().backward()
    of_norms = [k[0].values for k in held if isinstance(k, tuple)]  # linear layers keep theirs without hooks
    assert [(values.shape, values.dtype) for values in of_norms] == [((32, 64), torch.int8)] * 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.gelu, self.silu, self.tanh = nn.GELU(), nn.SiLU(), nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        x = self.gelu(self.a(x))
        x = self.silu(self.b(x))
        x = F.silu(F.gelu(self.c(x), approximate="tanh"))
        y: Tensor = self.d(self.tanh(self.gelu(x)))  # one module, called twice
        return y


def test_a_prepared_network_computes_with_them() -> None:
    net, x = Net(), torch.randn(16, 8)
    seen: list[str] = []
    net.gelu.register_forward_hook(lambda *_: seen.append("hook"))
    prepared = qat.prepare(net, qat.preset("int8"), x)
    assert type(net.gelu) is nn.GELU
    assert type(prepared.gelu) is lean.GELU
    assert type(prepared.silu) is lean.SiLU
    assert isinstance(prepared.gelu, nn.GELU)
    assert prepared.tanh.approximate == "tanh"
    called = [node.target for node in prepared.graph.nodes if node.op == "call_function"]
    assert called == [lean.gelu, lean.silu]
    seen.clear()
    assert torch.equal(prepared(x), net(x))
    assert seen == ["hook"] * 4
    again = copy.deepcopy(prepared)
    assert torch.equal(again(x), net(x))


def test_tables_are_complete() -> None:
    for torchs, ours in (lean.FUNCTIONS | lean.MODULES).items():
        assert CALLS[ours] is CALLS[torchs]


@pytest.mark.parametrize("target", ["onnxruntime_x86_vnni", "openvino"])
def test_what_trains_with_them_is_lowered(target: str) -> None:
    net, x = Net(), torch.randn(64, 8)
    prepared = qat.prepare(net, qat.preset("int8", target=target), x)
    qat.calibrate(prepared, [x])
    qat.set_mode(prepared.eval(), "frozen")
    lowered = qat.lower(prepared)
    step = float(next(q for n, q in prepared.named_modules() if n.endswith("quantizers.silu")).scale)
    with torch.no_grad():
        assert float((lowered(x) - prepared(x)).abs().max()) < 2 * step
