"""QATModule: a network, a task and an optimizer, described by plain data: a checkpoint is enough to rebuild it."""

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from qat.fake_quant import FakeQuantize
from qat.modes import quantizers
from qat.prepare import prepare
from qat.scheme import QuantConfig
from qat.training.schedulers import with_total
from qat.training.shard import shard
from qat.widths import quantizer_state, restore_quantizer_state

COSINE = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": "total"}


def build(description: Mapping[str, Any], *args: Any) -> Any:
    """Call what `_target_` names with the other entries as keyword arguments.

    Raises:
        ValueError: no `_target_`, or nothing of that name.
    """
    arguments = dict(description)
    target = arguments.pop("_target_", None)
    if target is None:
        raise ValueError(
            f"a description needs _target_, the dotted name of a class or function; got {dict(description)}"
        )
    try:
        function = pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"_target_={target} names nothing that can be imported: {error}") from error
    return function(*args, **arguments)


def parameter_groups(
    net: nn.Module, weight_decay: float = 0.0, scale_lr: float | None = None, rounding_lr: float = 0.01
) -> list[dict[str, Any]]:
    """Optimizer groups: weights with decay; biases and norms without; what quantizers learn without, at its own rate.

    Args:
        net: float or prepared.
        weight_decay: of parameters with two or more dimensions.
        scale_lr: learning rate of scales, thresholds and codebooks; None for the optimizer's.
        rounding_lr: learning rate of adaptive roundings.
    """
    roundings = {quantizer.logits for _, quantizer in quantizers(net) if quantizer.adapts}
    scales = {p for _, quantizer in quantizers(net) for p in quantizer.parameters()} - roundings
    trained = [p for p in net.parameters() if p.requires_grad and p not in scales | roundings]
    rounding = {"weight_decay": 0.0, "lr": rounding_lr, "kept_lr": rounding_lr}  # whatever a scheduler does
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        {"params": [p for p in net.parameters() if p in scales], "weight_decay": 0.0},
        {"params": [p for p in net.parameters() if p in roundings], **rounding},
    ]
    if scale_lr is not None:
        groups[2]["lr"] = scale_lr
    return [group for group in groups if group["params"]]


