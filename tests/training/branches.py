"""Networks whose code leads the part of a batch that one process has elsewhere than the other's; and BatchNorm.

`ranks.py` runs `results` in each of two processes.
"""

import os
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import qat
from qat.modes import quantizers, set_mode
from qat.scheme import QuantConfig, TensorScheme
from qat.training import QATSchedule

WORLD, ROWS, FEATURES, STEPS = 2, 4, 6, 6
RANGES: dict[str, dict[str, Any]] = {
    "minmax": {"range": "running"},
    "ema": {"range": "running", "observer": "ema", "momentum": 0.3},
    "percentile": {"range": "running", "observer": "percentile", "percentiles": [5.0, 95.0]},
    "learned": {"range": "learned"},
}
BRANCHES = {"either": (0, 1, 2, 3, 1, 2), "first": (1,) * STEPS, "second": (2,) * STEPS, "none": (0,) * STEPS}
"""Name -> which processes take the branch, step by step: bit `rank`."""


class Routed(nn.Module):
    """Parts of a batch whose first feature is positive pass through one more block, each part as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)  # registered before what runs before it
        self.extra = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.trunk(x))
        taken = x[:, 0] > 0
        if taken.any():
            y = torch.where(taken[:, None], y.index_put((taken,), y[taken] + self.extra(y[taken])), y)
        return self.head(y)


class Nested(nn.Module):
    """The same inside a network that can be recorded otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.routed, self.last = nn.Linear(FEATURES, FEATURES), Routed(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x[:, :1], F.relu(self.first(x))[:, 1:]], 1)
        return self.last(F.relu(self.routed(y)))


NETWORKS = {"routed": Routed, "nested": Nested}
CASES = [("routed", ranges, "either") for ranges in RANGES]
CASES += [("routed", "ema", branch) for branch in ("first", "second", "none")]
CASES += [("nested", "ema", "either"), ("nested", "minmax", "second")]
"""Network, ranges and branch."""


def inputs(step: int, branch: str) -> Tensor:
    """A batch: rows of the first process, then those of the second."""
    x = torch.randn(WORLD * ROWS, FEATURES, generator=torch.Generator().manual_seed(step)) * (1 + step % 3)
    sign = torch.tensor([1.0 if BRANCHES[branch][step] >> rank & 1 else -1.0 for rank in range(WORLD)])
    return torch.cat([x[:, :1].abs() * sign.repeat_interleave(ROWS)[:, None], x[:, 1:]], 1)


def share(x: Tensor, rank: int | None) -> Tensor:
    return x if rank is None else x[rank * ROWS : (rank + 1) * ROWS]


def prepared(network: str, ranges: str) -> nn.Module:
    torch.manual_seed(0)
    config = QuantConfig(
        weight=TensorScheme(bits=8, range="dynamic"), activation=TensorScheme(bits=8, **RANGES[ranges])
    )
    everywhere = torch.ones(ROWS, FEATURES)
    return qat.prepare(NETWORKS[network](), config, everywhere)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


def train(network: str, ranges: str, branch: str, rank: int | None = None) -> dict[str, dict[str, Tensor]]:
    """What a network holds after a phase that observes and after one that quantizes."""
    net, result = prepared(network, ranges), {}
    qat.calibrate(net, [share(inputs(step, "either"), rank) for step in (3, 4, 5)])
    for _, quantizer in quantizers(net):
        quantizer.observer.reset()
    net.train()
    model = net if rank is None else DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
    for mode in ("observe", "quantize"):
        set_mode(net, mode)
        for step in range(STEPS):
            optimizer.zero_grad()
            model(share(inputs(step, branch), rank)).square().mean().backward()
            optimizer.step()
        result[mode] = state(net)
    return result


class Two(L.LightningModule):
    """Two networks, the second of which only some batches need; automatic or manual optimization."""

    def __init__(self, manual: bool, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = not manual
        self.rank = rank
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 3))
        self.auxiliary = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.auxiliary(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        x = share(batch, self.rank)
        loss = self.net(x).square().mean()
        if x[0, 0] > 0:
            loss = loss + self.auxiliary(x).square().mean()
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def lightning(manual: bool, rank: int) -> dict[str, Tensor]:
    """What a LightningModule holds after training by DDPStrategy, ranges observed in training."""
    config = QuantConfig(weight=TensorScheme(bits=8, range="dynamic"), activation=TensorScheme(bits=8, **RANGES["ema"]))
    module = qat.prepare(Two(manual, rank), config, torch.ones(ROWS, FEATURES))
    trainer = L.Trainer(
        accelerator="cpu", devices=WORLD, strategy=DDPStrategy(find_unused_parameters=True), max_epochs=1,
        barebones=True, use_distributed_sampler=False, callbacks=[QATSchedule(quantize_at=4)],
    )  # fmt: skip
    trainer.fit(module, DataLoader([inputs(step, "either") for step in range(STEPS)], batch_size=None))
    return state(module)


NORMS = ("ema", "learned")


class Norms(nn.Module):
    """BatchNorm behind a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(64, 8)
        self.norm2, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x))).flatten(1)
        return self.head(F.relu(self.norm2(self.fc(y))))


def norms(ranges: str, rank: int | None = None) -> dict[str, Tensor]:
    """A network with BatchNorm after some steps; in one process, each half of the batch has statistics of its own."""
    torch.manual_seed(0)
    config = QuantConfig(
        weight=TensorScheme(bits=8, range="dynamic"), activation=TensorScheme(bits=8, **RANGES[ranges])
    )
    batches = [torch.randn(WORLD * ROWS, 2, 6, 6) * (1 + i % 3) for i in range(STEPS)]
    net = qat.prepare(Norms(), config, batches[0])
    qat.calibrate(net, [share(x, rank) for x in batches[:2]])
    net.train()
    if rank is None:
        for norm in (net.get_submodule("norm"), net.get_submodule("norm2")):
            norm.__class__ = type("Halves", (type(norm),), {"forward": _by_halves})
    model = net if rank is None else DistributedDataParallel(net, find_unused_parameters=True)  # frozen scales
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for step, x in enumerate(batches):
        if step == STEPS // 2:
            set_mode(net, "frozen")
        optimizer.zero_grad()
        model(share(x, rank)).square().mean().backward()
        optimizer.step()
    return state(net)


def _by_halves(norm: Any, x: Tensor) -> Tensor:
    """As DDP does: the second process's statistics are used, and those of the first are kept."""
    first, second = (share(x, rank) for rank in range(WORLD))
    y = F.batch_norm(second, None, None, norm.weight, norm.bias, True, norm.momentum, norm.eps)
    return torch.cat([super(type(norm), norm).forward(first), y])


def results(rank: int) -> dict[Any, Any]:
    """What one process finds."""
    found: dict[Any, Any] = {case: train(*case, rank) for case in CASES}
    for ranges in NORMS:
        found["norms", ranges] = norms(ranges, rank)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "GROUP_RANK": "0",
                   "LOCAL_WORLD_SIZE": str(WORLD), "TORCHELASTIC_RUN_ID": "test",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # fmt: skip
    for manual in (False, True):
        found["lightning", manual] = lightning(manual, rank)
    return found
