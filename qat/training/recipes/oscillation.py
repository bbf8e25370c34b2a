"""Weights that jump to and fro between two integers: keeping them from it, or stopping them."""

import math
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from qat.fake_quant import FakeQuantize
from qat.layers import Quantized, QuantizedLayer
from qat.layers.base import Weight
from qat.mode import Mode
from qat.modes import quantizers
from qat.training.steps import total_steps


def integer_weights(net: nn.Module) -> Iterator[tuple[str, nn.Module, Weight]]:
    """Quantizer's module path, layer and weight, of every weight that is rounded to integers now; a tied one once."""
    names = {quantizer: name for name, quantizer in quantizers(net)}
    seen: set[FakeQuantize] = set()
    for layer in net.modules():
        for weight in layer.weights() if isinstance(layer, Quantized) else ():
            quantizer = weight.weight_quantizer
            integers = quantizer.scheme.format == "int" and quantizer.grid is None and quantizer.fitted is None
            simulates = quantizer.mode in (Mode.quantize, Mode.frozen) and not quantizer.adapts
            if integers and simulates and quantizer not in seen:
                seen.add(quantizer)
                yield names[quantizer], layer, weight


def steps_of(weight: Weight) -> tuple[Tensor, Tensor]:
    """A weight as rows: in units of its scale, zero point added; and the scale of each row, shape [rows, 1]."""
    quantizer = weight.weight_quantizer
    scale, zero_point = (t.detach().reshape(-1, 1) for t in quantizer.qparams(weight.tensor.detach()))
    return quantizer.rows(weight.tensor).float() / scale + zero_point, scale


def cosine_between(first: float, last: float, share: float) -> float:
    """From `first` to `last` along a half cosine.

    >>> [round(cosine_between(0.0, 2.0, share), 3) for share in (0.0, 0.5, 1.0)]
    [0.0, 1.0, 2.0]
    """
    return last + (first - last) * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2


class OscillationDamping(L.Callback):
    """Pull weights to the middle of their bin: adds `strength * |w - quantized(w)|^2` to the loss, clipped ones apart.

    Bins do not move: the term has a gradient for weights only. It is added to the gradients where the optimizer is
    about to step, so that it works in any module. The strength rises from nought along a half cosine: weights have to
    find their bin first.

    Args:
        strength: of the term at the end of training.

    Source: Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training" (oscillation dampening).
    """

    def __init__(self, strength: float = 1e-2) -> None:
        if strength < 0:
            raise ValueError(f"oscillation_damping.strength={strength}: give a number of at least 0")
        self.strength = strength

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the term's gradient."""
        strength = cosine_between(0.0, self.strength, trainer.global_step / total_steps(trainer))
        for _, layer, weight in integer_weights(pl_module) if strength else ():
            parameter = getattr(layer, weight.name)
            if parameter.grad is not None:
                with torch.enable_grad():
                    [gradient] = torch.autograd.grad(damping_loss(weight), parameter)
                parameter.grad.add_(gradient, alpha=strength)


def damping_loss(weight: Weight) -> Tensor:
    """`|w - quantized(w)|^2` of what is not clipped; a constant grid."""
    quantizer = weight.weight_quantizer
    v, scale = steps_of(weight)
    inside = v.clamp(quantizer.quant_min, quantizer.quant_max)
    return ((inside - inside.detach().round()) * scale).square().sum()


