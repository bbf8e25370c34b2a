"""`python -m qat show`: the numbers it prints, the files it writes, what it refuses."""

import os
from pathlib import Path

import pytest
import torch

import qat
from qat.__main__ import main
from qat.analysis import gallery
from qat.analysis.curves import Curve, measure
from qat.analysis.show import configure
from qat.numerics.formats import FORMATS
from qat.numerics.gradients import GRADIENTS
from qat.numerics.rounding import ROUNDING
from qat.observers import OBSERVERS
from qat.presets import PRESETS
from qat.ranges import RANGES
from tests import zygote


def test_the_curve_is_the_grid() -> None:
    curve = measure(configure(["quant.weight.bits=3", "quant.weight.granularity=tensor"]).weight, "weight")
    levels = curve.y.unique()
    assert len(levels) <= 8
    steps = levels.diff()
    torch.testing.assert_close(steps, steps[:1].expand(len(steps)))
    inside = (curve.x > curve.clip[0] + float(steps[0])) & (curve.x < curve.clip[1] - float(steps[0]))
    (gradient,) = curve.gradients.values()
    assert (gradient[inside] == 1).all()
    assert (gradient[curve.x > curve.clip[1] + float(steps[0])] == 0).all()
    assert ((curve.y - curve.x).abs()[inside] <= steps[0] / 2 + 1e-6).all()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_command_writes_a_picture_and_says_so(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"scheme.{suffix}"
    command = ["qat", "show", "--preset", "w4a4_lsq", "quant.weight.bits=3", "--out", str(out)]
    done = zygote.run(command, tmp_path, os.environ)
    assert done.returncode == 0, done.stderr
    assert "quant.weight: int3 symmetric channel, learned (mse), SQNR" in done.stdout
    assert "quant.activation: int4 symmetric tensor, learned (mse), SQNR" in done.stdout
    assert "quant.input: int8 symmetric tensor, running (ema), SQNR" in done.stdout
    assert (
        "rules are not drawn: first (weight.bits=8, weight.narrow_range=False, activation.bits=8); last ("
        in done.stdout
    )
    head = out.read_bytes()[:5]
    assert head == (b"<?xml" if suffix == "svg" else b"\x89PNG\r")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing is quantized; give a number of bits"),
        (["quant.weight.bits=33"], "quant.weight.bits=33"),
        (["quant.weight.bits=many"], "quant.weight.bits=many is not valid: give an integer, or null"),
        (
            ["quant.weight.bits=4", "quant.weight.block_size=16"],
            "block_size=16 is not valid: give a list, [16,16], or null",
        ),
        (["quant.activation.momentum=fast"], "quant.activation.momentum=fast is not valid: give a number"),
        (["quant.weight.symmetric=1"], "quant.weight.symmetric=1 is not valid: give true or false"),
        (
            ["quant.weight.bits=4", "quant.weight.axis=4"],
            "axis=4: the sample has the shape [256, 64, 3, 3]",
        ),
        (
            ["quant.input.bits=1", "quant.input.format=binary"],
            "a format of weights: its levels are fitted",
        ),
        (["quant.rules=[]"], "rules are not drawn"),
        (["--gallery", "mxfp5"], "did you mean 'mxfp"),
        (["--gallery", "int4", "quant.activation.bits=4"], "yours stay float"),
        (["quant.weight.bit=3"], "did you mean 'bits'?"),
        (["quant.weight.rounding=flor"], "did you mean 'floor'?"),
        (["bits=3"], "'bits=3' is not a setting of a scheme; write it as quant.weight.bits=4"),
        (["--preset", "int9"], "did you mean 'int8'?"),
        (["quant.weight.bits=4", "--out", "scheme.doc"], "scheme.doc"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["show", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_presets_are_configured_as_in_python() -> None:
    assert configure([], "w4a8").weight == qat.preset("w4a8").weight
    changed = configure(["quant.activation.percentiles=[1,99]", "quant.activation.symmetric=false"], "w4a8").activation
    assert changed.percentiles == [1, 99]
    assert changed.symmetric is False


def test_random_rounding_is_drawn_as_in_training_and_is_reproducible() -> None:
    scheme = configure(["quant.weight.bits=4", "quant.weight.rounding=stochastic"]).weight
    state = torch.get_rng_state()
    curve, again = measure(scheme, "weight"), measure(scheme, "weight")
    assert torch.equal(torch.get_rng_state(), state)
    assert curve.random
    assert curve.text.endswith(", stochastic")
    assert curve.notes[0].startswith("as in training; evaluation rounds to nearest, SQNR 17.2")
    assert torch.equal(curve.y, again.y)
    assert (curve.y.diff() < 0).any()  # not monotonic
    assert curve.sqnr_db < measure(configure(["quant.weight.bits=4"]).weight, "weight").sqnr_db - 2


# ---- every scheme ----------------------------------------------------------------------------------------------------


def weight(*settings: str) -> Curve:
    return measure(configure([f"quant.weight.{setting}" for setting in settings]).weight, "weight")


def activation(*settings: str) -> Curve:
    return measure(configure([f"quant.activation.{setting}" for setting in settings]).activation, "activation")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "off"])
def test_every_preset_is_drawn(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scheme.svg"
    assert main(["show", "--preset", name, "--out", str(out)]) == 0
    assert "quant.weight: " in capsys.readouterr().out
    assert "SQNR" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", gallery.USUAL)
def test_a_curve_stays_on_its_levels(name: str) -> None:
    curve = measure(gallery.schemes()[name], "weight")
    assert torch.isin(curve.y, curve.levels).all()
    assert len(curve.levels) <= 2 ** gallery.schemes()[name].bits  # type: ignore[operator]
    assert (curve.y.diff() >= 0).all()
    assert float(curve.levels[0]) >= curve.clip[0] - 1e-6
    # every level is the nearest one to the inputs that get it; ternary weights have a threshold of their own
    nearest = curve.levels[(curve.x.unsqueeze(1) - curve.levels).abs().argmin(dim=1)]
    slack = 0.12 if name == "ternary" else 1e-3
    assert ((curve.y - curve.x).abs() <= (nearest - curve.x).abs() + slack).all()


@pytest.mark.parametrize(("name", "scale"), [("mxfp4", 0.5), ("mxfp6 (e2m3)", 0.5), ("mxfp8 (e4m3)", 2.0**-7)])
def test_blocks_are_drawn_with_the_median_of_their_scales(name: str, scale: float) -> None:
    """Of 32 Gaussians the largest is about 2.1 in the median: the power of two below it is 2."""
    curve = measure(gallery.schemes()[name], "weight")
    assert curve.clip[1] == FORMATS[gallery.schemes()[name].format].grid(  # type: ignore[misc]
        int(curve.width), True, False
    ).high * scale  # fmt: skip


def test_blocks_tables_and_channels_share_their_scales_bits() -> None:
    bits = {name: curve.bits for name, curve in gallery.measured(gallery.schemes()).items()}
    assert bits["mxfp4"] == 4.25
    assert bits["nvfp4"] == 4.5
    assert bits["int4 (groups of 32)"] == 5.0
    assert bits["int8"] == pytest.approx(8 + 32 / 576)
    assert bits["codebook (16 values)"] == pytest.approx(4 + 16 * 32 / (256 * 576))


def test_vectors_are_a_cloud() -> None:
    curve = weight("bits=6", "format=product", "granularity=group", "group_size=4", "range=learned")
    assert curve.random
    assert "have no transfer curve" in curve.notes[0]
    assert curve.width == 1.5
    assert 4 < curve.sqnr_db < 20 * 0.30103 * 1.5  # Shannon's limit


def test_dorefa_is_drawn_with_its_tanh_and_without_zero() -> None:
    curve = weight("bits=2", "range=dorefa", "granularity=tensor")
    torch.testing.assert_close(curve.levels, torch.tensor([-1, -1 / 3, 1 / 3, 1]))
    torch.testing.assert_close(curve.ideal, curve.x.tanh(), atol=2e-3, rtol=0)
    (gradient,) = curve.gradients.values()
    torch.testing.assert_close(gradient, 1 - curve.x.tanh().square(), atol=2e-3, rtol=0)
    assert "tanh" in curve.notes[-1]


def test_ewgs_is_drawn_for_both_signs_of_the_incoming_gradient() -> None:
    curve = weight("bits=3", "granularity=tensor", "gradient=ewgs", "gradient_strength=[0.2,0.2]")
    up, down = curve.gradients.values()
    assert list(curve.gradients) == ["delta = 0.2, g > 0", "delta = 0.2, g < 0"]
    inside = (curve.x > curve.clip[0]) & (curve.x < curve.clip[1])
    torch.testing.assert_close((up + down)[inside], torch.full_like(up[inside], 2.0))
    assert float(up[inside].max()) == pytest.approx(1.1, abs=0.01)


def test_dsq_is_drawn_at_both_ends_of_training() -> None:
    curve = activation("bits=3", "gradient=dsq", "gradient_strength=[1,10]", "observer=mse", "narrow_range=true")
    first, last = curve.gradients.values()
    assert list(curve.gradients) == ["k = 1 (first step)", "k = 10 (last step)"]
    inside = (curve.x > curve.clip[0]) & (curve.x < curve.clip[1])
    assert float(first[inside].min()) > 0.8
    assert float(last.max()) == pytest.approx(5.0, rel=0.01)  # k / (2 tanh(k / 2))
    assert float(last[inside].mean()) == pytest.approx(1.0, abs=0.02)


def test_noise_is_a_cloud_as_wide_as_a_step() -> None:
    curve = activation("bits=4", "gradient=noise")
    step = float(curve.levels.diff().median())
    inside = (curve.x > curve.clip[0] + step) & (curve.x < curve.clip[1] - step)
    error = (curve.y - curve.x)[inside]
    assert curve.random
    assert float(error.abs().max()) <= step / 2 + 1e-5
    assert float(error.std()) == pytest.approx(step / 12**0.5, rel=0.05)


def test_adaptive_rounding_is_drawn_as_nearest_and_says_so() -> None:
    curve = weight("bits=4", "rounding=adaptive", "range=fixed")
    plain = weight("bits=4", "range=fixed")
    assert torch.equal(curve.y, plain.y)
    assert curve.sqnr_db == plain.sqnr_db
    assert "learned nothing yet: drawn as nearest" in curve.notes[0]


def test_what_follows_a_relu_is_measured_on_one() -> None:
    curve = activation("bits=4", "signed=false")
    assert curve.clip[0] == 0
    assert curve.sqnr_db > 20
    assert "measured on relu(x)" in curve.notes[0]


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, rule in RANGES.items() for part in rule.roles])
def test_every_range_is_drawn(name: str, part: str) -> None:
    settings = [f"quant.{part}.bits=4", f"quant.{part}.range={name}"]
    settings += [f"quant.{part}.symmetric=false"] if RANGES[name].affine else []
    curve = measure(getattr(configure(settings), part), part)
    assert curve.sqnr_db > 4
    assert len(curve.levels) <= 16


