"""Observers against numpy: quantiles, running averages and a brute-force search in float64."""

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat.fake_quant import FakeQuantize
from qat.mode import Mode
from qat.numerics.formats import FORMATS
from qat.observers import (
    BINS,
    OBSERVERS,
    Ema,
    Entropy,
    Histogram,
    Mse,
    Observer,
    ObserverOptions,
    Percentile,
    histogram,
)  # fmt: skip
from qat.scheme import Granularity, TensorScheme


def make(name: str, **options: object) -> Observer:
    return OBSERVERS[name](ObserverOptions(**options))  # type: ignore[arg-type]


def ranges(observer: Observer) -> list[list[float]]:
    return [bound.tolist() for bound in observer.range()]


def long_tailed(rows: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, count, generator=generator) ** 3 * torch.linspace(0.01, 3, rows).unsqueeze(1)


# ---- what holds for all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVERS)
def test_nothing_seen_is_an_error_also_after_reset(name: str) -> None:
    observer = make(name, rows=2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"has seen no data; run qat\.calibrate"):
            observer.range()
        observer.update(torch.randn(2, 10))
        observer.range()
        observer.reset()


@pytest.mark.parametrize("name", OBSERVERS)
def test_measure_leaves_the_state_alone(name: str) -> None:
    observer = make(name, rows=2)
    low, high = observer.measure(torch.randn(2, 50))
    assert low.shape == high.shape == (2,)
    assert (low < high).all()
    with pytest.raises(RuntimeError, match="no data"):
        observer.range()


@pytest.mark.parametrize("name", OBSERVERS)
def test_range_shapes_dtype_and_rows_are_apart(name: str) -> None:
    x = long_tailed(3, 400)
    together = make(name, rows=3)
    together.update(x)
    low, high = together.range()
    assert low.shape == high.shape == (3,)
    assert low.dtype == high.dtype == torch.float32
    for row in range(3):
        alone = make(name)
        alone.update(x[row : row + 1])
        assert ranges(alone) == [[low[row].item()], [high[row].item()]]


@pytest.mark.parametrize("name", OBSERVERS)
def test_state_is_saved_and_loaded(name: str) -> None:
    first, second = make(name, rows=2), make(name, rows=2)
    first.update(long_tailed(2, 100))
    second.load_state_dict(first.state_dict())
    assert ranges(second) == ranges(first)
    x = long_tailed(2, 300) * 5
    first.update(x)
    second.update(x)
    assert ranges(second) == ranges(first)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-40, 1e30, -1e30])
def test_constants(name: str, value: float) -> None:
    observer = make(name)
    observer.update(torch.full((1, 7), value))
    for low, high in (observer.range(), observer.measure(torch.full((1, 7), value))):
        assert torch.isfinite(torch.stack([low, high])).all()
        assert low <= high
        expected = (-abs(value), abs(value)) if name == "absmax" else (value, value)
        assert (low.item(), high.item()) == pytest.approx(expected, rel=0.02, abs=1e-40)


@pytest.mark.parametrize("name", OBSERVERS)
def test_half_precision_input(name: str) -> None:
    observer = make(name)
    x = long_tailed(1, 500).bfloat16()
    observer.update(x)
    other = make(name)
    other.update(x.float())
    assert ranges(observer) == ranges(other)
    assert observer.range()[0].dtype == torch.float32


@pytest.mark.parametrize("fields", [
    {"granularity": Granularity.group, "group_size": 50}, {"granularity": Granularity.block, "block_size": [2, 50]},
])  # fmt: skip
@pytest.mark.parametrize("name", OBSERVERS)
def test_what_fills_a_short_row_is_not_observed(name: str, fields: dict[str, Any]) -> None:
    """Of 3 by 70 values the last groups are 20 wide, and the last blocks 20 wide, 1 high, or both."""
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(2)) + 4  # zero, which fills, is far away
    follows = {"bits": 4, "symmetric": False, "observer": name, "range": "running"}  # others are measured, not observed
    node = FakeQuantize(TensorScheme(**follows, allow_padding=True, **fields), x.shape)
    heights = [1] * 3 if node.layout.kind == "group" else [2, 1]
    parts = [part.reshape(1, -1) for rows in x.split(heights) for part in rows.split(50, dim=1)]
    node.observe(x)
    for (low, high), seen in ((node.measure(x), False), (node.observer.range(), True)):
        assert low.shape == (len(parts),)
        for i, part in enumerate(parts):
            alone = FakeQuantize(TensorScheme(**follows), part.shape)
            alone.observe(part)
            expected = alone.observer.range() if seen else alone.measure(part)
            assert (low[i], high[i]) == expected, (i, seen)


