"""Multiply-accumulates of one run of a prepared network, by layer, operation and code."""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from qat.fake_quant import FakeQuantize
from qat.layers import SWAPS, Quantized, float_type
from qat.modes import eval_mode
from qat.record import without_fast_path
from qat.split import join
from qat.structures import tensors
from qat.subclass import Prepared, as_graph

Owner = tuple[dict[Any, int], Any] | None
"""Whose products are being computed: a table and its key; None inside a layer, which has a formula."""


@dataclass
class Macs:
    """Multiply-accumulates of a run on `samples` inputs.

    Attributes:
        samples: the size of the example's batch; numbers are those of the whole batch.
        layers: path of a layer (`LAYER.WEIGHT` of one with several weights) -> its products with the weight.
        calls: path of a recorded part -> call of a function or method (key of `calls`) -> products.
        code: path of a module -> products that its own code computes, where no layer does and nothing is recorded.
    """

    samples: int = 1
    layers: dict[str, int] = field(default_factory=dict)
    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    code: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def count(prepared: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Macs:
    """Run a prepared network in eval mode and count.

    Args:
        prepared: in mode float, so that quantizers compute nothing.
        args, kwargs: what it is called with.
    """
    first = next((t for t in tensors((args, kwargs)) if t.dim()), None)
    macs = Macs(samples=max(1, len(first)) if first is not None else 1)
    owners: list[Owner] = []
    watched = _Hooks(prepared, macs, owners)
    with watched, eval_mode(prepared), without_fast_path(), sdpa_kernel(SDPBackend.MATH), _Products(owners):
        prepared(*args, **kwargs)
    return macs


class _Products(TorchDispatchMode):
    """Adds the products that torch computes to their owner."""

    def __init__(self, owners: list[Owner]) -> None:
        super().__init__()
        self.owners = owners

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        owner = self.owners[-1] if self.owners else None
        if formula is not None and owner is not None:
            _add(*owner, formula(*args, **(kwargs or {}), out_val=result) // 2)
        return result


def _add(table: dict[Any, int], key: Any, number: int) -> None:
    table[key] = table.get(key, 0) + number


class _Hooks:
    """Tells who computes: hooks on every module, an interpreter in the place of every recorded forward."""

    def __init__(self, prepared: nn.Module, macs: Macs, owners: list[Owner]) -> None:
        self.prepared, self.macs, self.owners = prepared, macs, owners
        self.handles: list[Any] = []
        self.replaced: list[nn.Module] = []

    def __enter__(self) -> None:
        for path, module in self.prepared.named_modules():
            if isinstance(module, FakeQuantize):
                continue
            recorded = recording(module)
            if recorded is not None:
                vars(module)["forward"] = self._interpreted(recorded, path)
                self.replaced.append(module)
            owner = None if is_layer(module) else (self.macs.code, path)
            self.handles += [
                module.register_forward_pre_hook(self._before(owner), prepend=True),
                module.register_forward_hook(self._after(path), with_kwargs=True),
            ]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        for module in self.replaced:
            del vars(module)["forward"]

    def _before(self, owner: Owner) -> Any:
        return lambda module, args: self.owners.append(owner)

    def _after(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.owners.pop()
            if is_layer(module):
                for name, number in of_layer(module, (*args, *kwargs.values())[0], output).items():
                    _add(self.macs.layers, weight_path(path, name), number)

        return hook

    def _interpreted(self, recorded: fx.GraphModule, path: str) -> Callable[..., Any]:
        interpreter = _Interpreter(recorded, self.macs.calls.setdefault(path, {}), self.owners)
        signature = inspect.signature(recorded.forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return interpreter.run(*bound.arguments.values())

        return forward


class _Interpreter(fx.Interpreter):
    """Runs a graph and says which call computes."""

    def __init__(self, recorded: fx.GraphModule, table: dict[str, int], owners: list[Owner]) -> None:
        super().__init__(recorded)
        self.table, self.owners = table, owners
        self.keys = {node: key for key, node in calls(recorded).items()}

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation."""
        self.owners.append((self.table, self.keys[n]) if n in self.keys else None)
        result = super().run_node(n)
        self.owners.pop()
        return result


def recording(module: nn.Module) -> fx.GraphModule | None:
    """The graph that a module's forward runs, if it was recorded."""
    if isinstance(module, Prepared) and vars(module).get("recording") is not None:
        return as_graph(module)
    return module if isinstance(module, fx.GraphModule) else None


def calls(recorded: fx.GraphModule) -> dict[str, fx.Node]:
    """The calls of functions and methods in a graph: `NAME:POSITION` among those of that name -> node.

    Copies and pickles keep these; a node's own name they may not.
    """
    found: dict[str, fx.Node] = {}
    counts = Counter[str]()
    for node in recorded.graph.nodes:
        if node.op in ("call_function", "call_method"):
            label = function_name(node)
            found[f"{label}:{counts[label]}"] = node
            counts[label] += 1
    return found


def function_name(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer with weights that could be quantized."""
    return isinstance(module, Quantized) or type(module) in SWAPS


def weight_names(layer: nn.Module) -> list[str]:
    """Names of a layer's weights: a recurrent one has several. A pruned one is still called by its name."""
    if not issubclass(float_type(layer), nn.RNNBase | nn.RNNCellBase):
        return ["weight"]
    names = (name for name, _ in layer.named_parameters(recurse=False) if name.startswith("weight_"))
    return [name.removesuffix("_orig") for name in names]  # torch.nn.utils.prune


def weight_path(layer: str, weight: str) -> str:
    """What a weight is called: its layer, unless that has several."""
    return layer if weight == "weight" else join(layer, weight)


def of_layer(layer: nn.Module, input: Any, output: Any) -> dict[str, int]:
    """Products of one call of a layer: name of a weight -> their number.

    Args:
        layer: float or quantized.
        input: its first input; a packed sequence counts the steps that it has.
        output: what it returned.
    """
    kind = float_type(layer)
    if issubclass(kind, nn.RNNBase | nn.RNNCellBase):
        data: Tensor = input.data if isinstance(input, PackedSequence) else input
        vectors = data.shape[:-1].numel()
        return {name: vectors * getattr(layer, name).numel() for name in weight_names(layer)}
    if issubclass(kind, nn.Embedding | nn.EmbeddingBag):
        return {"weight": 0}
    weight: Any = layer.weight
    read = issubclass(kind, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    return {"weight": (input if read else output).numel() * weight.shape[1:].numel()}
