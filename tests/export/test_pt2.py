"""`.pt2`: the reloaded program against the integer network, layer by layer; hostile archives."""

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code

import qat
from qat.export.formats import EXPORTERS
from qat.export.pt2 import open_pt2, pt2_given
from qat.export.reference import Reference
from qat.ptq.finalize import PTQConfig, finalize
from qat.runtime.layers import IntegerConv
from qat.runtime.network import IntegerNetwork
from qat.zoo.models import SmallCNN
from tests.networks.blocks import Net


class Mixed(nn.Module):
    """Signed grids, a depthwise layer, a clamp, a concatenation, a float island, a product of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, 2, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.wide(x))
        y = torch.cat([x, nn.functional.pad(self.up(x)[:, :, 1:, 1:], (0, 0, 0, 0))], 1)
        y = self.norm(y.mean((2, 3)) + self.depthwise(x).amax((2, 3)).sum(1, keepdim=True))
        return self.head(torch.tanh(y))


def filled(net: Any, x: Tensor) -> Tensor:
    """What stands for numbers of the network's code: padding with one, zeros at given places, and beside maxima."""
    y = nn.functional.pad(net.a(x), (1, 1), value=0.6)
    y, places = nn.functional.max_pool2d(net.b(y.masked_fill(net.hidden, 0.0)), 2, return_indices=True)
    return nn.functional.max_unpool2d(net.c(y), places, 2)


def filled_net() -> nn.Module:
    hidden = torch.rand(12, 14) > 0.7
    return Net(filled, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 3), c=nn.Conv2d(4, 4, 1), hidden=hidden)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "small_cnn": (lambda: SmallCNN(1, 10, width=8), [16, 1, 12, 12]),
    "mixed": (Mixed, [8, 3, 12, 12]),
    "filled": (filled_net, [8, 3, 12, 12]),
}


def lowered(name: str, preset: str) -> tuple[IntegerNetwork, Tensor]:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    x = torch.randn(shape)
    prepared = qat.prepare(build().eval(), qat.preset(preset), x[:2])
    finalize(prepared, [x], PTQConfig(bias_correction=False), trained=False)
    return qat.lower(prepared), x


def given_by(network: IntegerNetwork, x: Tensor) -> dict[str, Tensor]:
    grids = network.grids()
    return {name: tensor for name, tensor in network.run(x).items() if name in grids}


@pytest.mark.parametrize("preset", ["int8", "w8a8_asymmetric", "w4a4", "w4g32"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_pt2_reloaded_equals_the_network(name: str, preset: str, tmp_path: Path) -> None:
    network, x = lowered(name, preset)
    path = EXPORTERS["pt2"].file
    qat.export(network, tmp_path, x[:1], formats=["pt2"])
    given = given_by(network, x)
    made = pt2_given(tmp_path / path, "generic", network.grids(), (x,), given).integers
    assert made.keys() == given.keys()
    assert preset == "w4g32" or len(made) > 4
    for key, expected in given.items():
        steps = (made[key].int() - expected.int()).abs()
        assert steps.max() <= 1, key
        assert (steps == 0).float().mean() >= 0.999, key
    program = open_pt2(tmp_path / path, "generic")
    for size in (1, 5):
        expected = network(x[:size])
        assert (program(x[:size]) - expected).abs().max() <= 0.05 * expected.abs().max()
        assert program(x[:size]).shape == expected.shape


@torch.no_grad()
def test_the_file_holds_no_data_and_is_the_same_twice(tmp_path: Path) -> None:
    network, x = lowered("small_cnn", "int8")
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, inputs in ((first, x), (second, x + 1)):
        qat.export(network, folder, inputs, formats=["pt2"])
    assert (first / "model.pt2").read_bytes() == (second / "model.pt2").read_bytes()


def test_what_has_no_reference_form_is_refused() -> None:
    network, _ = lowered("small_cnn", "codebook4")
    with pytest.raises(ValueError, match="has no form in torch's reference quantized operations"):
        Reference(network)
    with pytest.raises(ValueError, match="target=cmsis_nn"):
        EXPORTERS["pt2"].check(qat.QuantConfig(target="cmsis_nn"))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("unpickled",))


def rewritten(content: bytes, change: Callable[[dict[str, bytes]], None]) -> bytes:
    """The archive with other files in it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def hostile() -> dict[str, Callable[[dict[str, bytes]], None]]:
    bomb = pickle.dumps(Bomb())

    def edit(end: str, change: Callable[[Any], Any]) -> Callable[[dict[str, bytes]], None]:
        def apply(files: dict[str, bytes]) -> None:
            name = next(name for name in files if name.endswith(end))
            files[name] = json.dumps(change(json.loads(files[name]))).encode()

        return apply

    def put(end: str, data: bytes) -> Callable[[dict[str, bytes]], None]:
        def apply(files: dict[str, bytes]) -> None:
            root = next(iter(files)).partition("/")[0]
            files[f"{root}/{end}"] = data

        return apply

    def pickled(config: Any) -> Any:
        next(iter(config["config"].values()))["use_pickle"] = True
        return config

    def evaluated(model: Any) -> Any:
        text = json.dumps(model)
        start = text.index('"expr_str": "') + len('"expr_str": "')
        return json.loads(text[:start] + "__import__('os').getcwd() + " + text[start:])

    return {
        "a pickled weight": edit("model_weights_config.json", pickled),
        "a pickled constant": edit("model_constants_config.json", lambda c: {"config": {"a": {"path_name": "a"}}}),
        "code in a size": edit("model.json", evaluated),
        "pickled inputs": put("data/sample_inputs/model.pt", bomb),
        "another file": put("data/constants/opaque_obj_0", bomb),
        "the older form": put("serialized_state_dict.pt", bomb),
        "no graph": lambda files: files.pop(next(name for name in files if name.endswith("models/model.json"))),
        "no list of tensors": put("extra/tensors.json", b"[1]"),
        "no json": put("models/model.json", b"{"),
    }


def test_nothing_is_unpickled_or_evaluated(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    network, x = lowered("small_cnn", "int8")
    content = qat.export(network, tmp_path, x, formats=["pt2"])["pt2"].read_bytes()
    path = tmp_path / "hostile.pt2"
    path.write_bytes(rewritten(content, lambda files: None))
    assert torch.equal(open_pt2(path, "generic")(x), open_pt2(tmp_path / "model.pt2", "generic")(x))
    for change in hostile().values():
        path.write_bytes(rewritten(content, change))
        with pytest.raises(ValueError, match=r"hostile.pt2: .*export the network again"):
            open_pt2(path, "generic")
    for damaged in (b"", content[: len(content) // 2], b"PK" + content[:100]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="export the network again"):
            open_pt2(path, "generic")
    assert "unpickled" not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="Inductor's int8 convolutions are exact with VNNI")
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@torch.no_grad()
def test_inductor_runs_every_convolution_in_int8(tmp_path: Path) -> None:
    network, x = lowered("small_cnn", "int8")
    program = open_pt2(qat.export(network, tmp_path, x, formats=["pt2"])["pt2"], "generic")
    torch._dynamo.reset()
    with inductor.patch(freezing=True):
        made, code = run_and_get_code(torch.compile(program.graph), x)
    convolutions = [n for n in network.nodes if isinstance(network.layer(n.name), IntegerConv)]
    assert sum(line.count("qconv_pointwise") for c in code for line in c.splitlines() if " = " in line) >= (
        len(convolutions) - 1  # the last layer is linear
    )
    assert not any("extern_kernels.convolution" in c for c in code)
    expected = network(x)
    assert (made - expected).abs().max() <= 0.05 * expected.abs().max()