@pytest.mark.parametrize("name", ["minmax", "ema"])
def test_nan_does_not_poison_the_range(name: str) -> None:
    observer = make(name, momentum=1.0)
    observer.update(torch.tensor([[-1.0, 2.0]]))
    observer.update(torch.tensor([[torch.nan, 5.0]]))
    assert ranges(observer) == [[-1.0], [2.0]]
    observer.update(torch.tensor([[-3.0, 4.0]]))
    assert ranges(observer) == [[-3.0], [4.0]]


# ---- minmax ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9), min_size=1, max_size=5))
def test_minmax(batches: list[list[float]]) -> None:
    observer = make("minmax")
    for batch in batches:
        observer.update(torch.tensor([batch]))
    values = [value for batch in batches for value in batch]
    assert ranges(observer) == [[min(values)], [max(values)]]


# ---- ema -------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 1), st.integers(1, 6))
def test_ema_is_the_recursion_in_numpy(momentum: float, count: int) -> None:
    batches = [long_tailed(2, 30) * (i + 1) for i in range(count)]
    observer = make("ema", rows=2, momentum=momentum)
    for batch in batches:
        observer.update(batch)
    low, high = (f(batches[0].numpy().astype(np.float64), axis=1) for f in (np.min, np.max))
    for batch in batches[1:]:
        low = (1 - momentum) * low + momentum * batch.numpy().min(axis=1)
        high = (1 - momentum) * high + momentum * batch.numpy().max(axis=1)
    assert np.allclose(observer.range()[0].numpy(), low, rtol=1e-5)
    assert np.allclose(observer.range()[1].numpy(), high, rtol=1e-5)


def test_ema_by_hand() -> None:
    observer = make("ema", momentum=0.25)
    for batch in ([-1.0, 1.0], [-5.0, 3.0], [-2.0, 1.5]):
        observer.update(torch.tensor([batch]))
    # low: -1, -1 - 0.25 * 4 = -2, -2; high: 1, 1.5, 1.5
    assert ranges(observer) == [[-2.0], [1.5]]


def test_ema_averages_sites_apart_and_joins_them() -> None:
    observer = make("ema", sites=3, momentum=0.5)
    observer.update(torch.tensor([[-1.0, 1.0]]), site=0)
    observer.update(torch.tensor([[0.0, 10.0]]), site=1)
    assert ranges(observer) == [[-1.0], [10.0]]  # not pulled towards the smaller edge; site 2 has seen nothing
    observer.update(torch.tensor([[-3.0, 3.0]]), site=0)
    observer.update(torch.tensor([[0.0, 20.0]]), site=1)
    assert ranges(observer) == [[-2.0], [15.0]]
    assert isinstance(observer, Ema)


# ---- histogram -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["percentile", "mse"])
def test_no_count_is_lost_when_the_range_grows(name: str) -> None:
    observer = make(name, rows=2)
    assert isinstance(observer, Histogram)
    seen = []
    generator = torch.Generator().manual_seed(3)
    for power in (-20, -3, 0, 4, 13, 2):
        seen.append(torch.rand(2, 257, generator=generator) * 2.0**power * torch.tensor([[1.0], [-1.0]]))
        observer.update(seen[-1])
    values = torch.cat(seen, dim=1).double().numpy()
    for row in range(2):
        limit = observer.limit[row].item()
        assert np.abs(values[row]).max() <= limit <= 2 * np.abs(values[row]).max()
        expected, _ = np.histogram(values[row], bins=BINS, range=(-limit, limit))
        assert observer.counts[row].sum() == 257 * 6
        assert np.array_equal(observer.counts[row].numpy(), expected)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.builds(lambda v, e: v * 2.0**e, st.floats(-1, 1, width=32), st.integers(-30, 30)), min_size=2),
    st.lists(st.integers(1, 39), max_size=6),
    st.sampled_from(["percentile", "mse"]),
)
def test_any_split_into_batches_gives_the_same_histogram(values: list[float], cuts: list[int], name: str) -> None:
    values = [value if abs(value) > 2.0**-80 else 0.0 for value in values]
    whole, split = make(name), make(name)
    x = torch.tensor([values])
    whole.update(x)
    for part in torch.tensor_split(x, sorted(cuts), dim=1):
        if part.numel():
            split.update(part)
    assert isinstance(whole, Histogram)
    assert isinstance(split, Histogram)
    assert torch.equal(whole.counts, split.counts)
    assert torch.equal(whole.limit, split.limit)
    assert ranges(whole) == ranges(split)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "values"), [(1, 100_001), (7, 4096), (300, 9)])
