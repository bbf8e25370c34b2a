import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qat.zoo.loading import EpochShuffle
from qat.zoo.text import Characters, Windows

REPOSITORY = Path(__file__).parents[2]
FILE = REPOSITORY.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
TEXT = "abracadabra! " * 100  # 1,300 characters, 7 different ones


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "input.txt"
    path.write_text(TEXT)
    return path


def characters(path: Path | str | None, **changes: Any) -> Characters:
    arguments = {"name": "tiny", "num_classes": 7, "context": 8, "batch_size": 4, "path": path and str(path)}
    return Characters(**(arguments | changes))


def test_targets_are_the_characters_that_follow(file: Path) -> None:
    data = characters(file)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for inputs, targets in loader:
            assert inputs.dtype == targets.dtype == torch.int64
            for x, y in zip(inputs, targets, strict=True):
                read, following = data.decode(x), data.decode(y)
                assert len(read) == 8
                assert read + following[-1] in TEXT
                assert following[:-1] == read[1:]


def test_the_text_is_cut_by_position(file: Path) -> None:
    data = characters(file, val_share=0.1, test_share=0.2)
    parts = [data.decode(data.text(key)) for key in ("train", "val", "test")]
    assert "".join(parts) == TEXT
    assert [len(part) for part in parts] == [910, 130, 260]


def test_every_character_of_the_test_text_but_the_first_is_predicted_once(file: Path) -> None:
    data = characters(file, test_share=0.0505)  # 65 characters: 8 windows of 8, and one to begin with
    inputs, targets = data.test_tensors()
    assert inputs.shape == targets.shape == (8, 8)
    assert data.decode(targets) == TEXT[-64:]


def test_windows_by_hand() -> None:
    windows = Windows(torch.arange(10), 3)
    assert len(windows) == 3
    assert windows[2][0].tolist() == [6, 7, 8]
    assert windows[2][1].tolist() == [7, 8, 9]
    assert len(Windows(torch.arange(9), 3)) == 2  # the last target would be missing


def test_training_windows_move_from_epoch_to_epoch_and_stay_in_the_text() -> None:
    windows = Windows(torch.arange(100), 8, seed=0)
    shifts, last = set(), []
    for epoch in range(40):
        windows.start_epoch(epoch)
        inputs, targets = windows.__getitems__(list(range(len(windows))))
        assert torch.equal(inputs + 1, targets)
        assert int(inputs[0, 0]) == windows.shift
        shifts.add(windows.shift)
        last.append(int(targets.max()))
    assert shifts == set(range(8))
    assert max(last) == 95  # 11 windows after the largest shift
    windows.start_epoch(3)
    again = windows[0][0]
    windows.start_epoch(3, done=5, batch_size=4)
    assert torch.equal(windows[0][0], again)


def test_an_epoch_that_goes_on_sees_what_an_unbroken_one_sees(file: Path) -> None:
    def batches(done: int) -> list[torch.Tensor]:
        data = characters(file, seed=3)
        if done:
            data.load_state_dict({"batches_done": done})
        loader = data.train_dataloader()
        assert isinstance(loader.sampler, EpochShuffle)
        loader.sampler.set_epoch(2)
        return [inputs for inputs, _ in loader]

    whole = batches(0)
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], batches(5), strict=True))
    assert len({tuple(x.flatten().tolist()) for x in whole}) > 1


def test_examples_and_calibration_do_not_depend_on_the_seed(file: Path) -> None:
    a, b = characters(file, seed=1), characters(file, seed=2)
    assert a.example_input(3).shape == (3, 8)
    assert a.example_input().dtype == torch.int64
    assert torch.equal(a.example_input(), b.example_input())
    assert all(torch.equal(x, y) for x, y in zip(a.calibration_batches(3), b.calibration_batches(3, 4), strict=True))
    assert len(a.calibration_batches(1000)) == 37  # 146 windows of training text, 4 a batch
    assert a.checksum() == b.checksum()
    assert a.describe() == {"name": "tiny", "input_shape": [8], "classes": sorted(set(TEXT))}
    other = file.with_name("other.txt")
    other.write_text(TEXT[::-1])
    assert characters(other).checksum() != a.checksum()


def test_a_folder_with_input_txt_will_do(file: Path) -> None:
    assert torch.equal(characters(file.parent).text("val"), characters(file).text("val"))


@pytest.mark.parametrize("path", [None, "nowhere/input.txt"])
def test_without_the_file_it_says_where_to_get_it(path: str | None) -> None:
    data = characters(path)
    with pytest.raises(FileNotFoundError, match=r"data\.path=.*download https://\S+/input\.txt and give data\.path="):
        data.setup()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 9}, r"data\.num_classes=9 .* 7 different characters; give data\.num_classes=7"),
        ({"context": 65}, r"data\.context=65 .* the validation text is shorter"),
        ({"context": 0}, r"data\.context=0 .* at least 1"),
        ({"test_share": 0.5}, r"data\.test_share=0\.5 .* below 0\.5"),
        ({"batch_size": 0}, r"data\.batch_size=0 .* at least 1"),
    ],
)
def test_bad_arguments_are_named(file: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        characters(file, **changes).setup()


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match=r"data\.path=.* is not text in UTF-8"):
        characters(path).setup()


@pytest.mark.skipif(not FILE.is_file(), reason="tinyshakespeare is in shared/, not here")
def test_tiny_shakespeare_is_what_its_configuration_says() -> None:
    config = yaml.safe_load((REPOSITORY / "conf" / "data" / "tiny_shakespeare.yaml").read_text())
    config |= {"seed": 0, "path": str(FILE)}
    del config["defaults"]
    data = pkgutil.resolve_name(config.pop("_target_"))(**config)
    assert sum(len(data.text(key)) for key in ("train", "val", "test")) == 1_115_394
    assert data.decode(data.example_input(1)).startswith("First Citizen:\nBefore we proceed")
    assert data.class_names[:3] == ["\n", " ", "!"]
