"""Prepared LightningModules: of the user's own class, with quantizers, and checkpoints that say how to rebuild them."""

import copy
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx, nn

from qat.prepared import PreparedNetwork, bind_functional
from qat.scheme import QuantConfig
from qat.structures import map_tensors
from qat.widths import quantizer_state, restore_quantizer_state


def is_lightning(net: nn.Module) -> bool:
    """Whether `net` is a LightningModule; Lightning is not imported for the question."""
    return any(base.__name__ == "LightningModule" and _is_lightnings(base) for base in type(net).__mro__)


def _is_lightnings(what: Any) -> bool:
    return bool(what.__module__.startswith(("lightning.", "pytorch_lightning.")))


class Prepared:
    """What a prepared LightningModule has beside its user's class.

    Attributes:
        meta: as of a prepared network; empty before the structure is built.
        recording: of `forward`, where it was recorded: it runs on this module's own layers.
    """

    meta: dict[str, Any]
    recording: fx.Graph | None = None
    prepare: ClassVar[Callable[..., nn.Module]]
    """`qat.prepare`, which makes this class and so is above it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As recorded, or the user's where it was not."""
        run = vars(self).get("_run_recording")
        return super().forward(*args, **kwargs) if run is None else run(self, *args, **kwargs)  # type: ignore[misc]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the structure is built from, and the mode of the quantizers."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        about = self.meta["qat"]
        checkpoint["qat"] = {
            "quant": about["config"].to_dict(),
            "inputs": map_tensors(lambda t: torch.zeros(t.shape, dtype=t.dtype), about["inputs"]),
            **quantizer_state(self),  # type: ignore[arg-type]
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the structure, if this is a fresh float module, and put quantizers into the mode they were saved in."""
        saved = checkpoint.get("qat")
        if saved is None:
            raise ValueError(
                f"the checkpoint was not saved by a prepared {type(self).__name__}: it has no entry 'qat'. A float "
                f"checkpoint's tensors load with load_state_dict(checkpoint['state_dict'], strict=False)"
            )
        if "meta" not in vars(self):
            self._become_prepared(QuantConfig.from_dict(saved["quant"]), saved["inputs"])
        restore_quantizer_state(self, saved)  # type: ignore[arg-type]
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]

    def _become_prepared(self, config: QuantConfig, inputs: dict[str, Any]) -> None:
        own = type(self)
        self.__class__ = own.__mro__[2]
        try:
            prepared = own.prepare(self, config, inputs)
        finally:
            self.__class__ = own
        vars(self).update(vars(prepared))

    def _state(self) -> dict[str, Any]:
        """What a copy takes over: all but the trainer."""
        state: Any = self.__getstate__()
        return dict(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Prepared":
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        vars(result).update(copy.deepcopy(self._state(), memo))
        if result.recording is not None:
            bind_functional(as_graph(result))  # type: ignore[arg-type]
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.recording is not None:
            bind_functional(as_graph(self))  # type: ignore[arg-type]

    def __reduce__(self) -> Any:
        state = {k: v for k, v in self._state().items() if k not in ("recording", "_run_recording")}
        recorded = None if self.recording is None else as_graph(self)  # type: ignore[arg-type]
        return _unpickle, (type(self).__mro__[2], type(self).prepare, recorded), state


def _unpickle(base: type[nn.Module], prepare: Callable[..., nn.Module], recorded: fx.GraphModule | None) -> nn.Module:
    kind = prepared_class(base, prepare)
    module = kind.__new__(kind)
    if recorded is not None:
        _record(module, recorded)
    return module


def _record(module: nn.Module, recorded: fx.GraphModule) -> None:
    vars(module)["recording"] = recorded.graph
    vars(module)["_run_recording"] = type(recorded).forward  # its code reads layers from `self`


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def prepared_class(base: type[nn.Module], prepare: Callable[..., nn.Module]) -> type[nn.Module]:
    """The class of a prepared `base`, a LightningModule's class. `load_from_checkpoint` rebuilds structure, too."""
    if base not in _CLASSES:
        names: dict[str, Any] = {
            "__doc__": base.__doc__,
            "__module__": base.__module__,
            "prepare": staticmethod(prepare),
        }
        if not _is_lightnings(base.configure_model):  # type: ignore[attr-defined]  # Lightning asks who overrides it
            names["configure_model"] = _until_prepared(base.configure_model)  # type: ignore[attr-defined]
        _CLASSES[base] = type(f"Prepared{base.__name__}", (Prepared, base), names)
    return _CLASSES[base]


def _until_prepared(configure_model: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(configure_model)
    def until_prepared(self: Any) -> None:
        """The user's, until the structure stands: layers made anew would be float ones."""
        if "meta" not in vars(self):
            configure_model(self)

    return until_prepared


def with_graph(module: nn.Module, recorded: fx.GraphModule, prepare: Callable[..., nn.Module]) -> nn.Module:
    """Make a copy of a LightningModule run a recording of its forward, whose layers it has already."""
    for name, child in recorded.named_children():
        if name not in module._modules:
            module.add_module(name, child)
    for name, buffer in recorded._buffers.items():
        if name not in module._buffers:
            module.register_buffer(name, buffer, persistent=False)
    module.__class__ = prepared_class(type(module), prepare)
    _record(module, recorded)
    vars(module)["meta"] = dict(recorded.meta)
    bind_functional(as_graph(module))
    return module


def as_graph(module: nn.Module) -> PreparedNetwork:
    """The recording of a prepared LightningModule on its layers, which it shares."""
    graph = PreparedNetwork(module, vars(module)["recording"], type(module).__name__)
    graph.meta.update(vars(module)["meta"])
    graph.train(module.training)
    return graph
