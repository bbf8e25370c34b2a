import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.fake_quant import FakeQuantize
from qat.mode import Mode
from qat.modes import get_mode, quantizers, set_mode
from qat.observers import OBSERVERS
from qat.scheme import Granularity, TensorScheme, override

CHANNEL: dict[str, Any] = {"granularity": Granularity.channel, "narrow_range": True}


def calibrated(scheme: TensorScheme, *tensors: Tensor, mode: Mode = Mode.quantize, **options: Any) -> FakeQuantize:
    quantizer = FakeQuantize(scheme, **options)
    for x in tensors:
        quantizer.observe(x)
    if quantizer.observes:
        quantizer.set_range_from_observer()
    else:
        quantizer.set_range_from(tensors[-1])
    quantizer.mode = mode
    return quantizer


def test_float_mode_returns_the_very_tensor_or_its_relu() -> None:
    x = torch.randn(3, 4)
    assert FakeQuantize(TensorScheme(bits=8))(x) is x
    assert torch.equal(FakeQuantize(TensorScheme(bits=8), relu=True)(x), x.relu())


def test_observe_passes_through_and_records() -> None:
    quantizer = FakeQuantize(TensorScheme(bits=8, symmetric=False))
    quantizer.mode = Mode.observe
    x = torch.tensor([-1.0, 4.1])
    assert quantizer(x) is x
    assert not quantizer.calibrated
    quantizer.set_range_from_observer()
    assert quantizer.calibrated
    assert quantizer.scale.item() == pytest.approx(5.1 / 255, rel=1e-6)
    assert quantizer.zero_point.item() == 50


def test_relu_is_observed_after_clamping_and_gets_an_unsigned_grid() -> None:
    quantizer = calibrated(TensorScheme(bits=8), torch.tensor([-100.0, 5.1]), relu=True)
    assert (quantizer.quant_min, quantizer.quant_max) == (0, 255)
    assert quantizer.scale.item() == pytest.approx(0.02, rel=1e-6)
    assert torch.allclose(quantizer(torch.tensor([-3.0, 0.011, 9.0])), torch.tensor([0, 0.02, 5.1]))


def test_nonnegative_without_relu_takes_the_unsigned_grid() -> None:
    quantizer = FakeQuantize(TensorScheme(bits=4), nonnegative=True)
    assert (quantizer.quant_min, quantizer.quant_max, quantizer.relu) == (0, 15, False)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_weight_granularities_equal_aten(granularity: str) -> None:
    w = torch.randn(6, 3, 3, 3) * torch.logspace(-1, 1, 6).reshape(-1, 1, 1, 1)
    scheme = TensorScheme(bits=4, narrow_range=True, granularity=Granularity[granularity])
    quantizer = calibrated(scheme, w, shape=w.shape)
    if granularity == "tensor":
        scale = float(w.abs().max() / 7)
        expected = torch.fake_quantize_per_tensor_affine(w, scale, 0, -7, 7)
        assert quantizer.scale.shape == ()
    else:
        scale = w.abs().amax(dim=(1, 2, 3)) / 7
        expected = torch.fake_quantize_per_channel_affine(w, scale, torch.zeros(6, dtype=torch.int32), 0, -7, 7)
        assert quantizer.scale.shape == (6,)
    assert torch.allclose(quantizer(w), expected, atol=1e-5)


@pytest.mark.parametrize("range_mode", ["fixed", "running", "learned", "dynamic"])
def test_groups_have_scales_of_their_own(range_mode: str) -> None:
    w = torch.randn(4, 3, 2, 2)  # 12 inputs in groups of 5: 5, 5 and 2
    scheme = TensorScheme(
        bits=4, narrow_range=True, granularity=Granularity.group, group_size=5, allow_padding=True, range=range_mode
    )
    quantizer = FakeQuantize(scheme, shape=w.shape)
    quantizer.set_range_from(w)
    quantizer.mode = Mode.quantize
    y = quantizer(w)
    assert y.shape == w.shape
    scale, zero_point = quantizer.qparams(w)
    assert scale.shape == zero_point.shape == (4, 3)
    flat, expected = w.reshape(4, 12), torch.empty(4, 12)
    for row in range(4):
        for g, part in enumerate((slice(0, 5), slice(5, 10), slice(10, 12))):
            step = flat[row, part].abs().max() / 7
            assert scale[row, g].item() == pytest.approx(step.item(), rel=1e-6)
            expected[row, part] = torch.round(flat[row, part] / step) * step
    assert torch.allclose(y.reshape(4, 12), expected, atol=1e-6)