def test_a_histogram_is_numpys(rows: int, values: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In C++ and in tensor operations, with zeros of both signs, ends of bins and a row of zeros."""
    x = torch.randn(rows, values) * torch.logspace(-3, 3, rows).unsqueeze(1)
    x[:, :4] = torch.tensor([0.0, -0.0, 2.0**-9, -(2.0**-9)])
    x[1 : rows // 2] = 0
    x = x.to(dtype)
    for in_cpp in (True, False):
        if not in_cpp:
            monkeypatch.setattr(histogram, "_in_cpp", lambda x: False)
        observer = make("percentile", rows=rows)
        assert isinstance(observer, Histogram)
        observer.update(x)
        observer.update(-x)  # bins hold their left end, not their right one
        for row, counts, limit in zip(x.double().numpy(), observer.counts, observer.limit.tolist(), strict=True):
            both = np.concatenate([row, -row])
            place = np.floor(both / (limit or 1.0) * (BINS // 2)) + BINS // 2
            expected = np.bincount(np.clip(place, 0, BINS - 1).astype(int), minlength=BINS)
            assert np.array_equal(counts.numpy(), expected)


def test_a_tiny_negative_value_stays_on_its_side_of_zero() -> None:
    together, apart = make("percentile"), make("percentile")
    assert isinstance(together, Histogram)
    assert isinstance(apart, Histogram)
    together.update(torch.tensor([[-1e-9, 1.0]]))
    apart.update(torch.tensor([[-1e-9]]))
    apart.update(torch.tensor([[1.0]]))
    assert together.counts[0, BINS // 2 - 1] == apart.counts[0, BINS // 2 - 1] == 1


# ---- percentile ------------------------------------------------------------------------------------------------------

PERCENTILES = [(0.0, 100.0), (0.01, 99.99), (1.0, 99.0), (10.0, 90.0), (25.0, 60.0)]


@pytest.mark.parametrize("percentiles", PERCENTILES)
def test_percentile_of_one_tensor_is_numpys(percentiles: tuple[float, float]) -> None:
    x = long_tailed(3, 1001)
    low, high = make("percentile", rows=3, percentiles=percentiles).measure(x)
    expected = np.percentile(x.numpy().astype(np.float64), percentiles, axis=1)
    assert np.allclose(low.numpy(), expected[0], rtol=1e-4, atol=1e-6)
    assert np.allclose(high.numpy(), expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("percentiles", PERCENTILES)
def test_percentile_of_a_stream_is_numpys_to_a_bin(percentiles: tuple[float, float]) -> None:
    x = torch.randn(2, 60_000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [9.0]])
    observer = make("percentile", rows=2, percentiles=percentiles)
    for batch in x.split(7000, dim=1):
        observer.update(batch)
    assert isinstance(observer, Percentile)
    # inverted_cdf: a value that was seen, as a histogram counts; the bin's width is the resolution
    expected = np.percentile(x.numpy().astype(np.float64), percentiles, axis=1, method="inverted_cdf")
    for got, want in zip(observer.range(), expected, strict=True):
        width = 2 * observer.limit.numpy() / BINS
        assert (np.abs(got.numpy() - want) <= 1.01 * width).all()


def test_the_10th_and_the_90th_percentile_of_a_scheme() -> None:
    x = torch.arange(-100.0, 101.0)[torch.randperm(201)]
    scheme = TensorScheme(bits=8, symmetric=False, observer="percentile", percentiles=[10.0, 90.0])
    node = FakeQuantize(scheme)
    assert [end.tolist() for end in node.measure(x)] == [[-80.0], [80.0]]
    node.observe(x)
    node.set_range_from_observer()
    assert node.scale.item() == pytest.approx(160 / 255, rel=1e-3)
    assert abs(node.zero_point.item() - 127.5) <= 0.5


def test_percentile_is_interpolated_inside_a_bin() -> None:
    observer = make("percentile", percentiles=(25.0, 75.0))
    observer.update(torch.tensor([[0.75] * 100]))  # one bin of width 1 / 2048, from 0.75 up
    low, high = observer.range()
    assert low.item() == pytest.approx(0.75 + 0.25 / 2048, abs=1e-7)
    assert high.item() == pytest.approx(0.75 + 0.75 / 2048, abs=1e-7)


# ---- mse -------------------------------------------------------------------------------------------------------------


def squared_error(x: np.ndarray, low: float, high: float, grid: tuple[int, int], symmetric: bool) -> float:
    """Sum of squared errors of quantize-dequantize at a range, float64."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(-low, high) / grid[1] if symmetric else (high - low) / (grid[1] - grid[0])
    zero = 0.0 if symmetric else np.clip(np.round(grid[0] - low / scale), *grid)
    x_q = np.clip(np.round(x / scale) + zero, *grid)
    return float((((x_q - zero) * scale - x) ** 2).sum())


GRIDS: Sequence[tuple[tuple[int, int], bool]] = [
    ((-7, 7), True),
    ((0, 15), False),
    ((-2, 1), True),
    ((-127, 127), True),
]


@pytest.mark.parametrize(("grid", "symmetric"), GRIDS)
def test_mse_of_one_tensor_is_the_best_of_the_candidates(grid: tuple[int, int], symmetric: bool) -> None:
    x = long_tailed(2, 2000)
    options = {"rows": 2, "quant_min": grid[0], "quant_max": grid[1], "symmetric": symmetric}
    low, high = make("mse", **options).measure(x)
    for row in range(2):
        values = x[row].double().numpy()
        candidates = [
            squared_error(values, values.min() * i / 100, values.max() * i / 100, grid, symmetric)
            for i in range(1, 101)
        ]
        got = squared_error(values, low[row].item(), high[row].item(), grid, symmetric)
        assert got == pytest.approx(min(candidates), rel=1e-4)
        if grid[1] < 20:
            assert got < 0.9 * candidates[-1]  # clipping pays on a long tail


@pytest.mark.parametrize(("grid", "symmetric"), GRIDS[:3])
def test_mse_of_a_stream_is_nearly_that_of_the_whole(grid: tuple[int, int], symmetric: bool) -> None:
    x = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(1))
    observer = make("mse", quant_min=grid[0], quant_max=grid[1], symmetric=symmetric)
    assert isinstance(observer, Mse)
    for batch in x.split(8000, dim=1):
        observer.update(batch)
    values = x[0].double().numpy()
    best = min(
        squared_error(values, values.min() * i / 100, values.max() * i / 100, grid, symmetric) for i in range(1, 101)
    )
    low, high = observer.range()
    assert squared_error(values, low.item(), high.item(), grid, symmetric) == pytest.approx(best, rel=0.02)