@pytest.mark.parametrize("name", GRADIENTS)
def test_every_gradient_is_drawn(name: str) -> None:
    curve = activation("bits=4", f"gradient={name}", "range=lsq")
    assert all(gradient.isfinite().all() for gradient in curve.gradients.values())


@pytest.mark.parametrize(
    "settings",
    [
        ["granularity=block", "block_size=[16,16]"],
        ["granularity=block", "block_size=[-1,1]"],
        ["granularity=channel", "axis=1"],
        ["granularity=channel", "axis=-1"],
        ["granularity=group", "group_size=48"],
    ],
)
def test_every_granularity_of_weights_is_drawn(settings: list[str]) -> None:
    curve = weight("bits=4", *settings)
    assert 13 < curve.sqnr_db < 22


@pytest.mark.parametrize("settings", [["granularity=token"], ["granularity=group", "group_size=32"], ["axis=-1", "granularity=channel"]])  # fmt: skip # noqa: E501
def test_every_granularity_of_activations_is_drawn(settings: list[str]) -> None:
    assert 13 < activation("bits=4", "range=dynamic", *settings).sqnr_db < 30


GRIDS = {  # what a format needs besides its bits, which of them are valid, and whether activations have it
    name: (
        ["granularity=group", f"group_size={kind.block}", "range=dynamic"] if kind.block
        else ["granularity=group", "group_size=4", "range=learned"] if kind.vectors
        else ["granularity=channel", "range=learned"] if kind.fitted and kind.grid is None
        else ["granularity=channel", "range=dynamic"] if kind.fitted
        else ["granularity=tensor", "range=fixed"],
        kind.bits[len(kind.bits) // 2],
        not kind.fitted,
    )
    for name, kind in FORMATS.items()
}  # fmt: skip
VOCABULARY = [
    *((f"format={name}", f"bits={bits}", *rest) for name, (rest, bits, _) in GRIDS.items()),
    *((f"rounding={name}", "bits=3", "range=fixed") for name in ROUNDING),
    *((f"observer={name}", "bits=4", "range=fixed") for name in OBSERVERS),
]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("fields", VOCABULARY, ids=lambda fields: fields[0])
def test_every_name_is_drawn(fields: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, as a picture: every format, rounding and observer, of weights, and of activations where valid."""
    name, _, value = fields[0].partition("=")
    parts = ["weight"] + (["activation"] if name == "observer" or (name == "format" and GRIDS[value][2]) else [])
    out = tmp_path / "scheme.svg"
    settings = [f"quant.{part}.{field}" for part in parts for field in fields]
    assert main(["show", *settings, "--out", str(out)]) == 0
    svg, said = out.read_text(encoding="utf-8"), capsys.readouterr().out.splitlines()
    lines = [line for line in said if "SQNR" in line and line.startswith("quant.")]
    assert len(lines) == len(parts)
    for part, line in zip(parts, lines, strict=True):
        assert line.startswith(f"quant.{part}: ")
        assert value in line or value == "nearest"
        assert line.split(", SQNR")[0] in svg  # the title of its row
        assert float(line.split()[-2]) > 1
    assert svg.count('id="axes_') >= 3 * len(parts)


def test_three_bits_of_sums_of_powers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Li et al. 2020: of 3 bits one is the sign, and two are one term: 0, 1, 1/2, 1/4."""
    settings = ["quant.weight.bits=3", "quant.weight.format=apot"]
    out = tmp_path / "scheme.png"
    assert main(["show", *settings, "--out", str(out)]) == 0
    assert "quant.weight: 3-bit apot channel, dynamic (minmax), SQNR" in capsys.readouterr().out
    assert out.read_bytes()[:4] == b"\x89PNG"
    curve = measure(configure(settings).weight, "weight")
    levels = curve.levels / curve.levels.max()
    assert levels.tolist() == pytest.approx([-1, -0.5, -0.25, 0, 0.25, 0.5, 1])


# ---- the gallery -----------------------------------------------------------------------------------------------------


def test_the_gallery_is_sorted_by_bits_then_by_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "formats.svg"
    assert main(["show", "--out", str(out), "--gallery"]) == 0
    lines = capsys.readouterr().out.splitlines()[:-1]
    assert len(lines) == len(gallery.USUAL)
    names = [line[:24].strip() for line in lines]
    assert set(names) == set(gallery.USUAL)
    order = [(-gallery.schemes()[name].bits, -float(line.split(" dB")[0].split()[-1]))  # type: ignore[operator]
             for name, line in zip(names, lines, strict=True)]  # fmt: skip
    assert order == sorted(order)
    svg = out.read_text(encoding="utf-8")
    assert len(svg) < 150_000
    assert all(f">{name}<" in svg for name in names)


def test_the_gallery_takes_presets_formats_and_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "formats.png"
    mine = ["quant.weight.bits=5", "quant.weight.rounding=floor"]
    assert main(["show", "--gallery", "w4g32", "mxfp4", "apot3", "int16", "product4", *mine, "--out", str(out)]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["int16", "yours", "w4g32", "mxfp4", "apot3", "product4", "wrote"]
    assert out.read_bytes()[:4] == b"\x89PNG"


def test_the_picture_in_the_readme_shows_the_usual_formats() -> None:
    svg = (Path(qat.__file__).parents[1] / "docs" / "formats.svg").read_text(encoding="utf-8")
    assert len(svg) < 150_000
    assert all(f">{name}<" in svg for name in gallery.USUAL)