class OscillationFreezing(L.Callback):
    """Find weights whose integer jumps to and fro, and fix them to the integer where they were most of the time.

    A jump against the direction of the one before counts as an oscillation; a moving average of them is a weight's
    frequency. Above the threshold it is fixed for the rest of training, to the rounded moving average of its integers.
    The threshold falls along a half cosine. All of it is in checkpoints; where a quantizer gets other bits it starts
    anew. With weights that are sharded over processes (FSDP) it cannot be used.

    Args:
        momentum: weight of the newest step in both averages.
        first_threshold, last_threshold: the frequency above which a weight is fixed, at the start and end of training.

    Source: Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training" (iterative freezing of
    oscillating weights, algorithm 1).
    """

    def __init__(self, momentum: float = 0.01, first_threshold: float = 0.04, last_threshold: float = 0.01) -> None:
        for name, value in {"momentum": momentum, "first_threshold": first_threshold,
                            "last_threshold": last_threshold}.items():  # fmt: skip
            if not 0 < value <= 1:
                raise ValueError(f"oscillation_freezing.{name}={value}: give a number in (0, 1]")
        self.momentum = momentum
        self.thresholds = first_threshold, last_threshold
        self.tracked: dict[str, dict[str, Any]] = {}
        self._step = -1

    @property
    def frozen_share(self) -> float:
        """The share of the tracked weights that are fixed."""
        masks = [state["frozen"] for state in self.tracked.values()]
        return sum(float(mask.sum()) for mask in masks) / max(sum(mask.numel() for mask in masks), 1)

    def threshold_at(self, step: int, total: int) -> float:
        """The frequency above which a weight is fixed at a step of `total`."""
        return cosine_between(*self.thresholds, step / total)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Remember the step: several batches may make one."""
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the optimizer's step: track integers, fix what oscillates."""
        if trainer.global_step == self._step:
            return
        threshold = self.threshold_at(trainer.global_step, total_steps(trainer))
        for name, layer, weight in integer_weights(pl_module):
            quantizer = weight.weight_quantizer
            steps, scale = steps_of(weight)
            integers = steps.clamp(quantizer.quant_min, quantizer.quant_max).round()
            state = self.tracked.get(name)
            if state is None or state["bits"] != quantizer.scheme.bits:
                self.tracked[name] = {**new_state(integers), "bits": quantizer.scheme.bits}
                continue
            for key, value in state.items():
                if isinstance(value, Tensor) and value.device != integers.device:
                    state[key] = value.to(integers.device)
            track(state, integers, self.momentum, threshold)
            zero_point = quantizer.qparams(weight.tensor)[1].reshape(-1, 1)
            rows = quantizer.rows(weight.tensor)
            rows = torch.where(state["frozen"], ((state["integers"] - zero_point) * scale).to(rows.dtype), rows)
            kept = quantizer.layout.restore(rows, weight.tensor.shape)
            kept = layer.as_kept(kept) if isinstance(layer, QuantizedLayer) else kept
            getattr(layer, weight.name).copy_(kept)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("frozen_weights", self.frozen_share)

    def state_dict(self) -> dict[str, Any]:
        """What was tracked."""
        return {name: dict(state) for name, state in self.tracked.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on tracking."""
        self.tracked = {name: dict(state) for name, state in state_dict.items()}


def new_state(integers: Tensor) -> dict[str, Tensor]:
    """What is tracked of a weight, from its first integers on."""
    return {
        "integers": integers.clone(),
        "average": integers.clone(),
        "direction": torch.zeros_like(integers, dtype=torch.int8),
        "frequency": torch.zeros_like(integers),
        "frozen": torch.zeros_like(integers, dtype=torch.bool),
    }


def track(state: dict[str, Tensor], integers: Tensor, momentum: float, threshold: float) -> None:
    """Take in the integers of one more step; `state["integers"]` are those to use.

    Args:
        state: of `new_state`; it is changed.
        integers: after the optimizer's step, as [rows, values].
        momentum: weight of this step in the averages.
        threshold: what a frequency has to exceed for the weight to be fixed.
    """
    integers = torch.where(state["frozen"], state["integers"], integers)
    jump = (integers - state["integers"]).sign().to(torch.int8)
    turned = (jump * state["direction"]) < 0
    state["frequency"].lerp_(turned.float(), momentum)
    state["direction"].copy_(torch.where(jump != 0, jump, state["direction"]))
    state["average"].lerp_(integers, momentum)
    new = (state["frequency"] > threshold) & ~state["frozen"]
    state["integers"].copy_(torch.where(new, state["average"].round(), integers))
    state["frozen"] |= new
