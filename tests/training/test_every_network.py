"""Training's machinery on the networks that people bring (`small_networks.py`): a table of network x feature."""

import copy
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qat
from qat.fake_quant import FakeQuantize
from qat.modes import quantizers, set_mode
from qat.record import run
from qat.structures import map_tensors, tensors

sys.path.insert(0, str(Path(__file__).parent))
from small_networks import NETWORKS, SCHEMES, config, loss_of, prepared

SAME_WAY = 0.97
"""Cosine between the gradients in half and in full precision, at least."""
every = pytest.mark.parametrize("network", NETWORKS)
scheme = pytest.mark.parametrize("scheme", SCHEMES)
ASK_FOR_VALUES = ("gru, packed", "llama", "llama, tied", "bert")
"""Their float networks cannot run without memory, on the meta device: they look at lengths, and at masks."""
TIED = {
    "gpt, tied": {"head.weight": "embedding.weight"},
    "llama, tied": {"lm_head.weight": "model.embed_tokens.weight"},
    "bert": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
}
"""Network -> parameter -> the one that it is."""


def step(net: nn.Module, inputs: Any, call: Callable[[nn.Module, Any], Tensor] = loss_of) -> dict[str, Tensor]:
    """A step of training: the loss, the gradients, and everything that the network holds afterwards."""
    learning = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(learning.values(), lr=0.01)
    optimizer.zero_grad()
    loss = call(net, inputs)
    loss.backward()
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in learning.items() if p.grad is not None}
    optimizer.step()
    return {"loss": loss.detach(), **gradients, **{name: t.clone() for name, t in net.state_dict().items()}}


def check_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name].nan_to_num(7.0), value.nan_to_num(7.0)), name


def kept(net: nn.Module) -> dict[str, Tensor]:
    """What quantizers hold."""
    return {f"{path}.{name}": t for path, q in quantizers(net) for name, t in q.state_dict(keep_vars=True).items()}