@pytest.mark.parametrize("fields", [
    {"format": "codebook", "granularity": "block", "block_size": [1, 2]},
    {"format": "product", "granularity": "group", "group_size": 2, "allow_padding": True},
    {"format": "product", "granularity": "group", "group_size": 2, "allow_padding": True, "subspaces": 2},
])  # fmt: skip
def test_what_fills_a_short_row_takes_no_entry(fields: dict[str, Any]) -> None:
    """With one bit, what fills would pull an entry from 3 or 5 halfway to zero."""
    w = torch.tensor([[5.0, 5, 5], [3, 3, 3], [5, 5, 3], [3, 3, 5]])
    quantizer = FakeQuantize(override(TensorScheme(bits=1, range="learned"), fields, ""), w.shape)
    quantizer.set_range_from(w)
    quantizer.mode = Mode.quantize
    assert torch.equal(quantizer(w), w)
    assert torch.equal(quantizer.eval()(w), w)


def test_dynamic_ranges_follow_the_tensor() -> None:
    quantizer = FakeQuantize(TensorScheme(bits=8, range="dynamic", **CHANNEL), shape=torch.Size([3, 5]))
    quantizer.mode = Mode.quantize
    assert quantizer.calibrated
    assert "scale" not in dict(quantizer.named_buffers())
    for factor in (1.0, 100.0):
        w = torch.randn(3, 5) * factor
        scale, _ = quantizer.qparams(w)
        assert torch.allclose(scale, w.abs().amax(dim=1) / 127)
        assert ((quantizer(w) - w).abs() <= scale.unsqueeze(1) * 0.51).all()
    with pytest.raises(ValueError, match="pass the tensor"):
        quantizer.qparams()


def test_dynamic_range_passes_gradients_to_the_weight() -> None:
    quantizer = FakeQuantize(TensorScheme(bits=4, range="dynamic", **CHANNEL), shape=torch.Size([3, 5]))
    quantizer.mode = Mode.quantize
    w = torch.randn(3, 5, requires_grad=True)
    grad = torch.randn(3, 5)
    quantizer(w).backward(grad)
    assert torch.equal(w.grad, grad)  # the range is the weight's own: nothing is clipped


# ---- running ---------------------------------------------------------------------------------------------------------


def test_running_ranges_move_in_training_only_and_not_when_frozen() -> None:
    scheme = TensorScheme(bits=8, narrow_range=True, range="running", observer="ema", momentum=0.5)
    quantizer = calibrated(scheme, torch.tensor([-1.27, 1.0]))
    wide = torch.tensor([-3.81, 1.0])
    assert quantizer.scale.item() == pytest.approx(0.01)
    for mode, training in ((Mode.quantize, False), (Mode.frozen, True), (Mode.frozen, False), (Mode.float, True)):
        quantizer.train(training)
        quantizer.mode = mode
        quantizer(wide)
        quantizer.set_range_from_observer()
        assert quantizer.scale.item() == pytest.approx(0.01)
    quantizer.train()
    quantizer.mode = Mode.quantize
    y = quantizer(wide)
    assert quantizer.scale.item() == pytest.approx((1.27 + 0.5 * (3.81 - 1.27)) / 127)
    assert y.min().item() == pytest.approx(-2.54)  # the range that this batch moved is the one it is quantized by


