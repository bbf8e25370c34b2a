"""What each process of `test_distributed.py` does, as a script: `ranks.py RANK FOLDER`; one process calls `phases`."""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import branches
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import qat
from qat.layers import QuantizedLayer
from qat.modes import quantizers, set_mode
from qat.scheme import Granularity, QuantConfig, TensorScheme

WORLD = 2
CHANNEL = Granularity.channel

SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fixed minmax": ({}, {}),
    "fixed percentile": ({}, {"observer": "percentile", "percentiles": [5.0, 95.0]}),
    "fixed sigma": ({}, {"observer": "sigma"}),
    "fixed absmax": ({}, {"observer": "absmax"}),
    "fixed mse": ({}, {"observer": "mse"}),
    "fixed lp": ({}, {"observer": "lp"}),
    "fixed entropy": ({}, {"observer": "entropy", "bits": 4}),
    "running minmax": ({}, {"range": "running"}),
    "running ema": ({}, {"range": "running", "observer": "ema", "momentum": 0.3}),
    "running percentile": ({}, {"range": "running", "observer": "percentile", "percentiles": [5.0, 95.0]}),
    "learned": ({"range": "learned", "granularity": CHANNEL}, {"range": "learned"}),
    "pact": ({}, {"range": "pact"}),
    "codebook": ({"format": "codebook", "bits": 3, "range": "learned", "granularity": CHANNEL, "refresh": 2}, {}),
    "seeded": ({"rounding": "stochastic", "bits": 3, "rounding_seed": 5}, {}),
    "adaptive": ({"rounding": "adaptive", "range": "fixed"}, {}),
}
"""Name -> changes to the weight's and to the activation's scheme."""


def inputs(batch: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(batch)) * (1 + batch)


def share(x: Tensor, rank: int | None) -> Tensor:
    """A process's part of a batch; all of it where there is one process."""
    return x if rank is None else x[rank::WORLD]


def prepared(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    weight, activation = SCHEMES[name]
    scheme = QuantConfig(
        weight=TensorScheme(**{"bits": 8, "range": "dynamic", **weight}),
        activation=TensorScheme(**{"bits": 8, "range": "fixed", **activation}),
    )
    return qat.prepare(net, scheme, inputs(0))


def train(net: nn.Module, rank: int | None, first: int) -> None:
    model = net if rank is None else DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for step in range(first, first + 4):
        optimizer.zero_grad()
        model(share(inputs(step % 5), rank)).square().mean().backward()
        optimizer.step()


def state(net: nn.Module) -> dict[str, Tensor]:
    """Everything that quantizers hold, and the weights."""
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


def phases(name: str, rank: int | None = None) -> dict[str, dict[str, Tensor]]:
    """What a network holds after each phase."""
    net, result = prepared(name), {}
    qat.calibrate(net, [share(inputs(i), rank) for i in range(3)])
    result["calibrated"] = state(net)
    net.train()
    train(net, rank, 3)
    result["trained"] = state(net)
    set_mode(net, "frozen")
    train(net, rank, 7)
    result["frozen"] = state(net)

    net = prepared(name).train()
    set_mode(net, "observe")
    train(net, rank, 1)
    weights = {m.weight_quantizer: m.weight for m in net.modules() if isinstance(m, QuantizedLayer)}
    for _, quantizer in quantizers(net):
        if quantizer in weights:
            quantizer.set_range_from(weights[quantizer])
        else:
            quantizer.set_range_from_observer()
    result["observed"] = state(net)
    return result


def unequal_shares(rank: int | None) -> dict[str, Tensor]:
    """Three batches in the first process, one in the second."""
    net = prepared("fixed percentile")
    qat.calibrate(net, [inputs(i) for i in range(4) if rank is None or (i < 3) == (rank == 0)])
    return state(net)


def message(kind: type[Exception], work: Any, *args: Any) -> str:
    try:
        work(*args)
    except kind as error:
        return str(error)
    return ""


def refusals(rank: int) -> dict[str, str]:
    """What each process is told when one of them fails."""
    bad = inputs(0)
    if rank == 1:
        bad[0, 0] = torch.nan
    counts = [inputs(i) for i in range(2 + rank)]
    return {
        "nan": message(Exception, qat.calibrate, prepared("fixed minmax"), [bad]),
        "counts": message(ValueError, qat.calibrate, prepared("running ema"), counts),
        "none": message(ValueError, qat.calibrate, prepared("fixed minmax"), []),
    }


def unused_branch(rank: int, find: bool) -> str:
    """Train one of two prepared networks; the other's learned scales get no gradient."""
    both = nn.ModuleList([prepared("learned"), prepared("learned")])
    for net in both:
        qat.calibrate(net, [share(inputs(0), rank)])
    before = state(both[1])

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = both

        def forward(self, x: Tensor) -> Tensor:
            return self.both[0](x)

    model = DistributedDataParallel(First().train(), find_unused_parameters=find)
    for step in range(3):
        model(share(inputs(step), rank)).square().mean().backward()
    assert all(torch.equal(t, before[name]) for name, t in both[1].state_dict().items())
    return "trained"


def draws(seed: int | None) -> list[Tensor]:
    """What stochastic rounding makes of a weight in two steps of training."""
    torch.manual_seed(0)
    weight = {"bits": 3, "range": "dynamic", "rounding": "stochastic", "rounding_seed": seed}
    layer = qat.prepare(nn.Sequential(nn.Linear(32, 32)), QuantConfig.from_dict({"weight": weight}), torch.randn(2, 32))
    qat.calibrate(layer, [torch.randn(2, 32)])
    layer.train()
    torch.randn(1 if not distributed.is_initialized() else 1 + distributed.get_rank())  # processes are never in step
    return [layer.get_submodule("0").quantized_weight().detach() for _ in range(2)]


def lone(rank: int) -> float:
    """One process calibrates while the other does something else."""
    if rank != 0:
        return 0.0
    net = prepared("running ema")
    with qat.processes.alone():
        qat.calibrate(net, [inputs(0)])
    return float(next(q.scale for name, q in quantizers(net) if name.startswith("quantizers.")))


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=WORLD,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    result: dict[str, Any] = {name: phases(name, rank) for name in SCHEMES}
    result["unequal shares"] = unequal_shares(rank)
    result["refusals"] = refusals(rank)
    result["draws"] = {"own": draws(None), "asked": draws(5)}
    result["alone"] = lone(rank)
    result["unused"] = unused_branch(rank, True)
    result["unused, not looked for"] = message(RuntimeError, unused_branch, rank, False)
    result["branches"] = branches.results(rank)
    torch.save(result, folder / f"{rank}.pt")
    if distributed.is_initialized():  # Lightning may have ended it
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