class QATModule(L.LightningModule):
    """An ordinary LightningModule: supervised training of one network, float or prepared.

    All arguments are plain data and are saved as hyperparameters, so `QATModule.load_from_checkpoint(path)` needs no
    other argument, in any phase. With `quant`, the network is prepared here, before any optimizer exists.

    Args:
        model: `_target_` and arguments of the network.
        task: `_target_` and arguments of the task (`loss` and `metrics`, see `qat.zoo.tasks`).
        optimizer: `_target_` and arguments of the optimizer; `weight_decay` is not applied to biases, norms and scales.
        quant: a `QuantConfig` as plain data; None for the float network.
        input_shape: shape of one input without the batch dimension; needed with `quant`.
        input_dtype: its dtype, a name in torch; indices are `int64`.
        scheduler: `_target_` and arguments of a scheduler of the learning rate, stepped after each training step;
            where an argument is `total` it gets their number. None keeps the rate.
        scale_lr: learning rate of learned scales; None for the optimizer's. Adaptive roundings have one of their own,
            0.01 or what a short run needs, and keep it: they are decided in the end.

    Attributes:
        val_metrics: of the last validation.
        float_metrics: those of the float network that training started from, where they are known.
        loss_terms: what callbacks make of the loss: `term(loss, inputs, outputs)` is the loss from there on.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        task: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        quant: Mapping[str, Any] | None = None,
        input_shape: list[int] | None = None,
        input_dtype: str = "float32",
        scheduler: Mapping[str, Any] | None = COSINE,
        scale_lr: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._random: dict[str, Tensor] = {}
        self.loss_terms: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = []
        self.val_metrics: dict[str, float] = {}
        self.float_metrics: dict[str, float] = {}
        self.task = build(task)
        self.net: nn.Module = build(model)
        if quant is not None:
            if input_shape is None:
                raise ValueError(
                    "QATModule(quant=...) needs input_shape, the shape of one input, to prepare the network"
                )
            example = torch.zeros(2, *input_shape, dtype=getattr(torch, input_dtype))
            self.net = prepare(self.net, QuantConfig.from_dict(quant), example)
        self.metrics = nn.ModuleDict({stage: self.task.metrics() for stage in ("val", "test")})

    @property
    def prepared(self) -> nn.Module:
        """The network, of a module with `quant`."""
        if self.hparams["quant"] is None:
            raise TypeError("this module's network is float; QATModule.quantized(config, ...) makes a prepared one")
        return self.net

    def quantized(self, config: QuantConfig, input_shape: list[int], **changes: Any) -> "QATModule":
        """A module for the prepared network, starting from copies of this module's weights.

        Args:
            config: what to quantize and how.
            input_shape: shape of one input without the batch dimension.
            changes: other constructor arguments to replace (`optimizer`, ...).
        """
        arguments = {**self.hparams, **changes, "quant": config.to_dict(), "input_shape": list(input_shape)}
        module = QATModule(**arguments)
        module.net.load_state_dict({**module.net.state_dict(), **self.net.state_dict()})
        module.float_metrics = dict(self.val_metrics)
        return module

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: D102
        inputs, targets = batch
        outputs = self.net(inputs)
        loss: Tensor = self.task.loss(outputs, targets)
        for term in self.loss_terms:
            loss = term(loss, inputs, outputs)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: D102
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Keep what was measured, for those who show it."""
        self.val_metrics = {name: float(value) for name, value in self.metrics["val"].compute().items()}  # type: ignore

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: D102
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        inputs, targets = batch
        outputs = self.net(inputs)
        self.log(f"{stage}_loss", self.task.loss(outputs, targets), prog_bar=True, sync_dist=True)
        metrics = self.metrics[stage]
        metrics.update(outputs, targets)  # type: ignore[operator]
        self.log_dict({f"{stage}_{name}": metric for name, metric in metrics.items()}, prog_bar=True)  # type: ignore

    def configure_optimizers(self) -> Any:  # noqa: D102
        description = dict(self.hparams["optimizer"])
        weight_decay = description.pop("weight_decay", 0.0)
        total = max(self.trainer.estimated_stepping_batches, 1)
        # A logit has to go about 2 to be decided, against gradients that disagree: 0.01 is too slow for a short run.
        groups = parameter_groups(self.net, weight_decay, self.hparams["scale_lr"], max(0.01, 20 / total))
        optimizer = build(description, groups)
        description = self.hparams["scheduler"]
        if description is None:
            return optimizer
        schedule = build(with_total(description, int(total)), optimizer)
        self._keep_rounding_rate(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step; the rate of adaptive roundings stays: their penalty needs it at its end most."""
        super().lr_scheduler_step(scheduler, metric)
        self._keep_rounding_rate(scheduler.optimizer)

    @staticmethod
    def _keep_rounding_rate(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            if "kept_lr" in group:
                group["lr"] = group["kept_lr"]

    def configure_model(self) -> None:
        """Share the weights between processes where the strategy does (`trainer=fsdp`)."""
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy) and not isinstance(self.net, FSDPModule):
            assert self.device_mesh is not None
            shard(self.net, mesh=self.device_mesh["data_parallel"])

    def whole(self, path: str | Path) -> "QATModule":
        """Itself; where processes share its weights, what its last checkpoint, at `path`, holds of them."""
        return type(self).load_from_checkpoint(path, map_location="cpu") if isinstance(self.net, FSDPModule) else self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is no weight: the mode of the quantizers, and torch's random state, which rounding draws from."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        measured = {"val_metrics": self.val_metrics, "float_metrics": self.float_metrics}
        checkpoint["qat"] = {**quantizer_state(self.net), "quant": self.hparams["quant"], "random": random, **measured}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put quantizers into the mode, and to the bits, they were saved with (their ranges come with the tensors)."""
        restore_quantizer_state(self.net, checkpoint.get("qat", {}))
        self._random = checkpoint.get("qat", {}).get("random", {})
        for name in ("val_metrics", "float_metrics"):
            setattr(self, name, dict(checkpoint.get("qat", {}).get(name, {})))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Go on with the random numbers of the run that was interrupted (what came before this batch drew some)."""
        random, self._random = self._random, {}
        if "cpu" in random:
            torch.set_rng_state(random["cpu"].cpu())
        if "cuda" in random and self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"].cpu(), self.device)

    def _quantizers(self) -> Iterator[FakeQuantize]:
        return (quantizer for _, quantizer in quantizers(self.net))