def test_fixed_ranges_never_move() -> None:
    quantizer = calibrated(TensorScheme(bits=8), torch.tensor([-1.0, 1.0])).train()
    before = quantizer.scale.clone()
    quantizer(torch.tensor([-50.0, 50.0]))
    assert torch.equal(quantizer.scale, before)


def test_a_batch_with_nan_shows_up_in_the_output_and_not_as_another_error() -> None:
    scheme = TensorScheme(bits=8, range="running", observer="ema")
    quantizer = calibrated(scheme, torch.tensor([-1.0, 1.0])).train()
    y = quantizer(torch.tensor([torch.nan, 0.5]))
    assert y[0].isnan()
    assert torch.isfinite(quantizer.scale)


# ---- learned ---------------------------------------------------------------------------------------------------------


def learned(x: Tensor, bits: int = 4, **options: Any) -> FakeQuantize:
    scheme = TensorScheme(bits=bits, range="learned")
    return calibrated(scheme, x, **options)


def test_learned_scale_is_a_parameter_with_gradient_in_quantize_and_none_in_frozen() -> None:
    x = torch.randn(8, 10)
    quantizer = learned(x)
    assert [name for name, _ in quantizer.named_parameters()] == ["range.scale"]
    quantizer(x).square().sum().backward()
    assert quantizer.scale.grad.abs() > 0
    quantizer.scale.grad = None
    quantizer.mode = Mode.frozen
    leaf = x.clone().requires_grad_()
    quantizer(leaf).sum().backward()
    assert quantizer.scale.grad is None
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["activation", "tensor", "channel", "group"])
def test_learned_gradient_is_scaled_by_the_papers_factor(kind: str) -> None:
    """Esser et al. 2020, section 2.2: g = 1 / sqrt(N Q_P), N the weights of a scale or an activation's features."""
    torch.manual_seed(0)
    if kind == "activation":
        x, shape, features, options = torch.randn(7, 3, 5), None, 15, {}
    else:
        x, shape = torch.randn(6, 4, 2), torch.Size([6, 4, 2])
        features = {"tensor": 48, "channel": 8, "group": 4}[kind]
        options = {"granularity": Granularity[kind], "group_size": 4 if kind == "group" else None}
    quantizer = FakeQuantize(TensorScheme(bits=4, range="learned", **options), shape=shape)
    with torch.no_grad():
        quantizer.scale.fill_(0.1)
    quantizer.mode = Mode.quantize
    grad = torch.rand(x.shape) * x.sign()
    quantizer(x).backward(grad)
    v = x.double() / 0.1
    slope = torch.where(v.round() < -8, -8, torch.where(v.round() > 7, 7, v.round() - v)) * grad
    rows = slope.reshape(max(quantizer.scale.numel(), 1), -1).sum(dim=1)
    expected = rows / math.sqrt(features * 7)
    assert torch.allclose(quantizer.scale.grad.flatten().double(), expected, rtol=0.02, atol=0.01)


def test_a_learned_scale_that_turned_negative_or_zero_still_quantizes() -> None:
    x = torch.randn(50)
    quantizer = learned(x)
    with torch.no_grad():
        quantizer.scale.mul_(0.3)  # both ends clip, the lower one a step later
    expected = quantizer(x).detach()
    with torch.no_grad():
        quantizer.scale.neg_()
    assert torch.equal(quantizer(x), expected)
    with torch.no_grad():
        quantizer.scale.zero_()
    assert torch.isfinite(quantizer(x)).all()


# ---- shapes, dtypes, copies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("range_mode", ["fixed", "running", "learned"])
@pytest.mark.parametrize("observer", ["minmax", "ema", "percentile", "mse"])
def test_empty_scalar_and_zero_tensors(range_mode: str, observer: str) -> None:
    scheme = TensorScheme(bits=8, range=range_mode, observer=observer)
    quantizer = calibrated(scheme, torch.empty(0, 3), torch.zeros(2, 3), torch.empty(0))
    assert quantizer(torch.zeros(2, 3)).tolist() == [[0, 0, 0]] * 2
    assert quantizer(torch.empty(0, 3)).shape == (0, 3)
    assert quantizer(torch.tensor(0.0)).shape == ()


