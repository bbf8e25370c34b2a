"""Every rounding and every observer, chosen as a user chooses it, from prepare to the integer network."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import qat
from qat import hydra_schema
from qat.modes import quantizers
from qat.numerics.rounding import ROUNDING
from qat.observers import OBSERVERS
from qat.ptq import PTQConfig, finalize
from qat.zoo.data import Digits
from qat.zoo.models import SmallCNN

CASES = [f"quant.weight.rounding={name}" for name in ROUNDING] + [
    f"quant.{part}.observer={name}" for name in OBSERVERS for part in ("weight", "activation")
]


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = Digits(name="digits", channels=1, image_size=8, num_classes=10, mean=[0.3], std=[0.4], batch_size=64)
    return [batch for batch, _ in zip(data.train_dataloader(), range(8), strict=False)]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("override", CASES)
def test_it_trains_and_the_integer_network_computes_the_same(
    override: str, batches: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    torch.manual_seed(0)
    config = hydra_schema.quant_config(compose("config", ["quant=w4a8", override]))
    inputs = [x for x, _ in batches]
    net = qat.prepare(SmallCNN(in_channels=1, num_classes=10), config, inputs[0])
    assert any(q.scheme == getattr(config, override.split(".")[1]) for _, q in quantizers(net))
    qat.calibrate(net, inputs)
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for x, y in batches * 3:
        loss = torch.nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    finalize(net, inputs, PTQConfig(), trained=True)
    integer = qat.lower(net)
    with torch.no_grad():
        simulated, computed = net(inputs[0]), integer(inputs[0])
    assert ((simulated - computed).abs().amax(dim=1) < 1e-5).float().mean() >= 0.9  # else a tie fell the other way
    assert torch.equal(simulated.argmax(1), computed.argmax(1))


def test_a_stochastic_weight_is_rounded_at_random_in_training_only(
    batches: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    config = qat.preset("w4a8", weight={"rounding": "stochastic"})
    net = qat.prepare(SmallCNN(in_channels=1, num_classes=10), config, batches[0][0])
    qat.calibrate(net, [batches[0][0]])
    layer = net.get_submodule("stem.0")
    net.train()
    assert not torch.equal(layer.quantized_weight(), layer.quantized_weight())
    net.eval()
    evaluated = layer.quantized_weight()
    assert torch.equal(layer.quantized_weight(), evaluated)
    net.train()
    qat.set_mode(net, "frozen")
    assert torch.equal(layer.quantized_weight(), evaluated)
    folded = qat.lower(net).layer("stem.0")
    scale, _ = layer.weight_quantizer.qparams(layer.weight)
    expected = torch.round(evaluated / scale.reshape(-1, 1, 1, 1))
    assert torch.equal(folded.weight.float().abs(), expected.detach().abs())  # signs follow BatchNorm's


def test_logarithmic_rounding_has_no_learned_scale() -> None:
    with pytest.raises(ValueError, match=r"rounding=logarithmic: .*learned scale.*use quant\.weight\.range=dynamic"):
        qat.preset("w4a4_lsq", weight={"rounding": "logarithmic"})


def test_seeded_draws_go_on_where_a_checkpoint_ends() -> None:
    def prepared() -> torch.nn.Module:
        torch.manual_seed(0)
        weight = {"bits": 3, "range": "dynamic", "rounding": "stochastic", "rounding_seed": 1}
        layers = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
        layers[1].weight = torch.nn.Parameter(layers[0].weight.detach().clone())
        net = qat.prepare(layers, qat.QuantConfig.from_dict({"weight": weight}), torch.randn(2, 16))
        qat.calibrate(net, [torch.randn(2, 16)])
        return net.train()

    def rounded(net: torch.nn.Module, layer: str = "0") -> torch.Tensor:
        return net.get_submodule(layer).quantized_weight()

    net, again = prepared(), prepared()
    for _ in range(3):
        rounded(net)
    again.load_state_dict(net.state_dict())
    qat.set_mode(again, "quantize")
    following = rounded(net)
    assert torch.equal(rounded(again), following)
    assert not torch.equal(rounded(net), following)
    first = prepared()
    assert not torch.equal(rounded(first, "0"), rounded(first, "1"))  # equal weights of two names
