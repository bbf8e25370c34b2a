import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qat
from qat.layers import QuantizedLayer
from qat.mode import Mode
from qat.modes import get_mode, quantizers, set_mode
from qat.zoo.models import SmallCNN

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [torch.randn(8, 1, 8, 8, generator=GENERATOR) * (i + 1) for i in range(3)]


def prepared(preset: str = "int8", **changes: Any) -> fx.GraphModule:
    torch.manual_seed(0)
    return qat.prepare(SmallCNN(1, 10), qat.preset(preset, **changes), BATCHES[0])


def scales(net: nn.Module) -> dict[str, Tensor]:
    return {name: q.scale.detach().clone() for name, q in quantizers(net) if hasattr(q, "scale")}


def test_modes_that_quantize_are_refused_before_calibration() -> None:
    net = prepared()
    for mode in ("quantize", "frozen"):
        with pytest.raises(RuntimeError, match=r"^8 quantizers have no range yet, the first is 'quantizers\.\w+'; run"):
            set_mode(net, mode)
    qat.calibrate(net, BATCHES)
    assert get_mode(net) is Mode.quantize
    for mode in ("frozen", "quantize", "float"):
        set_mode(net, mode)


def test_ranges_are_those_of_the_float_activations() -> None:
    fixed = {"bits": 8, "range": "fixed", "observer": "minmax"}
    net = prepared(activation=fixed, input=fixed)
    reference = SmallCNN(1, 10)
    reference.load_state_dict(net.state_dict(), strict=False)
    reference.eval()
    seen: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = max(seen.get(name, 0.0), output.abs().max().item())

        return hook

    watched = {
        "stem_0": reference.stem[2],
        "block_conv1": reference.block.relu1,
        "block_conv2": reference.block.bn2,
        "block_add": reference.block.relu2,
        "conv1_0": reference.conv1[2],
        "conv2_0": reference.conv2[2],
        "pool": reference.pool,
    }
    for name, module in watched.items():
        module.register_forward_hook(watch(name))
    with torch.no_grad():
        for batch in BATCHES:
            reference(batch)
    seen["x"] = max(batch.abs().max().item() for batch in BATCHES)
    qat.calibrate(net, BATCHES)
    assert {name.removeprefix("quantizers.") for name in scales(net)} == set(seen)
    for name, scale in scales(net).items():
        name = name.removeprefix("quantizers.")
        levels = 127 if name in ("x", "block_conv2") else 255
        assert scale.item() == pytest.approx(seen[name] / levels, rel=1e-4), name


def test_fixed_weight_ranges_are_the_weights() -> None:
    net = prepared(weight={"bits": 8, "range": "fixed"})
    qat.calibrate(net, BATCHES)
    for module in net.modules():
        if isinstance(module, QuantizedLayer):
            expected = module.weight.detach().flatten(1).abs().amax(dim=1) / 127
            assert torch.allclose(module.weight_quantizer.scale, expected)


def test_calibrating_again_forgets_what_was_seen() -> None:
    net = prepared()
    qat.calibrate(net, [batch * 100 for batch in BATCHES])
    wide = scales(net)
    qat.calibrate(net, BATCHES)
    narrow = scales(net)
    fresh = prepared()
    qat.calibrate(fresh, BATCHES)
    assert all(torch.equal(narrow[name], scale) for name, scale in scales(fresh).items())
    assert wide["quantizers.x"] > 50 * narrow["quantizers.x"]


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_statistics_and_training_flags_are_left_alone(training: bool) -> None:
    net = prepared().train(training)
    net.conv1.eval()  # a part that the user froze
    flags = {name: module.training for name, module in net.named_modules()}
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k or "batches" in k or "weight" in k}
    qat.calibrate(net, BATCHES)
    assert {name: module.training for name, module in net.named_modules()} == flags
    after = net.state_dict()
    assert any("running_mean" in key for key in before)
    assert all(torch.equal(after[k], v) for k, v in before.items() if "weight_quantizer" not in k)


