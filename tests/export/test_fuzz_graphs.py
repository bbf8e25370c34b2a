"""Random networks with random schemes: trained a step, exported, and held to the parity rule.

One failing seed again, with what it consists of:

    QAT_FUZZ_SEED=123 pytest tests/export/test_fuzz_graphs.py -k one_seed
"""

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import track
from torch import Tensor, fx

import qat
from qat.export.c_header import open_c_header
from qat.export.given import integers_given
from qat.export.onnx_stored import check_onnx
from qat.export.onnxruntime import OnnxNetwork, onnx_given
from qat.export.parity import ParityLimits, decisions, measure, ties_given, training_integers
from qat.ptq import PTQConfig, finalize
from qat.runtime import IntegerConv, IntegerNetwork
from qat.runtime.operations import Dequantize, QuantizeInput
from qat.runtime.recurrent import Recurrent
from qat.runtime.stored import Simulate
from qat.targets import TARGETS
from tests.fuzz.networks import Network, random_network
from tests.fuzz.schemes import random_config

Tensors = dict[str, Tensor]
Inputs = tuple[Tensor, ...]
COUNTS = Counter[str]()
"""What became of the networks of this process."""
SIMULATED = 1 / 32
"""The share of samples that a tie may move in a network whose ties are not known."""
WITHOUT_FLOATS = "cannot be computed without floats"
NO_GROUPS = "is no matrix of whole groups of"
IN_CI, IN_ALL, CHUNKS = 40, 1000, 8


def describe(seed: int, net: Network, config: qat.QuantConfig) -> str:
    steps = "\n".join(f"  {i}: {step.words} of {step.reads}" for i, step in enumerate(net.steps, 1))
    steps += f"\n  returned beside the last: {net.more}" if net.more else ""
    fields = [f"  {name}: {scheme}" for name, scheme in config.to_dict().items()]
    return f"QAT_FUZZ_SEED={seed}\n{steps}\n" + "\n".join(fields)


def trained(net: Network, config: qat.QuantConfig, x: Inputs) -> fx.GraphModule:
    """Prepared, calibrated, trained for a step, and finalized."""
    prepared = qat.prepare(net, config, example(x))
    qat.calibrate(prepared, [x])
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
    prepared.train()
    y = first(prepared(*x))
    (y / y.detach().abs().max().clamp(min=1e-6)).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(prepared.parameters(), 1.0)
    optimizer.step()
    finalize(prepared, [x], PTQConfig(adaptive_rounding_steps=0), trained=True)
    return prepared


@torch.no_grad()
def assert_files_agree(prepared: fx.GraphModule, config: qat.QuantConfig, x: Inputs, folder: Path) -> None:
    """Layer by layer given equal integers, and in every decision on which no tie has an influence.

    The rule for layers is asked of whatever lies on a grid: an integer is at most a step off, 99.9 % are equal. What is
    simulated (floats, ranges computed from the tensor at hand) has no integers to be given, so of networks with such
    activations it says less, and their ties are not known. They are compared from end to end, a step of the least grid
    being what one value on a tie may move: SIMULATED says how many samples may differ.
    """
    network = qat.lower(prepared)
    assert_no_pair_is_left(network)
    formats = ["int8", "onnx"] if holds_onnx(network, config) else ["int8"]
    paths = qat.export(network, folder, example(x), formats=formats)
    reloaded = qat.load(paths["int8"])
    for mine, other in zip(every(network(*x)), every(reloaded(*x)), strict=True):
        assert torch.equal(mine, other)
    pairs = measure(prepared, network, paths, x, target=config.target)
    for pair, parity in pairs.items():
        parity.check(pair, ParityLimits(agreement=0.0))
    given = training_integers(prepared, network, *x)
    ties = ties_given(network, x, given)
    expected = first(prepared(*x))
    files = {"int8": (first(reloaded(*x)), integers_given(reloaded, x, given))}
    if "onnx" in paths:
        onnx, target = paths["onnx"], config.target
        files["onnx"] = (
            first(OnnxNetwork(onnx, target)(*x)),
            onnx_given(onnx, target, network.grids(), x, given).integers,
        )
    samples = len(expected)
    for name, (outputs, integers) in files.items():
        difference = (outputs - expected).abs().reshape(samples, -1).mean(1) / expected.std().clamp(min=1e-5)
        equal = (decisions(expected) == decisions(outputs)).reshape(samples, -1).all(1) | close(expected)
        if any(isinstance(layer, Simulate) for layer in network.modules()):
            COUNTS["simulated"] += 1
            assert (difference > 0.02).float().mean() <= SIMULATED, f"{name}: results differ: {difference.tolist()}"
            assert (~equal).float().mean() <= SIMULATED, f"{name}: decisions differ for {unequal(equal)}"
        else:
            tied = at_ties(samples, given, integers, ties)
            assert difference[~tied].sum() <= 0.02 * samples, f"{name}: results differ: {difference.tolist()}"
            assert (equal | tied).all(), f"{name}: decisions differ for {unequal(equal | tied)}"


def assert_no_pair_is_left(network: IntegerNetwork) -> None:
    """Nothing is dequantized only to be put on the same grid again, and no tensor twice on one grid."""
    made = {node.name: network.layer(node.name) for node in network.nodes}
    seen: dict[tuple[Any, ...], str] = {}
    for node in network.nodes:
        layer = made[node.name]
        if isinstance(layer, QuantizeInput):
            assert layer.output is not None
            grid = tuple(layer.output.spec().values()), float(layer.output.scale), int(layer.output.zero_point)
            source = made.get(node.inputs[0])
            if isinstance(source, Dequantize):
                before = tuple(source.grid.spec().values()), float(source.grid.scale), int(source.grid.zero_point)
                assert grid != before, f"'{node.name}' is put on the grid that it was on"
            twin = seen.setdefault((node.inputs[0], *grid), node.name)
            assert twin == node.name, f"'{twin}' and '{node.name}' are the same integers"


