"""One more entry in a table is one line there: it is chosen on the command line, trains, is lowered and written."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from qat import hydra_schema
from qat.analysis.curves import measure
from qat.fake_quant import FakeQuantize
from qat.modes import quantizers
from qat.numerics.formats import FORMATS, Format, Grid
from qat.numerics.gradients import GRADIENTS, Gradient, Step
from qat.numerics.rounding import ROUNDING, Rounding
from qat.observers import OBSERVERS, ObserverOptions
from qat.observers.extremes import MinMax
from qat.ranges import RANGES, Range, RangeOptions
from tests.whole_way import assert_files_agree, trained


def half_up(x: Tensor) -> Tensor:
    return torch.floor(x + 0.5)


def fibonacci(bits: int, signed: bool, narrow: bool) -> Grid:
    """The Fibonacci numbers from 0 to 21 of both signs."""
    levels = torch.tensor([0.0, 1, 2, 3, 5, 8, 13, 21])
    levels = torch.cat([-levels[1:].flip(0), levels]) if signed else levels
    return Grid(low=float(levels[0]), high=21.0, snap=partial(_nearest, levels=levels), levels=levels.clone, bits=bits)


def _nearest(v: Tensor, round: object, levels: Tensor) -> Tensor:
    index = torch.bucketize(v.contiguous(), (levels[1:] + levels[:-1]) / 2)
    return torch.where(v.isnan(), v, levels[index])


class NineTenths(MinMax):
    """Nine tenths of the range."""

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = super().range()
        return low * 0.9, high * 0.9

    def measure(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        low, high = super().measure(x, real)
        return low * 0.9, high * 0.9


class Exponential(Range):
    """The logarithm of the scale is a parameter."""

    learned = True
    affine = False

    def __init__(self, options: RangeOptions) -> None:
        super().__init__(options)
        self.log_scale = nn.Parameter(self._nan())
        self.register_buffer("zero_point", torch.zeros(options.shape))

    def set(self, scale: Tensor, zero_point: Tensor) -> None:
        self.log_scale.copy_(scale.log())

    def qparams(self) -> tuple[Tensor, Tensor]:
        return self.log_scale.exp(), self.get_buffer("zero_point")


def towards_levels(step: Step) -> Tensor:
    """Less the further a value is from its level."""
    return step.inside * (1 - step.strength * (step.v - step.q).abs())


WEIGHT = "granularity=channel narrow_range=false"
ENTRIES = {
    "format": (FORMATS, Format(description="Fibonacci numbers", bits=(4,), grid=fibonacci), f"bits=4 {WEIGHT}"),
    "rounding": (ROUNDING, Rounding(half_up), f"bits=4 {WEIGHT}"),
    "observer": (OBSERVERS, NineTenths, f"bits=4 {WEIGHT}"),
    "range": (RANGES, Exponential, f"bits=4 {WEIGHT}"),
    "gradient": (GRADIENTS, Gradient(slope=towards_levels, strengths=(0.5, 0.1)), f"bits=4 {WEIGHT}"),
}
"""Field -> its table, an entry, and what else the weight's scheme says."""


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
        yield


@pytest.mark.parametrize("field", ENTRIES)
def test_one_more_entry_needs_no_other_file(field: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table, entry, fields = ENTRIES[field]
    monkeypatch.setitem(table, "made_up", entry)
    both = ["weight", "activation", "input"] if field in ("observer", "range", "gradient") else ["weight"]
    words = [f"quant.weight.{word}" for word in fields.split()] + [f"quant.{part}.{field}=made_up" for part in both]
    if field == "gradient":
        words.append("quant.weight.gradient_strength=[0.4,0.2]")
    config = hydra_schema.quant_config(compose("config", ["quant=int8", *words]))
    inputs = (torch.randn(32, 3, 8, 8),)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    prepared = trained(net, inputs, config)
    chosen = [q for _, q in quantizers(prepared) if getattr(q.scheme, field) == "made_up"]
    assert len(chosen) == (4 if len(both) == 3 else 2)  # two weights; the input, and what the second layer reads
    assert_files_agree(prepared, inputs, tmp_path)
    curve = measure(config.weight, "weight")  # what `python -m qat show` draws
    assert curve.sqnr_db > 10
    if field == "range":
        assert all(q.range.log_scale.grad is not None for q in chosen)


def test_what_the_made_up_entries_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in use, not something else under their names."""
    for table, entry, _ in ENTRIES.values():
        monkeypatch.setitem(table, "made_up", entry)
    w = torch.tensor([[-2.5, -1.5, 0.5, 1.5, 2.5, 3.4, 6.0, 7.0]])

    def quantized(**fields: object) -> Tensor:
        quantizer = FakeQuantize(hydra_schema.QuantConfig.from_dict({"weight": {"bits": 4} | fields}).weight, w.shape)
        quantizer.set_range_from(w)
        quantizer.mode = "quantize"
        return quantizer(w)

    assert quantized(rounding="made_up").tolist() == [[-2, -1, 1, 2, 3, 3, 6, 7]]
    thirds = [-8, -5, 1, 5, 8, 8, 21, 21]
    assert (quantized(format="made_up")[0] * 3).tolist() == pytest.approx(thirds)
    assert quantized(observer="made_up").max().item() == pytest.approx(6.3)
    assert OBSERVERS["made_up"](ObserverOptions()).measure(w)[0].item() == pytest.approx(-2.25)
    assert quantized(range="made_up").max().item() == pytest.approx(7)


def test_rules_read_what_an_entry_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUNDING, "powers", Rounding(half_up, powers=True))
    monkeypatch.setitem(GRADIENTS, "soft", Gradient(slope=towards_levels, soft=True))
    monkeypatch.setitem(RANGES, "clip", type("Clip", (Exponential,), {"residual": False}))
    refused = [
        ({"rounding": "powers", "range": "learned"}, "rounding=powers: the gradient of a learned scale"),
        ({"format": "e2m1", "rounding": "powers"}, "rounding=powers: powers of two are not levels"),
        ({"gradient": "soft", "rounding": "powers"}, "gradient=soft: a soft staircase"),
        ({"gradient": "soft", "gradient_strength": [1.0, 2.0]}, "gradient_strength=.*gradient=soft has none"),
        ({"range": "clip", "gradient": "ste"}, "gradient=ste: range=clip learns from clipped values"),
        ({"format": "codebook", "range": "clip"}, "range=clip: a table of entries is learned"),
        ({"range": "clip", "gradient": "lsq"}, "gradient=lsq: it is that of a scale learned by LSQ"),
    ]
    for fields, message in refused:
        with pytest.raises(ValueError, match=message):
            hydra_schema.QuantConfig.from_dict({"weight": {"bits": 4, "range": "dynamic"} | fields})
