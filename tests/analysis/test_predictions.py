"""Paired tests against scipy and enumeration; changed predictions by hand; pictures as other programs read them."""

import base64
import io
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest

from qat.analysis.png import data_uri, png
from qat.analysis.predictions import ScoreBook, changed, compare, mcnemar, score, show, sign_flips

TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])


def logits(predicted: list[int], sure: float) -> torch.Tensor:
    """Logits whose softmax gives the predicted class this probability and the two others the rest."""
    p = torch.full((len(predicted), 3), (1 - sure) / 2)
    p[range(len(predicted)), predicted] = sure
    return p.log() + 5


def test_scores_are_those_of_a_softmax() -> None:
    outputs = torch.randn(6, 3)
    found = score(outputs, TARGETS)
    assert found is not None
    torch.testing.assert_close(found.loss, F.cross_entropy(outputs, TARGETS, reduction="none"))
    torch.testing.assert_close(found.sure, outputs.softmax(1).amax(1))
    assert found.correct.tolist() == (outputs.argmax(1) == TARGETS).float().tolist()
    sequence, labels = torch.randn(2, 5, 4), torch.randint(0, 4, (2, 5))
    found = score(sequence, labels, class_dim=-1)
    assert found is not None
    torch.testing.assert_close(found.loss, F.cross_entropy(sequence.mT, labels, reduction="none").mean(1))
    assert found.predicted.shape == (2, 5)


def test_what_is_no_classification_has_no_scores() -> None:
    assert score(torch.randn(6, 3), torch.randn(6, 3)) is None
    assert score(torch.randn(6, 1), TARGETS) is None
    assert score(torch.randn(6, 3, 2), TARGETS) is None
    book = ScoreBook()
    book.add("float", torch.randn(4, 3), TARGETS[:4])
    book.add("float", torch.randn(2, 3), TARGETS[4:])
    book.add("qat", torch.randn(4, 3), torch.randn(4, 3))
    assert ("float" in book, "qat" in book, "ptq" in book) == (True, False, False)
    assert book["float"].predicted.shape == (6,)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (8, 2), (30, 45), (700, 610)])
def test_mcnemar_is_the_binomial_test(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=0.02 if gained + lost >= 1000 else 1e-9)


def test_sign_flips_are_those_of_all_signs() -> None:
    change = torch.randn(10, generator=torch.Generator().manual_seed(3)) + 0.5
    sums = [abs(float((torch.tensor(signs) * change).sum())) for signs in itertools.product((-1.0, 1.0), repeat=10)]
    exact = sum(s >= abs(float(change.sum())) - 1e-6 for s in sums) / len(sums)
    assert 0.01 < exact < 0.5
    assert sign_flips(change) == pytest.approx(exact, abs=0.015)
    assert sign_flips(torch.zeros(3)) == 1.0
    assert sign_flips(torch.ones(100)) == 1 / 10_000


def test_two_networks_are_compared_sample_by_sample() -> None:
    before, after = score(logits([0, 1, 2, 1, 2, 0], 0.5), TARGETS), score(logits([0, 1, 2, 0, 1, 0], 0.8), TARGETS)
    assert before is not None
    assert after is not None
    found = compare(before, after, "correct")
    assert (found["gained"], found["lost"], found["samples"], found["test"]) == (2, 0, 6, "McNemar")
    assert found["p"] == 0.5
    assert found["difference"] == pytest.approx(2 / 6)
    assert found["low"] < 2 / 6 < found["high"]
    by_loss = compare(before, after, "loss")
    assert (by_loss["gained"], by_loss["lost"], by_loss["test"]) == (5, 1, "permutation")


def test_changed_predictions_are_found_and_shown() -> None:
    before, after = score(logits([0, 1, 2, 0, 2, 0], 0.6), TARGETS), score(logits([1, 1, 0, 0, 1, 0], 0.9), TARGETS)
    after = type(after)(**{**vars(after), "expected": after.expected - torch.tensor([0.0, 0, 0.01, 0, 0, 0])})
    found = changed(before, after, TARGETS)
    assert (found["introduced"], found["repaired"], found["positions"]) == (2, 1, 6)
    first, second = found["worst"]
    assert (first["index"], first["label"], first["before"], first["after"]) == ([2], 2, 2, 0)  # it lost most
    assert (first["before_sure"], first["after_sure"]) == (pytest.approx(0.6), pytest.approx(0.9))
    assert second["index"] == [0]
    images = torch.linspace(-1, 1, 6 * 16).reshape(6, 1, 4, 4)
    about = {"classes": ["cat", "dog", "eel"], "mean": [0.5], "std": [0.5]}
    shown = show(found, images, about)
    assert (shown["kind"], shown["worst"][0]["label"], shown["worst"][0]["after"]) == ("pictures", "eel", "cat")
    assert shown["worst"][0]["picture"] == data_uri(images[2] * 0.5 + 0.5)
    assert show(found, torch.randn(6, 7), {})["kind"] == "samples"


def test_of_text_is_shown_what_was_read() -> None:
    text = torch.tensor([[0, 1, 2, 1], [2, 1, 0, 0]])
    targets = torch.tensor([[1, 2, 1, 0], [1, 0, 0, 1]])
    right = F.one_hot(targets, 3).float() * 4
    wrong = right.clone()
    wrong[1, 2] = torch.tensor([0.0, 0.0, 4.0])
    found = changed(score(right, targets, -1), score(wrong, targets, -1), targets)
    shown = show(found, text, {"classes": ["a", "b", "c"]})
    assert (shown["kind"], shown["introduced"], shown["positions"]) == ("text", 1, 8)
    assert [shown["worst"][0][key] for key in ("text", "label", "before", "after")] == ["cba", "a", "a", "c"]


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_read_by_other_programs(channels: int) -> None:
    from matplotlib.image import imread

    image = torch.rand(channels, 5, 7) * 1.2 - 0.1
    read = imread(io.BytesIO(png(image)), format="png")
    expected = (image.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy() / 255
    assert np.allclose(read.reshape(5, 7, channels), expected, atol=1e-6)
    assert base64.b64decode(data_uri(image).partition("base64,")[2]) == png(image)