def nearest_error(x: np.ndarray, levels: np.ndarray) -> float:
    """Sum of squared distances to the nearest level, float64."""
    middles = (levels[1:] + levels[:-1]) / 2
    return float(((levels[np.searchsorted(middles, x)] - x) ** 2).sum())


def outliers(count: int) -> Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(2))
    x[::1000] *= 8
    return x


@pytest.mark.parametrize(("name", "bits"), [("e2m1", 4), ("apot", 4), ("pow2", 3), ("e2m3", 6)])
def test_mse_searches_on_the_levels_of_the_format(name: str, bits: int) -> None:
    """Against every candidate, by the distance to the nearest of the listed levels."""
    x = outliers(20_000).reshape(2, 10_000)
    errors = {}
    for observer in ("mse", "minmax"):
        scheme = TensorScheme(bits=bits, format=name, observer=observer, granularity=Granularity.channel)
        quantizer = FakeQuantize(scheme, x.shape)
        quantizer.set_range_from(x)
        quantizer.mode = Mode.quantize
        errors[observer] = (quantizer(x) - x).double().square().sum(dim=1).tolist()
    levels = FORMATS[name].grid(bits, True, False).values().double().numpy()  # type: ignore[misc]
    for row, found, widest in zip(x.double().numpy(), errors["mse"], errors["minmax"], strict=True):
        clips = np.abs(row).max() * np.arange(1, 101) / 100
        best = min(nearest_error(row, levels * (clip / levels[-1])) for clip in clips)
        assert found == pytest.approx(best, rel=1e-4)
        assert found < 0.98 * widest


