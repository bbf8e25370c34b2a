"""LogQuantizers: what each quantizer does to its tensor, every so many steps."""

import csv
import io
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qat.export.files import write_atomically
from qat.fake_quant import FakeQuantize
from qat.layers import weights_of
from qat.mode import Mode
from qat.modes import quantizers
from qat.training import rows as rows_of_metrics

log = logging.getLogger(__name__)

NUMBERS = ("scale_mean", "scale_min", "scale_max", "zero_point", "clipped", "levels_used", "sqnr_db", "oscillating",
           "scale_grad_norm")  # fmt: skip
"""Columns of quantizers.csv behind step, name and kind, and names of metrics."""
SAMPLE = 8192
"""Of a larger tensor about this many values are looked at."""
FILE = "quantizers.csv"


class LogQuantizers(L.Callback):
    """Log every `every_n_steps`, of each quantizer of weights and activations, what it did in that step's forward pass.

    - `scale_mean`, `scale_min`, `scale_max`, `zero_point` (their mean): those that were used;
    - `clipped`: the share of values that round to a level outside the grid;
    - `levels_used`: the share of the grid's levels that occur;
    - `sqnr_db`: `10 log10(sum x^2 / sum (x - quantized x)^2)`;
    - `oscillating`: the share of a weight's integers that went up and down, or down and up, within `window` steps;
    - `scale_grad_norm`: the norm of the gradient of what a learned range learns, before it is clipped.

    What does not apply is left empty. Of large tensors an even sample is looked at. The numbers go into
    `quantizers.csv` beside the metrics of a CSVLogger, and to other loggers as metrics `NUMBER/NAME`; those that have
    histograms (wandb, TensorBoard) get one of a quantizer's scales, too, `scale/NAME`. Between those steps nothing is
    done, but for the `window` before each, in which integers are looked at. A compiled network runs no hooks: of it
    nothing is logged.

    Args:
        every_n_steps: the interval, in steps of the optimizer; 0 logs nothing.
        window: how many steps are watched for oscillations.
    """

    def __init__(self, every_n_steps: int = 100, window: int = 8) -> None:
        if every_n_steps < 0 or window < 3:
            raise ValueError(
                f"LogQuantizers(every_n_steps={every_n_steps}, window={window}): give a number of at least 0, and a "
                f"window of at least 3 steps, in which an integer can go up and down"
            )
        self.every_n_steps, self.window = every_n_steps, min(window, max(every_n_steps, 3))
        self._quantizers: dict[str, FakeQuantize] = {}
        self._forget()

    def _forget(self) -> None:
        self._handles: list[Any] = []
        self._rows: dict[str, dict[str, Tensor]] = {}
        self._scales: dict[str, Tensor] = {}
        self._trail: list[dict[str, Tensor]] = []
        self._step, self._begun = -1, False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look up the quantizers, and how they are called."""
        self._forget()
        self._quantizers = {}
        if any(isinstance(p, DTensor) for p in pl_module.parameters()):
            log.info("Quantizers are not logged: processes share the weights, and the first alone cannot look at them")
            return
        taken: dict[str, FakeQuantize] = {}
        for path, quantizer in quantizers(pl_module):
            name = quantizer.name if quantizer.name not in ("tensor", *taken) else path.removeprefix("net.")
            taken[name] = quantizer
        self._quantizers = taken

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """In a step that is logged, listen to the quantizers; before it, watch integers."""
        if not self.every_n_steps or not self._quantizers or self._step == trainer.global_step:
            return
        left = -trainer.global_step % self.every_n_steps
        if left < self.window and trainer.global_step:
            self._trail = [*self._trail[1 - self.window :], self._integers(pl_module)]
        if left or not trainer.is_global_zero:
            return
        self._step = trainer.global_step
        self._handles = [
            quantizer.register_forward_hook(self._listen(name), with_kwargs=True)
            for name, quantizer in self._quantizers.items()
            if quantizer.mode in (Mode.quantize, Mode.frozen)
        ]

    def _listen(self, name: str) -> Callable[..., None]:
        @torch.no_grad()
        def hook(quantizer: FakeQuantize, args: Any, kwargs: Any, output: Tensor) -> None:
            x = args[0] if args else kwargs["x"]
            if name not in self._rows and x.numel():  # of several uses in one step the first
                self._rows[name], self._scales[name] = measure(quantizer, x.detach(), output.detach())

        return hook

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gradients of scales are whole now, and not clipped yet."""
        for name, row in self._rows.items():
            grads = [p.grad for p in self._quantizers[name].range.parameters() if p.grad is not None]
            if grads:
                row["scale_grad_norm"] = torch.stack([g.float().norm() for g in grads]).norm()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write what was heard, once the optimizer has stepped."""
        for handle in self._handles:  # gradients of several batches may add up: the first one is looked at
            handle.remove()
        self._handles = []
        if not self._rows or trainer.global_step == self._step:
            return
        for name, share in oscillating(self._trail).items():
            if name in self._rows:
                self._rows[name]["oscillating"] = share
        self._write(trainer.loggers, self._step, self._as_numbers())
        self._rows, self._scales = {}, {}

    @torch.no_grad()
    def _integers(self, module: nn.Module) -> dict[str, Tensor]:
        """A sample of the integers of each weight that simulates integers."""
        weights, found = weights_of(module), {}
        for name, quantizer in self._quantizers.items():
            simulates = quantizer.mode in (Mode.quantize, Mode.frozen)
            if quantizer in weights and simulates and quantizer.grid is None and quantizer.fitted is None:
                scale, zero_point = (t.detach().reshape(-1, 1) for t in quantizer.qparams(weights[quantizer].detach()))
                rows, scale, zero_point = thin([quantizer.rows(weights[quantizer])], [scale, zero_point])
                found[name] = ((rows / scale).round() + zero_point).clamp(quantizer.quant_min, quantizer.quant_max)
        return found

    def _as_numbers(self) -> dict[str, dict[str, float]]:
        """All numbers with one wait for the device."""
        keys = [(name, key) for name, row in self._rows.items() for key in row]
        device = next(iter(next(iter(self._rows.values())).values())).device
        values = torch.stack([self._rows[name][key].float().to(device).reshape(()) for name, key in keys]).tolist()
        numbers: dict[str, dict[str, float]] = {name: {} for name in self._rows}
        for (name, key), value in zip(keys, values, strict=True):
            if math.isfinite(value):
                numbers[name][key] = value
        return numbers

    def _write(self, loggers: list[Logger], step: int, numbers: Mapping[str, Mapping[str, float]]) -> None:
        kinds = {name: "activation" if self._quantizers[name].shape is None else "weight" for name in numbers}
        metrics = {f"{key}/{name}": value for name, row in numbers.items() for key, value in row.items()}
        for logger in loggers:
            if isinstance(logger, CSVLogger | rows_of_metrics.CSVLogger):
                rows = [{"step": step, "name": name, "kind": kinds[name], **row} for name, row in numbers.items()]
                append(Path(logger.log_dir) / FILE, rows, begin=not self._begun)
                self._begun = True
            elif isinstance(logger, WandbLogger):
                import wandb

                scales = {f"scale/{name}": wandb.Histogram(s.cpu().tolist()) for name, s in self._scales.items()}
                logger.experiment.log({**metrics, **scales, "trainer/global_step": step})
            else:
                logger.log_metrics(metrics, step)
                if isinstance(logger, TensorBoardLogger):
                    for name, scale in self._scales.items():
                        logger.experiment.add_histogram(f"scale/{name}", scale.cpu(), step)


def thin(of_values: list[Tensor], of_rows: list[Tensor]) -> list[Tensor]:
    """An even sample of tensors [rows, values], and those rows of what there is one of a row, [rows, 1] or [1, 1]."""
    rows, values = of_values[0].shape
    if rows * values <= SAMPLE:
        return [*of_values, *of_rows]
    some = max(rows * 64 // SAMPLE, 1)  # rows first: many are short, and alike
    every = max(-(-rows // some) * values // SAMPLE, 1)
    return [*(t[::some, ::every] for t in of_values), *(t[::some] if len(t) > 1 else t for t in of_rows)]


def measure(quantizer: FakeQuantize, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What a quantizer made of `x`, and its scales.

    Args:
        quantizer: whose range is as it was when it made `y`.
        x: what it was given.
        y: what it returned.

    Returns:
        Numbers of NUMBERS, each a tensor of one; and the scales, one-dimensional.
    """
    if quantizer.shape is None and not quantizer.dynamic and x.dim() > 1 and x.numel() > 2 * SAMPLE:
        some = max(x.numel() // (2 * SAMPLE), 1)  # samples of the batch, before rows are made of all
        x, y = x[::some], y[::some]
    rows, quantized = quantizer.rows(x).float(), quantizer.rows(y).float()
    if quantizer.fitted is not None:
        rows, quantized = thin([rows, quantized], [])
        scales = quantizer.scales(x).detach().float().reshape(-1)
        return {**_of_scales(scales), "sqnr_db": _sqnr(rows, quantized)}, scales
    scale, zero_point = (t.detach().float().reshape(-1, 1) for t in quantizer.qparams(x))
    numbers = {**_of_scales(scale), "zero_point": zero_point.mean()}
    rows, quantized, row_scale, row_zero = thin([rows, quantized], [scale, zero_point])
    rows = rows.clamp(min=0) if quantizer.relu else rows
    numbers["sqnr_db"] = _sqnr(rows, quantized)
    if quantizer.grid is None:
        q = (rows / row_scale).round() + row_zero
        low, high = int(quantizer.quant_min), int(quantizer.quant_max)
        levels = ((quantized / row_scale).round() + row_zero).long() - low
        used = torch.zeros(high - low + 1, device=x.device).index_fill_(0, levels.clamp(0, high - low).reshape(-1), 1.0)
        numbers |= {"clipped": ((q < low) | (q > high)).float().mean(), "levels_used": used.mean()}
    elif quantizer.scheme.format != "int":
        v = rows / row_scale
        numbers["clipped"] = ((v < quantizer.grid.low) | (v > quantizer.grid.high)).float().mean()
    return numbers, scale.reshape(-1)


def _of_scales(scales: Tensor) -> dict[str, Tensor]:
    return {"scale_mean": scales.mean(), "scale_min": scales.min(), "scale_max": scales.max()}


def _sqnr(x: Tensor, quantized: Tensor) -> Tensor:
    """Signal to quantization noise, in dB; infinite without noise (and so left out)."""
    return 10 * torch.log10(x.square().sum() / (x - quantized).square().sum())


def oscillating(trail: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The share of integers that changed direction in the course of the steps of a trail."""
    if len(trail) < 3:
        return {}
    shares = {}
    for name in trail[-1]:
        seen = [integers[name] for integers in trail if name in integers]
        if len(seen) == len(trail):
            jumps = torch.stack(seen).diff(dim=0)
            shares[name] = ((jumps > 0).any(0) & (jumps < 0).any(0)).float().mean()
    return shares


def append(path: Path, rows: list[dict[str, Any]], begin: bool) -> None:
    """Add rows of one step to a table.

    Args:
        path: of the file.
        rows: with the columns `step`, `name`, `kind` and NUMBERS.
        begin: these are the first of this process: what an earlier one wrote from their step on (a resumed run repeats
            steps; a new one all) is dropped.
    """
    names = ["step", "name", "kind", *NUMBERS]
    if begin:
        kept = ""
        if path.is_file():
            with path.open(newline="") as file:  # the last line may be cut off
                before = [row for row in csv.DictReader(file) if row["kind"]]
            kept = _lines([row for row in before if int(row["step"]) < rows[0]["step"]], names)
        write_atomically(path, (",".join(names) + "\n" + kept).encode())
    with path.open("a") as file:
        file.write(_lines(rows, names))


def _lines(rows: list[dict[str, Any]], names: list[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()
