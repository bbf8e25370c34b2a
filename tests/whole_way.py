"""What a network goes through, from float to the files, with what must hold on the way."""

import copy
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import qat
from qat.export.formats import integers_given
from qat.export.given import tensors_of
from qat.export.onnxruntime import OnnxNetwork, onnx_given
from qat.export.parity import training_integers
from qat.ptq import PTQConfig, finalize
from qat.runtime import IntegerNetwork

Inputs = tuple[Tensor, ...]


def config(bits: int, **others: Any) -> qat.QuantConfig:
    activation = {"bits": bits, "symmetric": False}
    weight = {"bits": bits, "granularity": "channel"}
    return qat.QuantConfig.from_dict({"weight": weight, "activation": activation, "input": activation} | others)


@torch.no_grad()
def assert_sixteen_bits_are_float(net: nn.Module, inputs: Inputs, tolerance: float = 1e-3) -> None:
    """Placement adds no error of its own: not in the simulation, and not in the integer network."""
    net.eval()
    expected = tensors_of(net(*inputs))
    prepared = qat.prepare(net, config(16), tuple(x[:4] for x in inputs))
    qat.calibrate(prepared, [inputs])
    prepared.eval()
    for got in (tensors_of(prepared(*inputs)), tensors_of(qat.lower(prepared)(*inputs))):
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (got[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


def trained(net: nn.Module, inputs: Inputs, settings: qat.QuantConfig | None = None) -> fx.GraphModule:
    """Prepared, calibrated and trained for a step, in which every parameter has a finite gradient; reloaded."""
    settings = settings or config(8)
    example = tuple(x[:4] for x in inputs)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    prepared = qat.prepare(net, settings, example)
    assert set(before) <= set(prepared.state_dict())
    prepared.load_state_dict(before, strict=False)
    qat.calibrate(prepared, [inputs])
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
    prepared.train()
    _first(prepared(*inputs)).square().mean().backward()
    used = {id(p) for p in net.parameters()}
    for name, parameter in prepared.named_parameters():
        assert id(parameter) in used or "quantizer" in name, name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    optimizer.step()
    prepared.eval()
    again = qat.prepare(copy.deepcopy(net), settings, example).eval()
    file = io.BytesIO()
    torch.save(prepared.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    qat.set_mode(again, "quantize")
    assert torch.equal(_first(again(*inputs)), _first(prepared(*inputs)))
    assert torch.equal(_first(copy.deepcopy(prepared)(*inputs)), _first(prepared(*inputs)))
    return prepared


@torch.no_grad()
def assert_files_agree(prepared: fx.GraphModule, inputs: Inputs, folder: Path, onnx: bool = True) -> IntegerNetwork:
    """Finalized, lowered, written and read: each layer makes training's integers of training's integers."""
    with torch.enable_grad():
        finalize(prepared, [inputs], PTQConfig(adaptive_rounding_steps=0), trained=True)
    network = qat.lower(prepared)
    expected, simulated = network.run(*inputs), _first(prepared(*inputs))
    result = expected[network.outputs[0]]
    assert (result - simulated).abs().mean() <= 0.02 * simulated.std()
    given = training_integers(prepared, network, *inputs)
    assert given
    example = tuple(x[:3] for x in inputs)
    paths = qat.export(network, folder, example, formats=["int8", "onnx"] if onnx else ["int8"])
    loaded = qat.load(folder / "model.safetensors")
    assert torch.equal(loaded.run(*inputs)[network.outputs[0]], result)
    made = [integers_given(network, inputs, given)]
    if (kernels := loaded.fast_path().plan) is not None:
        made.append(kernels.integers(given, *inputs))
    if onnx:
        path = next(p for p in paths.values() if str(p).endswith(".onnx"))
        made.append(onnx_given(path, "generic", network.grids(), inputs, given).integers)
        assert (_first(OnnxNetwork(path)(*inputs)) - result).abs().mean() <= 0.02 * simulated.std()
    for integers in made:
        assert integers.keys() == given.keys()
        for name, wanted in given.items():
            steps = (integers[name].int() - wanted.int()).abs()
            assert steps.max() <= 1, name
            assert (steps != 0).sum() <= max(1, 1e-3 * steps.numel()), name
    return network


def _first(output: Any) -> Tensor:
    """The first tensor that a network returns."""
    return output if isinstance(output, Tensor) else output[0]