@contextmanager
def checked_against_the_definition(net: nn.Module) -> Iterator[set[str]]:
    """Every activation's result is ONNX's formula, in float32, rounded once to the dtype of the input.

    Yields the names of the quantizers that ran.
    """
    ran: set[str] = set()

    def check(name: str) -> Any:
        def hook(quantizer: FakeQuantize, args: Any, y: Tensor) -> None:
            x = args[0].detach()
            scale, zero_point = (t.detach() for t in quantizer.qparams(x))
            assert scale.dtype == zero_point.dtype == torch.float32
            q = torch.clamp(torch.round(x.float() / scale) + zero_point, quantizer.quant_min, quantizer.quant_max)
            expected = (q - zero_point) * scale
            if quantizer.relu:
                expected = expected.clamp(min=0)
            assert y.dtype == x.dtype
            assert torch.equal(y.detach(), expected.to(x.dtype)), name
            ran.add(name)

        return hook

    handles = [q.register_forward_hook(check(name)) for name, q in quantizers(net) if q.shape is None]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def angle(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Cosine between the gradients of the weights in two steps."""
    names = [name for name in a if name.startswith("gradient") and "quantizer" not in name]
    assert names
    x, y = (torch.cat([g[name].flatten().double() for name in names]) for g in (a, b))
    return float(torch.dot(x, y) / (x.norm() * y.norm()))


@pytest.mark.sampled(5)
@every
@scheme
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast(network: str, scheme: str, half: torch.dtype) -> None:
    """Quantizers compute in float32 whatever autocast gives them, and training goes where float32 training goes."""
    net, inputs = prepared(network, scheme), NETWORKS[network].inputs()
    twin, dtypes = copy.deepcopy(net), set()

    def call(net: nn.Module, inputs: Any) -> Tensor:
        with torch.autocast("cpu", half), checked_against_the_definition(net) as ran:
            loss = loss_of(net, inputs)
        assert ran == {name for name, q in quantizers(net) if q.shape is None}
        return loss

    before = {name: t.dtype for name, t in kept(net).items()}
    for _, quantizer in quantizers(net):
        quantizer.register_forward_hook(lambda _, args, y: dtypes.add(y.dtype))
    got, expected = step(net, inputs, call), step(twin, inputs)
    assert half in dtypes
    assert {name: t.dtype for name, t in kept(net).items()} == before
    assert all(torch.isfinite(t).all() for name, t in got.items() if name.startswith("gradient"))
    assert float(got["loss"]) == pytest.approx(float(expected["loss"]), rel=0.05)
    assert angle(got, expected) > SAME_WAY


@pytest.mark.sampled(5)
@every
@scheme
def test_bfloat16_throughout(network: str, scheme: str, request: pytest.FixtureRequest) -> None:
    net, inputs = prepared(network, scheme), NETWORKS[network].inputs()
    expected = step(copy.deepcopy(net), inputs)
    before = {name: t.detach().clone() for name, t in kept(net).items()}
    net.bfloat16()
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    halved = map_tensors(lambda t: t.bfloat16() if t.is_floating_point() else t, inputs)
    for name, t in kept(net).items():
        assert t.dtype == before[name].dtype
        assert torch.equal(t.nan_to_num(), before[name].nan_to_num()), name
    got = step(net, halved)
    assert float(got["loss"]) == pytest.approx(float(expected["loss"]), rel=0.05)
    assert angle(got, expected) > SAME_WAY
    weights = {name: p.dtype for name, p in net.named_parameters() if "quantizer" not in name}
    assert set(weights.values()) == {torch.bfloat16}
    losses = [float(step(net, halved)["loss"]) for _ in range(8)]
    assert min(losses[1:]) < losses[0]


def through_a_file(network: str, scheme: str, net: nn.Module) -> nn.Module:
    memory = io.BytesIO()
    torch.save(net.state_dict(), memory)
    memory.seek(0)
    fresh = qat.prepare(NETWORKS[network].make(), config(scheme), NETWORKS[network].inputs())
    fresh.load_state_dict(torch.load(memory, weights_only=True))
    set_mode(fresh, "quantize")
    return fresh.train()


def without_memory_first(network: str, scheme: str, net: nn.Module) -> nn.Module:
    if network in ASK_FOR_VALUES:
        empty = qat.prepare(NETWORKS[network].make(), config(scheme), NETWORKS[network].inputs()).to("meta")
    else:
        with torch.device("meta"):
            empty = qat.prepare(NETWORKS[network].make(), config(scheme), NETWORKS[network].inputs())
    assert {t.device.type for t in (*empty.parameters(), *empty.buffers())} == {"meta"}
    empty.to_empty(device="cpu")
    for path, other in TIED.get(network, {}).items():  # of float networks, too, memory given to both unties them
        layer, _, name = path.rpartition(".")
        setattr(empty.get_submodule(layer), name, empty.get_parameter(other))
    state = net.state_dict()
    empty.load_state_dict(state)
    for name, buffer in empty.named_buffers():  # of the float network, and in no checkpoint of it: a rotation's angles
        if name not in state and "quantizer" not in name:
            buffer.copy_(net.get_buffer(name))
    set_mode(empty, "quantize")
    return empty.train()


COPIES: dict[str, Callable[[str, str, nn.Module], nn.Module]] = {
    "deepcopy": lambda network, scheme, net: copy.deepcopy(net),
    "pickle": lambda network, scheme, net: pickle.loads(pickle.dumps(net)),
    "state dict": through_a_file,
    "meta": without_memory_first,
}


@pytest.mark.sampled(7)
@every
@scheme
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_trains_as_the_original_and_apart_from_it(network: str, scheme: str, way: str) -> None:
    net, inputs = prepared(network, scheme), NETWORKS[network].inputs()
    twin = COPIES[way](network, scheme, net)
    before = copy.deepcopy(net.state_dict())
    assert len({id(p) for p in net.parameters()} & {id(p) for p in twin.parameters()}) == 0
    assert len(list(twin.parameters())) == len(list(net.parameters()))  # what is tied stays tied
    first = step(twin, inputs)
    assert all(torch.equal(t.nan_to_num(), before[name].nan_to_num()) for name, t in net.state_dict().items())
    check_same(first, step(net, inputs))
    check_same(step(twin, inputs), step(net, inputs))
    assert twin.meta.keys() == net.meta.keys()


@pytest.mark.sampled(11)
@every
@scheme
@pytest.mark.parametrize("mode", ["observe", "quantize"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_gives_the_same_gradients_and_ranges(
    network: str, scheme: str, mode: str, reentrant: bool
) -> None:
    net, inputs = prepared(network, scheme), NETWORKS[network].inputs()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()  # it counts a recomputed batch twice, as it does in float networks
    set_mode(net, mode)
    twin = copy.deepcopy(net)
    needed = torch.zeros((), requires_grad=True)  # reentrant checkpoints want an input that needs a gradient

    def recomputed(net: nn.Module, inputs: Any) -> Tensor:
        torch.manual_seed(1)

        def whole(_: Tensor) -> tuple[Tensor, ...]:
            return tuple(t for t in tensors(run(net, inputs)) if t.is_floating_point())

        results = checkpoint(whole, needed, use_reentrant=reentrant)
        return torch.stack([t.square().mean() for t in results]).sum()

    for _ in range(3):
        check_same(step(twin, inputs, recomputed), step(net, inputs))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("network", ["resnet", "separable"])
@scheme
@pytest.mark.parametrize("mode", ["observe", "quantize", "frozen"])
def test_channels_last(network: str, scheme: str, mode: str) -> None:
    """A quantizer keeps the order of memory that it is given, and computes the same."""
    net, inputs = prepared(network, scheme), NETWORKS[network].inputs()[:4, :, :16, :16]  # few values, and so few ties
    set_mode(net, mode)
    twin, kept = copy.deepcopy(net).to(memory_format=torch.channels_last), []

    def hook(_: nn.Module, args: Any, y: Tensor) -> None:
        if args[0].dim() == 4 and args[0].is_contiguous(memory_format=torch.channels_last):
            kept.append(y.is_contiguous(memory_format=torch.channels_last))

    for _, quantizer in quantizers(twin):
        quantizer.register_forward_hook(hook)
    got = step(twin, inputs.to(memory_format=torch.channels_last))
    assert len(kept) > 10
    assert all(kept)
    for name, value in step(net, inputs).items():
        a, b = got[name].double().nan_to_num(), value.double().nan_to_num()
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6, name


RECURRENT = torch._dynamo.config.patch(allow_rnn=True)
"""Without it torch.compile takes no recurrent layer, torch's own neither: it leaves them to Python."""
OWN_CODE = ("gpt that recomputes", "gpt that recomputes, reentrant", "gru, packed", "llama", "llama, tied", "bert")
"""What torch.compile makes of their own code, not of ours, may be several graphs."""
PACKAGE = str(Path(qat.__file__).parent)


@RECURRENT
def breaks_in_our_code(net: nn.Module, inputs: Any) -> list[str]:
    """Where torch.compile leaves a graph in a line of `qat`, and why."""
    torch._dynamo.reset()
    found = torch._dynamo.explain(lambda: loss_of(net, inputs))()
    return [
        f"{reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno}: {reason.reason}"
        for reason in found.break_reasons
        if reason.user_stack and reason.user_stack[-1].filename.startswith(PACKAGE)
    ]


@RECURRENT
@torch._inductor.config.patch(fallback_random=True)  # so that what is dropped is the same
def check_compiled(network: str, scheme: str, **how: Any) -> None:
    """Training compiled is training as it is, compiled once."""
    net = prepared(network, scheme)
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=network not in OWN_CODE, **how)
    optimizers = [torch.optim.SGD([p for p in n.parameters() if p.requires_grad], lr=0.01) for n in (net, twin)]
    for i in range(5):
        inputs, results = NETWORKS[network].inputs(), []
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            for n, call, optimizer in zip((net, twin), (net, compiled), optimizers, strict=True):
                optimizer.zero_grad()
                loss = loss_of(call, inputs)
                loss.backward()
                gradients = {f"gradient of {k}": p.grad.clone() for k, p in n.named_parameters() if p.grad is not None}
                results.append({"loss": loss.detach(), **gradients})
                optimizer.step()
        assert results[1].keys() == results[0].keys()
        assert float(results[1]["loss"]) == pytest.approx(float(results[0]["loss"]), rel=1e-3)
        assert angle(results[1], results[0]) > SAME_WAY
    for name, value in kept(net).items():
        assert torch.allclose(kept(twin)[name], value, rtol=1e-2, atol=1e-4, equal_nan=True), name


@pytest.mark.slow
@every
@scheme
def test_compiled_training_is_eager_training(network: str, scheme: str) -> None:
    check_compiled(network, scheme, backend="aot_eager")


@pytest.mark.slow
@every
@scheme
def test_the_compiler_breaks_no_graph_in_our_code(network: str, scheme: str) -> None:
    assert breaks_in_our_code(prepared(network, scheme), NETWORKS[network].inputs()) == []


@pytest.mark.slow
@every
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_every_mode_of_the_compiler(network: str, mode: str) -> None:
    check_compiled(network, "learned" if mode == "default" else "running", mode=mode)