def assert_header_agrees(network: IntegerNetwork, x: Inputs, folder: Path) -> bool:
    """NumPy computes the same from `model.h`; False where the runners lack a layer, which is refused by name."""
    try:
        qat.export(network, folder, example(x), formats=["c_header"])
    except ValueError as error:
        if "c_header: " not in str(error):
            raise
        return False
    with torch.no_grad():
        assert torch.equal(open_c_header(folder / "c_header")(*x), network(*x)), "c_header: another result"
    return True


def example(x: Inputs) -> Inputs:
    return tuple(part[:2] for part in x)


def every(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def first(outputs: Any) -> Tensor:
    return every(outputs)[0]


def unequal(equal: Tensor) -> list[int]:
    return (~equal).nonzero().flatten().tolist()


def at_ties(samples: int, given: Tensors, made: Tensors, ties: Tensors) -> Tensor:
    """The samples of which a value was next to a tie and was rounded the other way, [samples]."""
    found = torch.zeros(samples, dtype=torch.bool)
    for name in ties.keys() & made.keys():
        found |= ((made[name].int() != given[name].int()) & ties[name]).flatten(1).any(1)
    return found


def close(outputs: Tensor) -> Tensor:
    """The samples of which the two best results are equal but for the rounding of a float32 sum, [samples]."""
    best = outputs.topk(2, dim=1).values if outputs.shape[1] > 1 else torch.cat([outputs, torch.zeros_like(outputs)], 1)
    margin = (best[:, 0] - best[:, 1]).abs().reshape(len(outputs), -1).amin(1)
    return margin <= 1e-4 * outputs.abs().max() + 1e-5


def holds_onnx(network: IntegerNetwork, config: qat.QuantConfig) -> bool:
    """Whether an ONNX file can hold it: the schemes, and no recurrent layer."""
    if any(isinstance(layer, Recurrent) for layer in network.modules()):
        return False
    try:
        check_onnx(config)
    except ValueError:
        return False
    return True


def run(seed: int) -> None:
    """One random network, the whole way. What became of it is counted in COUNTS.

    Raises:
        AssertionError: what failed, in words, with the seed and what was drawn from it.
    """
    COUNTS["all"] += 1
    net, x = random_network(seed)
    config = random_config(seed, channels=not any(step.words.startswith("cat") for step in net.steps))
    try:
        qat.prepare(net, config, example(x))
    except ValueError as error:
        if f"target={config.target}" not in str(error):
            raise AssertionError(f"{error}\n{describe(seed, net, config)}") from error
        COUNTS["drawn target refused"] += 1
        config.target = "generic"  # the one that was drawn does not run every layer of this network
    words = describe(seed, net, config)
    fixed = TARGETS[config.target].requantize == "fixed_point"
    COUNTS["fixed point"] += fixed
    try:
        prepared = trained(net, config, x)
        with tempfile.TemporaryDirectory() as folder:
            assert_files_agree(prepared, config, x, Path(folder))
            if fixed and len(x) == 1 and not net.more:
                COUNTS["headers"] += assert_header_agrees(qat.lower(prepared), x, Path(folder))
    except Exception as error:
        if fixed and WITHOUT_FLOATS in str(error):
            COUNTS["fixed point refused"] += 1  # a layer that has no integer form, refused by name
            return
        if NO_GROUPS in str(error):  # of a size that the target's form of weights in groups does not fit
            COUNTS["groups refused"] += 1
            return
        raise AssertionError(f"{type(error).__name__}: {error}\n{words}") from error


def assert_most_were_tried(counts: Counter[str]) -> None:
    """Refusals are right, and a generator that draws little else would try nothing."""
    assert counts["drawn target refused"] <= 0.3 * counts["all"], counts
    assert counts["fixed point refused"] <= 0.5 * counts["fixed point"], counts
    assert counts["headers"] >= 0.08 * counts["fixed point"], counts


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_parity_of_random_networks(chunk: int) -> None:
    for seed in range(chunk, IN_CI, CHUNKS):
        run(seed)


def test_most_networks_were_tried() -> None:
    if COUNTS["all"] < IN_CI:
        pytest.skip("counts what the tests before it do")
    assert_most_were_tried(COUNTS)


def test_a_wrong_lowering_is_found_and_its_seed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = qat.lower

    def wrong(prepared: fx.GraphModule) -> IntegerNetwork:
        network = right(prepared)
        layer = next(m for m in network.modules() if isinstance(m, IntegerConv) and m.output is not None)
        layer.weight.neg_()
        return network

    monkeypatch.setattr(qat, "lower", wrong)
    with pytest.raises(AssertionError, match=r"(?s)departs given equal inputs.*QAT_FUZZ_SEED=5\n"):
        run(5)


@pytest.mark.skipif("QAT_FUZZ_SEED" not in os.environ, reason="for a seed that failed: set QAT_FUZZ_SEED")
def test_one_seed() -> None:
    run(int(os.environ["QAT_FUZZ_SEED"]))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_parity_of_a_thousand_random_networks() -> None:
    failed: dict[int, str] = {}
    for seed in track(range(IN_ALL), description="random networks"):
        try:
            run(seed)
        except AssertionError as error:
            failed[seed] = str(error)
    print(COUNTS)
    assert_most_were_tried(COUNTS)
    assert not failed, f"{len(failed)} of {IN_ALL} seeds fail: {sorted(failed)}\n" + "\n".join(failed.values())
