"""What each process of `test_shard.py` does, as a script: `sharded.py RANK FOLDER`; one process calls `train`."""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import qat
from qat.modes import set_mode
from qat.scheme import Granularity, QuantConfig, TensorScheme
from qat.training.shard import shard

WORLD, STEPS = 2, 5
RANGES = {"running": ("dynamic", "running"), "learned": ("learned", "learned")}
"""Name -> range of the weights and of the activations."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm2, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.qkv(self.norm(x))
        q, k, v = (h[..., 16 * i : 16 * i + 16].unflatten(-1, (2, 8)).transpose(1, 2) for i in range(3))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(12, 16), nn.Parameter(torch.randn(6, 16) / 10)
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(x) + self.position))


def prepared(kind: str) -> nn.Module:
    torch.manual_seed(0)
    weight, activation = RANGES[kind]
    config = QuantConfig(
        weight=TensorScheme(bits=8, range=weight, granularity=Granularity.channel),
        activation=TensorScheme(bits=8, range=activation),
    )
    return qat.prepare(Transformer(), config, tokens(0))


def tokens(batch: int) -> Tensor:
    return torch.randint(12, (4, 6), generator=torch.Generator().manual_seed(batch))


def share(x: Tensor, rank: int | None) -> Tensor:
    return x if rank is None else x[rank::WORLD]


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(net(x).flatten(0, 1), x.flatten())


def mean_over_processes(loss: Tensor, rank: int | None) -> float:
    loss = loss.detach().clone()
    if rank is not None:
        distributed.all_reduce(loss)
        loss /= WORLD
    return float(loss)


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def train(kind: str, rank: int | None = None) -> dict[str, Any]:
    """Losses of the whole batch at each step, and everything that the network holds in the end."""
    net = prepared(kind)
    qat.calibrate(net, [share(tokens(i), rank) for i in range(3)])
    net.train()
    sharded: list[str] = []
    if rank is not None:
        shard(net)
        sharded = [name for name, p in net.named_parameters() if isinstance(p, DTensor)]
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.05), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(net, share(tokens(step), rank))
        loss.backward()
        optimizer.step()
        losses.append(mean_over_processes(loss, rank))
    set_mode(net, "frozen")  # asks every quantizer whether it is calibrated
    return {"losses": losses, "state": {k: whole(t) for k, t in net.state_dict().items()}, "sharded": sharded}


class Module(L.LightningModule):
    """As a user writes it for ModelParallelStrategy."""

    def __init__(self, net: nn.Module, rank: int) -> None:
        super().__init__()
        self.net, self.rank, self.losses = net, rank, []

    def configure_model(self) -> None:
        shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = loss_of(self.net, share(batch, self.rank))
        self.losses.append(mean_over_processes(loss, self.rank))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def with_lightning(kind: str, rank: int) -> dict[str, Any]:
    net = prepared(kind)
    qat.calibrate(net, [share(tokens(i), rank) for i in range(3)])
    module = Module(net.train(), rank)
    strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=strategy,
        max_steps=STEPS,
        barebones=True,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader([tokens(step) for step in range(STEPS)], batch_size=None))
    return {"losses": module.losses, "state": {k: whole(t) for k, t in net.state_dict().items()}}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "GROUP_RANK": "0",
                   "LOCAL_WORLD_SIZE": str(WORLD), "TORCHELASTIC_RUN_ID": "test",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # fmt: skip
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=WORLD)
    result: dict[str, Any] = {kind: train(kind, rank) for kind in RANGES}
    result["lightning"] = with_lightning("learned", rank)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    torch.save(result, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