def test_mse_of_shared_exponents_chooses_among_powers_of_two() -> None:
    x = outliers(32 * 500).reshape(500, 32)
    grid = FORMATS["mxfp4"].grid(4, True, False)  # type: ignore[misc]
    low, high = make("mse", rows=500, grid=grid, scales=FORMATS["mxfp4"].scales).measure(x)
    levels = grid.values().double().numpy()
    for row, clip in zip(x.double().numpy(), torch.maximum(-low, high).double().numpy(), strict=True):
        widest = np.floor(np.log2(np.abs(row).max()))
        tried = [nearest_error(row, levels * 2.0 ** (widest - k - 2)) for k in range(6)]
        assert nearest_error(row, levels * 2.0 ** (np.floor(np.log2(clip)) - 2)) == pytest.approx(min(tried), rel=1e-6)


@pytest.mark.parametrize(("name", "group"), [("apot", None), ("nvfp4", 16)])
def test_a_quantizer_that_searches_on_a_grid_can_be_copied_and_pickled(name: str, group: int | None) -> None:
    scheme = TensorScheme(
        bits=4, format=name, observer="mse", range="dynamic", group_size=group,
        granularity=Granularity.group if group else Granularity.tensor,
    )  # fmt: skip
    x = outliers(640).reshape(20, 32)
    quantizer = FakeQuantize(scheme, x.shape)
    quantizer.mode = Mode.quantize
    for copied in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(copied(x), quantizer(x))


# ---- several observers as one ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OBSERVERS if name != "ema"])
@pytest.mark.parametrize("cuts", [[1], [10, 300, 301], [500]])
def test_merged_observers_have_the_range_of_one_pass(name: str, cuts: list[int]) -> None:
    """N batches through one observer, and the same samples divided over M observers, in another order."""
    x = long_tailed(2, 1000)
    one = make(name, rows=2)
    for batch in x.split(125, dim=1):
        one.update(batch)
    ranks = [make(name, rows=2) for _ in range(len(cuts) + 1)]
    for rank, part in zip(ranks, x.flip(1).tensor_split(cuts, dim=1), strict=True):
        rank.update(part)
    first, *others = ranks[::-1]
    for other in others:
        before = {key: value.clone() for key, value in other.state_dict().items()}
        first.merge(other)
        assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    for merged, expected in zip(first.range(), one.range(), strict=True):
        torch.testing.assert_close(merged, expected, rtol=1e-6, atol=0)


def test_an_observer_that_saw_nothing_changes_nothing() -> None:
    for name in OBSERVERS:
        observer = make(name)
        observer.update(long_tailed(1, 100))
        before = ranges(observer)
        observer.merge(make(name))
        assert ranges(observer) == before, name


def test_moving_averages_are_averaged() -> None:
    a, b = make("ema"), make("ema")
    a.update(torch.tensor([[-1.0, 2.0]]))
    b.update(torch.tensor([[-3.0, 4.0]]))
    a.merge(b)
    assert ranges(a) == [[-2.0], [3.0]]


def test_moving_averages_merge_site_by_site_and_go_on() -> None:
    """The mean of both where both have seen an edge, the one that has where one has; then averages move on."""
    a, b = (make("ema", sites=3, momentum=0.5) for _ in range(2))
    a.update(torch.tensor([[-1.0, 2.0]]), site=0)
    b.update(torch.tensor([[-3.0, 6.0]]), site=0)
    b.update(torch.tensor([[-0.5, 9.0]]), site=1)
    a.merge(b)
    assert torch.equal(a.low.nan_to_num(7), torch.tensor([[-2.0], [-0.5], [7.0]]))
    assert torch.equal(a.high.nan_to_num(7), torch.tensor([[4.0], [9.0], [7.0]]))
    assert ranges(a) == [[-2.0], [9.0]]
    a.update(torch.tensor([[-4.0, 5.0]]), site=1)
    assert ranges(a) == [[-2.25], [7.0]]


def test_observers_of_different_things_do_not_merge() -> None:
    with pytest.raises(ValueError, match="cannot merge MinMax"):
        make("absmax").merge(make("minmax"))
    with pytest.raises(ValueError, match="same class and options"):
        make("sigma", sigmas=2.0).merge(make("sigma", sigmas=3.0))
    with pytest.raises(ValueError, match="same class and options"):
        make("mse", quant_max=7).merge(make("mse", quant_max=127))