def test_empty_tensors_alone_are_no_range() -> None:
    quantizer = FakeQuantize(TensorScheme(bits=8))
    quantizer.observe(torch.empty(0, 3))
    with pytest.raises(RuntimeError, match="no data"):
        quantizer.set_range_from_observer()


def test_channels_last_and_bfloat16_are_kept() -> None:
    x = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    quantizer = calibrated(TensorScheme(bits=8), x)
    y = quantizer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, quantizer(x.contiguous()))
    assert quantizer(x.bfloat16()).dtype == torch.bfloat16


def test_uncalibrated_scale_is_nan_and_survives_a_state_dict() -> None:
    quantizer = FakeQuantize(TensorScheme(bits=8))
    assert quantizer.scale.isnan()
    other = FakeQuantize(TensorScheme(bits=8))
    other.load_state_dict(calibrated(TensorScheme(bits=8), torch.ones(3)).state_dict())
    assert other.calibrated
    assert other.scale.item() == pytest.approx(1 / 127)
    other.load_state_dict(quantizer.state_dict())
    assert not other.calibrated


def test_copies_and_pickles_are_apart() -> None:
    x = torch.randn(30)
    quantizer = learned(x)
    expected = quantizer(x).detach()
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.scale.mul_(2)
        assert torch.equal(quantizer(x), expected)


def test_repr_tells_the_scheme_the_grid_and_the_mode() -> None:
    text = repr(FakeQuantize(TensorScheme(bits=4), relu=True))
    assert "int4 symmetric tensor, fixed (minmax), [0, 15], relu, mode=float" in text


# ---- modes of a network ----------------------------------------------------------------------------------------------


def test_set_mode() -> None:
    net = nn.Sequential(FakeQuantize(TensorScheme(bits=8)), nn.Sequential(FakeQuantize(TensorScheme(bits=8))))
    assert get_mode(net) is Mode.float
    for mode in ("observe", Mode.float):
        set_mode(net, mode)
        assert {q.mode for _, q in quantizers(net)} == {Mode(mode)}
    net[0].observe(torch.ones(2))
    net[0].set_range_from_observer()
    for mode in ("quantize", Mode.frozen):
        with pytest.raises(RuntimeError, match=r"^1 quantizers have no range yet, the first is '1\.0'; run qat\.calib"):
            set_mode(net, mode)
        assert {q.mode for _, q in quantizers(net)} == {Mode.float}
    with pytest.raises(ValueError, match=r"mode='train' is not known \(valid: float, observe, quantize, frozen\)"):
        set_mode(net, "train")
    assert get_mode(nn.Linear(1, 1)) is Mode.float


@pytest.mark.parametrize("fields", [{"gradient": "ewgs"}, {"format": "e4m3fn"}, {}])
def test_a_range_that_moves_between_two_calls_gives_each_its_own_gradient(fields: dict[str, Any]) -> None:
    """As of a layer that is called twice, and of the inputs of a concatenation."""
    first, second = torch.randn(2, 50, generator=torch.Generator().manual_seed(3)) * torch.tensor([[1.0], [3.0]])
    scheme = TensorScheme(bits=8, range="running", observer="ema", momentum=0.5, **fields)
    together = calibrated(scheme, first)
    apart = copy.deepcopy(together)
    inputs = [x.clone().requires_grad_() for x in (first, second)]
    torch.stack([together(x) for x in inputs]).square().sum().backward()
    for x, other in zip((first, second), inputs, strict=True):
        x.requires_grad_()
        apart(x).square().sum().backward()
        assert torch.equal(x.grad, other.grad)
    assert together.scale > 1.2 * calibrated(scheme, first.detach()).scale


