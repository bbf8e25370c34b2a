from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qat.scheme import QuantConfig
from qat.training import QATModule
from qat.training.weights import checkpoint_phase, load_float_weights, read_tensors
from qat.zoo.models import ResNet, SmallCNN

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "weights" / "resnet20_cifar10.safetensors"


def net(width: int = 4) -> SmallCNN:
    return SmallCNN(in_channels=1, num_classes=10, width=width)


def state(width: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {name: torch.rand_like(t.float()).to(t.dtype) for name, t in net(width).state_dict().items()}


def loaded(path: Path) -> dict[str, Tensor]:
    network = net()
    load_float_weights(network, path)
    return network.state_dict()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("prefix", ["", "net.", "model.", "module."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt", ".pth"])
def test_every_kind_of_file_and_prefix(tmp_path: Path, prefix: str, suffix: str) -> None:
    tensors = {f"{prefix}{name}": t for name, t in state().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, path)
    elif suffix == ".ckpt":
        torch.save({"state_dict": tensors, "epoch": 3}, path)
    else:
        torch.save(tensors, path)
    assert equal(loaded(path), state())


def test_other_tensors_of_a_lightning_checkpoint_are_not_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "lightning.ckpt"
    tensors = {**{f"net.{name}": t for name, t in state().items()}, "metrics.val.total": torch.zeros(1)}
    torch.save({"state_dict": tensors}, path)
    assert equal(loaded(path), state())


def test_batch_counts_may_be_missing(tmp_path: Path) -> None:
    tensors = {name: t for name, t in state().items() if not name.endswith("num_batches_tracked")}
    assert len(tensors) < len(state())
    save_file(tensors, tmp_path / "w.safetensors")
    got = loaded(tmp_path / "w.safetensors")
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)


def test_missing_and_unexpected_keys_are_listed_and_the_likely_mistake_is_named(tmp_path: Path) -> None:
    tensors = state()
    tensors["head.wieght"] = tensors.pop(next(n for n in tensors if n.endswith("weight") and tensors[n].dim() == 2))
    tensors["extra"] = torch.zeros(2)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"float_checkpoint=.*w\.safetensors does not fit SmallCNN") as error:
        loaded(tmp_path / "w.safetensors")
    said = str(error.value)
    assert "1 missing from the file" in said
    assert "2 unexpected in the file (" in said
    assert "extra" in said
    assert "Is 'head.wieght' meant to be" in said


def test_shapes_that_differ_are_listed_with_both(tmp_path: Path) -> None:
    save_file(state(width=8), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"of another shape \(.*file \[8, 1, 3, 3\], network \[4, 1, 3, 3\]"):
        loaded(tmp_path / "w.safetensors")


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"\d+ missing from the file \(.* and \d+ more\); 1 unexpected"):
        loaded(tmp_path / "w.safetensors")


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    save_file({**state(), "extra": torch.zeros(1)}, tmp_path / "w.safetensors")
    network = net()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    with pytest.raises(ValueError, match="extra"):
        load_float_weights(network, tmp_path / "w.safetensors")
    assert equal(network.state_dict(), before)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"float_checkpoint=.*nowhere\.pt: there is no such file"):
        loaded(tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        loaded(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_a_truncated_file(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"whole{suffix}"
    if suffix == ".safetensors":
        save_file(state(), path)
    else:
        torch.save({"state_dict": state()}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=rf"float_checkpoint=.*whole{suffix} cannot be read"):
        loaded(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_of_something_else(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text{suffix}"
    path.write_text("accuracy,loss\n0.9,0.1\n" * 10)
    with pytest.raises(ValueError, match="cannot be read"):
        loaded(path)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"a": 1}, torch.zeros(3)])
def test_a_file_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_tensors(tmp_path / "w.pt")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "pickled.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_tensors(tmp_path / "pickled.pt")


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"{PUBLISHED.name} is in shared/weights, not here")
def test_published_weights_of_resnet20_load() -> None:
    network = ResNet(depth=20, shortcut="A", in_channels=3, num_classes=10)
    load_float_weights(network, PUBLISHED)
    tensors = read_tensors(PUBLISHED)
    own = network.state_dict()
    shared = [name for name in own if not name.endswith("num_batches_tracked")]
    assert len(shared) > 90
    assert all(torch.equal(own[name], tensors[name]) for name in shared)
    with pytest.raises(ValueError, match="does not fit SmallCNN"):
        load_float_weights(net(), PUBLISHED)


# --------------------------------------------------------------------------------------------- checkpoint_phase

MODEL = {"_target_": "qat.zoo.models.SmallCNN", "in_channels": 1, "num_classes": 10, "width": 4}
TASK = {"_target_": "qat.zoo.tasks.Classification", "num_classes": 10}


def checkpoint(path: Path, preset: str | None) -> Path:
    import lightning as L

    import qat

    module = QATModule(MODEL, TASK, {"_target_": "torch.optim.SGD", "lr": 0.1})
    if preset:
        module = module.quantized(qat.preset(preset), [1, 8, 8])
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
    return path


def test_the_phase_of_a_checkpoint(tmp_path: Path) -> None:
    import qat

    int8 = qat.preset("int8")
    assert checkpoint_phase(None, MODEL, int8) is None
    assert checkpoint_phase(checkpoint(tmp_path / "a.ckpt", None), MODEL, int8) == "float"
    assert checkpoint_phase(checkpoint(tmp_path / "b.ckpt", "int8"), MODEL, int8) == "qat"


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    import qat

    path = checkpoint(tmp_path / "b.ckpt", "int8")
    with pytest.raises(ValueError, match=r"weight\.bits was 8, is 4.*overrides\.yaml"):
        checkpoint_phase(path, MODEL, qat.preset("w4a8"))
    with pytest.raises(ValueError, match=r"model\._target_ was .*, is other\.Net"):
        checkpoint_phase(path, {**MODEL, "_target_": "other.Net"}, qat.preset("int8"))
    path = checkpoint(tmp_path / "a.ckpt", None)
    assert checkpoint_phase(path, MODEL, qat.preset("w2a2_lsq")) == "float"  # not quantized yet: any will do


def test_float_weights_load_from_a_checkpoint_of_the_float_phase(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "a.ckpt", None)
    saved = torch.load(path)["state_dict"]
    got = loaded(path)
    assert all(torch.equal(got[name], saved[f"net.{name}"]) for name in got)


def test_what_is_no_training_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ckpt_path=.*there is no such file"):
        checkpoint_phase(tmp_path / "nowhere.ckpt", MODEL, QuantConfig())
    torch.save({"state_dict": state()}, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match=r"is not a checkpoint of a training run; for weights use float_checkpoint="):
        checkpoint_phase(tmp_path / "weights.ckpt", MODEL, QuantConfig())
    save_file(state(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"ckpt_path=.*weights\.safetensors (is not a checkpoint|cannot be read)"):
        checkpoint_phase(tmp_path / "weights.safetensors", MODEL, QuantConfig())
    data = checkpoint(tmp_path / "cut.ckpt", None).read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"ckpt_path=.* cannot be read"):
        checkpoint_phase(tmp_path / "cut.ckpt", MODEL, QuantConfig())