@pytest.mark.parametrize(
    ("first", "second"),
    [("e2m1", "mxfp4"), ("mxfp4", "nvfp4"), ("e2m1", "int"), ("e4m3fn", "e5m2"), ("pow2", "apot"), ("bf16", "tf32")],
)
def test_observers_of_different_grids_do_not_merge(first: str, second: str) -> None:
    """Also where the ends are equal, and where the grids are and the scales are not."""

    def observer(name: str) -> Observer:
        kind = FORMATS[name]
        assert kind.grid is not None
        grid = None if name == "int" else kind.grid(kind.bits[-1], True, False)
        return make("mse", quant_min=-6, quant_max=6, grid=grid, scales=kind.scales)

    x = long_tailed(1, 100)
    one, same, other = observer(first), observer(first), observer(second)
    for each in (one, same, other):
        each.update(x)
    one.merge(same)
    assert float(one.counts.sum()) == 200
    one.merge(copy.deepcopy(same))
    with pytest.raises(ValueError, match="same class and options, for the same grid"):
        one.merge(other)
    with pytest.raises(ValueError, match="same class and options, for the same grid"):
        other.merge(one)
    assert float(one.counts.sum()) == 300


@pytest.mark.parametrize("name", OBSERVERS)
def test_every_state_says_how_it_is_reduced(name: str) -> None:
    observer = make(name)
    assert set(observer.reduce) == set(observer.state_dict())


# ---- absmax, sigma, lp, entropy --------------------------------------------------------------------------------------


def test_absmax_is_symmetric() -> None:
    observer = make("absmax", rows=2)
    observer.update(torch.tensor([[1.0, -5.0, 2.0], [0.0, 3.0, -1.0]]))
    observer.update(torch.tensor([[4.0, 4.0, 4.0], [-7.0, 0.0, 0.0]]))
    assert ranges(observer) == [[-5.0, -7.0], [5.0, 7.0]]
    assert [bound.tolist() for bound in observer.measure(torch.tensor([[1.0], [-2.0]]))] == [[-1.0, -2.0], [1.0, 2.0]]


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=40), st.floats(0.5, 6))
def test_sigma_is_numpys_mean_and_deviation(values: list[float], sigmas: float) -> None:
    x = torch.tensor([values]) + 1e4  # a large mean, which naive sums of squares do not survive
    observer = make("sigma", sigmas=sigmas)
    for batch in x.split(7, dim=1):
        observer.update(batch)
    array = x.double().numpy()
    expected = [array.mean() - sigmas * array.std(), array.mean() + sigmas * array.std()]
    for low, high in (observer.range(), observer.measure(x)):
        np.testing.assert_allclose([low.item(), high.item()], expected, rtol=1e-6)


@pytest.mark.parametrize("norm", [1.0, 2.4, 4.0])
def test_lp_is_the_best_of_its_candidates(norm: float) -> None:
    x = long_tailed(1, 2000)
    values = x[0].double().numpy()
    low, high = make("lp", norm=norm, quant_min=-7, quant_max=7).measure(x)

    def error(shrink: float) -> float:
        scale = max(-values.min(), values.max()) * shrink / 7
        return float((np.abs(np.clip(np.rint(values / scale), -7, 7) * scale - values) ** norm).sum())

    best = min((error(i / 100), i / 100) for i in range(1, 101))
    assert high.item() == pytest.approx(values.max() * best[1], rel=1e-5)
    assert low.item() == pytest.approx(values.min() * best[1], rel=1e-5)


def test_lp_of_norm_2_is_mse_and_larger_norms_clip_less() -> None:
    x = long_tailed(3, 2000)
    clips = [make("lp", rows=3, norm=norm, quant_min=-7, quant_max=7).measure(x)[1] for norm in (1.0, 2.0, 4.0)]
    assert torch.equal(clips[1], make("mse", rows=3, quant_min=-7, quant_max=7).measure(x)[1])
    assert (clips[0] <= clips[1]).all()
    assert (clips[1] <= clips[2]).all()
    assert (clips[0] < clips[2]).all()