@pytest.mark.parametrize("mode", [Mode.quantize, Mode.frozen])
def test_large_tensors_and_small_ones_agree_where_a_learned_scale_went_below_zero(mode: Mode) -> None:
    """The magnitude counts, by the kernels and by tensor operations."""
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    node = FakeQuantize(qat.preset("w4a4_lsq").activation).train()
    node.set_range_from(x)
    expected = node.scale.detach().clone()
    with torch.no_grad():
        node.scale.neg_()
    node.mode = mode
    y = node(x)
    assert torch.equal(y[:, :8], node(x[:, :8]))
    assert torch.equal(y, expected * torch.round(x / expected).clamp(node.quant_min, node.quant_max))


def test_an_unsigned_weight_passes_no_gradient_where_it_is_clipped() -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scheme = override(qat.preset("int8").weight, {"signed": False, "narrow_range": False}, "quant.weight")
    node = FakeQuantize(scheme, weight.shape).train()
    node.mode = Mode.quantize
    node(weight).sum().backward()
    scale = weight.detach().abs().amax(dim=1, keepdim=True) / 255
    assert torch.equal(weight.grad, (torch.round(weight.detach() / scale) >= 0).float())


@pytest.mark.parametrize("fields", [{"format": "codebook", "bits": 1}, {
    "format": "product", "bits": 1, "granularity": Granularity.group, "group_size": 2}])  # fmt: skip
def test_a_weight_that_moved_to_another_entry_has_it_at_the_next_step(fields: dict[str, Any]) -> None:
    """So the loss answers every step of the optimizer; with refresh=10 it answered one in ten, and QAT lost to PTQ."""
    x = torch.tensor([[-1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0]])
    moved = x * torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])

    def steps(**more: int) -> list[bool]:
        quantizer = FakeQuantize(TensorScheme(range="learned", **fields, **more), x.shape)
        quantizer.set_range_from(x)
        quantizer.mode = Mode.quantize
        return [torch.equal(quantizer(w), w) for w in (x, moved, moved)]

    assert steps() == [True, True, True]
    assert steps(refresh=3) == [True, False, True]


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("ranges", ["fixed", "learned"])
def test_weights_that_are_only_measured_keep_no_observations(observer: str, ranges: str) -> None:
    """A histogram a channel would take more than the weight: 32 KB each, in memory and in every checkpoint."""
    scheme = TensorScheme(bits=4, granularity=Granularity.channel, observer=observer, range=ranges)
    quantizer, weight = FakeQuantize(scheme, torch.Size([64, 8])), torch.randn(64, 8)
    kept = sum(buffer.numel() for buffer in quantizer.observer.buffers())
    assert kept <= 1  # of extremes, whether a range is still to come
    quantizer.observe(weight)
    quantizer.set_range_from(weight)
    assert quantizer.calibrated
    assert quantizer.scale.shape == (64,)
    with pytest.raises(RuntimeError, match=r"set_range_from\(weight\)"):
        quantizer.set_range_from_observer()
    assert sum(buffer.numel() for buffer in quantizer.observer.buffers()) == kept


def test_files_that_hold_observations_of_weights_still_load() -> None:
    scheme = TensorScheme(bits=4, granularity=Granularity.channel, observer="mse", range="learned")
    weight = torch.randn(64, 8)
    quantizer, other = (FakeQuantize(scheme, torch.Size([64, 8])) for _ in range(2))
    quantizer.set_range_from(weight)
    state = quantizer.state_dict() | {
        "observer.counts": torch.zeros(64, 4096, dtype=torch.float64),
        "observer.limit": torch.zeros(64),
    }
    before = {key: value.shape for key, value in state.items()}
    other.load_state_dict(state)
    assert torch.equal(other.scale, quantizer.scale)
    assert other.observer.counts.numel() == 0
    assert {key: value.shape for key, value in state.items()} == before


def test_a_range_that_follows_its_weight_is_observed() -> None:
    scheme = TensorScheme(bits=4, granularity=Granularity.channel, observer="ema", range="running")
    quantizer = FakeQuantize(scheme, torch.Size([64, 8]))
    quantizer.observe(torch.randn(64, 8))
    quantizer.set_range_from_observer()
    assert quantizer.calibrated