def test_no_gradients_are_recorded() -> None:
    net = prepared("w4a4_lsq")
    enabled = []
    net.linear.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    qat.calibrate(net, BATCHES)
    assert enabled == [False] * 3
    assert all(q.scale.is_leaf and q.scale.grad is None for _, q in quantizers(net) if q.scale.requires_grad)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_batch_that_is_not_finite_is_named(value: float) -> None:
    net = prepared()
    flags = {name: module.training for name, module in net.named_modules()}
    bad = BATCHES[1].clone()
    bad[0, 0, 0, :2] = value
    with pytest.raises(ValueError, match="calibration batch 1 holds 2 non-finite values"):
        qat.calibrate(net, [BATCHES[0], bad])
    assert {name: module.training for name, module in net.named_modules()} == flags


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="at least one batch of inputs, got none"):
        qat.calibrate(prepared(), [])


def test_only_empty_batches_name_the_quantizer() -> None:
    with pytest.raises(RuntimeError, match=r"quantizer 'quantizers\.\w+': Ema has seen no data"):
        qat.calibrate(prepared(), [torch.empty(0, 1, 8, 8)])


def test_batches_may_be_a_generator_and_tuples() -> None:
    first, second = prepared(), prepared()
    qat.calibrate(first, (batch for batch in BATCHES))
    qat.calibrate(second, [(batch,) for batch in BATCHES])
    assert all(torch.equal(scales(second)[name], scale) for name, scale in scales(first).items())


# ---- afterwards ------------------------------------------------------------------------------------------------------


def test_running_ranges_move_in_training_and_not_in_eval_or_frozen() -> None:
    net = prepared()
    qat.calibrate(net, BATCHES)
    start = scales(net)

    def moved() -> set[str]:
        return {name for name, scale in scales(net).items() if not torch.equal(scale, start[name])}

    for mode, training in (("quantize", False), ("frozen", True), ("frozen", False), ("float", True)):
        set_mode(net, mode)
        net.train(training)
        net(BATCHES[2] * 10)
        assert moved() == set(), (mode, training)
    set_mode(net, "quantize")
    net.train()
    net(BATCHES[2] * 10)
    assert moved() == set(start)


def test_learned_scales_get_gradients_in_quantize_and_none_in_frozen() -> None:
    net = prepared("w4a4_lsq")
    qat.calibrate(net, BATCHES)
    learned = {name: q for name, q in quantizers(net) if isinstance(q.scale, nn.Parameter)}
    assert len(learned) == 6 + 7  # every weight and every activation but the input
    net.train()
    net(BATCHES[0]).square().mean().backward()
    for name, q in learned.items():
        assert q.scale.grad is not None, name
        assert torch.isfinite(q.scale.grad).all()
        assert q.scale.grad.abs().sum() > 0, name
    net.zero_grad(set_to_none=True)
    set_mode(net, "frozen")
    net(BATCHES[0]).square().mean().backward()
    assert all(q.scale.grad is None for q in learned.values())
    assert net.linear.weight.grad.abs().sum() > 0


def test_training_reduces_a_loss_with_every_preset() -> None:
    torch.manual_seed(0)
    x, y = BATCHES[0], torch.randint(0, 10, (8,))
    for preset in ("int8", "w8a8_asymmetric", "w4a4_lsq", "w2a2_lsq"):
        net = prepared(preset)
        qat.calibrate(net, BATCHES)
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        net.train()
        losses = []
        for _ in range(15):
            loss = nn.functional.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0], preset


def test_the_float_network_still_computes_in_float_while_its_twin_is_quantized() -> None:
    net = SmallCNN(1, 10).eval()
    expected = net(BATCHES[0])
    twin = qat.prepare(net, qat.preset("w4a4"), BATCHES[0])
    qat.calibrate(twin, BATCHES)
    assert torch.equal(net(BATCHES[0]), expected)
    assert not torch.equal(twin(BATCHES[0]), expected)
    set_mode(twin, "float")
    assert torch.equal(twin(BATCHES[0]), expected)
    other = copy.deepcopy(twin)
    set_mode(other, "quantize")
    assert get_mode(twin) is Mode.float