def divergence(magnitudes: np.ndarray, last: int, levels: np.ndarray) -> float:
    """Migacz 2017, pages 36 to 39, with loops: P is clipped, Q is what the grid leaves of the unclipped counts."""
    p = magnitudes[: last + 1].astype(float)
    p[-1] += magnitudes[last + 1 :].sum()
    q = np.zeros(last + 1)
    for level in set(levels[: last + 1]):
        cell = [i for i in range(last + 1) if levels[i] == level and magnitudes[i] > 0]
        for i in cell:
            q[i] = sum(magnitudes[j] for j in cell) / len(cell)
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def test_entropy_is_the_least_divergence_of_its_candidates() -> None:
    x = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(1))
    observer = make("entropy", quant_min=-7, quant_max=7)
    assert isinstance(observer, Entropy)
    observer.update(x)
    limit = float(observer.limit)
    width = 2 * limit / BINS
    counts = observer.counts[0].numpy()
    magnitudes = counts[BINS // 2 :] + counts[: BINS // 2][::-1]
    magnitudes[0] = magnitudes[1]
    filled = np.nonzero(magnitudes)[0]
    chosen = float(observer.range()[1])
    costs = {}
    for last in filled[:: max(1, len(filled) // 60)]:
        centres = (np.arange(len(magnitudes)) + 0.5) * width
        levels = np.rint(centres / ((last + 1) * width / 7)).astype(int)
        if len(set(levels[: last + 1])) >= 8:
            costs[(last + 1) * width] = divergence(magnitudes, last, levels)
    last = round(chosen / width) - 1
    levels = np.rint((np.arange(len(magnitudes)) + 0.5) * width / (chosen / 7)).astype(int)
    assert divergence(magnitudes, last, levels) <= min(costs.values()) * 1.02
    assert 2.0 < chosen < float(x.abs().max())


def sample(name: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    n = 100_000
    return {
        "normal": lambda: rng.normal(size=n),
        "laplace": lambda: rng.laplace(size=n),
        "uniform": lambda: rng.uniform(-1, 1, size=n),
        "outliers": lambda: np.append(rng.normal(size=n), [30.0, -25.0]),
        "student": lambda: rng.standard_t(4, size=n),
        "two modes": lambda: np.append(rng.normal(-2, 0.3, n // 2), rng.normal(2, 0.3, n // 2)),
    }[name]().astype(np.float32)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["normal", "laplace", "uniform", "outliers", "student", "two modes"])
def test_entropy_is_onnx_runtimes_threshold(name: str) -> None:
    """ONNX Runtime's calibrator, on as many levels and as fine a histogram, within 10 %.

    Its own threshold moves by as much with the number of bins (a Student's t: 5.3 of 1025, 6.1 of 2049, 5.9 of 4097):
    the divergence is flat about its minimum. It merges equal runs of bins, where levels have cells about them, and
    rounds counts down to integers. Of more levels its thresholds are too scattered to compare (31 levels, Student's t:
    12.5 or 7.6). A ReLU's zeros are left out: here the bin at zero counts as its neighbour does, there it decides.
    """
    from onnxruntime.quantization.calibrate import HistogramCollector

    x = sample(name)
    collector = HistogramCollector(
        method="entropy", symmetric=True, num_bins=2049, num_quantized_bins=15, percentile=99.99, scenario="same"
    )
    collector.collect_value({"x": [x]})
    theirs = float(collector.get_entropy_threshold(collector.histogram_dict["x"], 15)[1])
    observer = make("entropy", quant_min=-7, quant_max=7)
    observer.update(torch.from_numpy(x).unsqueeze(0))
    ours = float(observer.range()[1])
    assert ours == pytest.approx(theirs, rel=0.1)
    assert name == "uniform" or ours < 0.9 * np.abs(x).max()


@pytest.mark.parametrize("name", OBSERVERS)
def test_an_observer_of_one_range_measures_every_row_of_a_tensor(name: str) -> None:
    """As of activations with a range a token, whose number is that of the batch."""
    x = long_tailed(3, 200)
    low, high = make(name).measure(x)
    expected = [make(name).measure(row.unsqueeze(0)) for row in x]
    assert torch.allclose(low, torch.cat([pair[0] for pair in expected]))
    assert torch.allclose(high, torch.cat([pair[1] for pair in expected]))


def test_entropy_leaves_outliers_out_and_serves_nonnegative_data() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 50_000, generator=generator)
    x[0, 0] = 40.0
    low, high = make("entropy", quant_min=-7, quant_max=7).measure(x)
    assert 2 < high < 6
    assert -6 < low < -2
    low, high = make("entropy", symmetric=True, quant_min=0, quant_max=15).measure(x.relu())
    assert abs(float(low)) < 0.02
    assert 2 < high < 6
