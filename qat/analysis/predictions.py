"""Predictions of two networks on the same samples: which changed, and whether the difference is more than luck."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FLIPS = 9999
"""Random signs of the permutation test."""
LEVEL = 0.05
"""A difference is called one below this probability."""


@dataclass(frozen=True)
class Scores:
    """What one network said of every sample of a test set.

    Attributes:
        loss: cross-entropy in nats, a mean over a sample's positions; shape [n].
        correct: share of a sample's positions that are right; shape [n].
        predicted: class at every position, shape [n, ...].
        sure: probability of that class, shape [n, ...].
        expected: probability of the true class, shape [n, ...].
    """

    loss: Tensor
    correct: Tensor
    predicted: Tensor
    sure: Tensor
    expected: Tensor


class ScoreBook:
    """Scores of several networks on one test set, batch by batch.

    Args:
        class_dim: of the outputs, along which the classes lie.
    """

    def __init__(self, class_dim: int = 1) -> None:
        self.class_dim = class_dim
        self._parts: dict[str, list[Scores | None]] = {}

    def add(self, name: str, outputs: Tensor, targets: Tensor) -> None:
        """Take in a batch of a network's outputs."""
        self._parts.setdefault(name, []).append(score(outputs, targets, self.class_dim))

    def take(self, name: str, scores: dict[str, Tensor]) -> None:
        """Take in the scores of a network, the fields of `Scores`, as they were kept."""
        self._parts[name] = [Scores(**scores)]

    def __contains__(self, name: str) -> bool:
        return bool(self._parts.get(name)) and None not in self._parts[name]

    def __getitem__(self, name: str) -> Scores:
        parts = [part for part in self._parts[name] if part is not None]
        return Scores(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Scores)))


def score(outputs: Tensor, targets: Tensor, class_dim: int = 1) -> Scores | None:
    """Scores of logits; None where outputs and targets are not those of a classification.

    Args:
        outputs: logits, with classes along `class_dim`.
        targets: labels, int64, of the same shape without that dimension.
        class_dim: see there.
    """
    if targets.dtype != torch.int64 or outputs.dim() != targets.dim() + 1 or outputs.shape[class_dim] < 2:
        return None
    logits = outputs.detach().float().movedim(class_dim, -1)
    if logits.shape[:-1] != targets.shape:
        return None
    sure, predicted = F.log_softmax(logits, dim=-1).max(dim=-1)
    expected = F.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    right = (predicted == targets).float()
    return Scores(
        loss=-expected.flatten(1).mean(1) if expected.dim() > 1 else -expected,
        correct=right.flatten(1).mean(1) if right.dim() > 1 else right,
        predicted=predicted, sure=sure.exp(), expected=expected.exp(),
    )  # fmt: skip


def compare(before: Scores, after: Scores, by: str) -> dict[str, Any]:
    """A paired test of two networks on the same samples.

    Args:
        before, after: their scores.
        by: "correct", or "loss".

    Returns:
        `by`, `samples`, `difference` (mean of after minus before), `low` and `high` (95 % interval of it),
        `gained` and `lost` (samples that became right and wrong; better and worse, by loss), `p` (two-sided) and
        `test`: McNemar's, exact, where every sample is right or wrong; else a permutation test that flips signs.
    """
    a, b = getattr(before, by), getattr(after, by)
    change = (b - a).double()
    n, mean = len(change), float(change.mean())
    better, worse = (change > 0, change < 0) if by == "correct" else (change < 0, change > 0)
    gained, lost = int(better.sum()), int(worse.sum())
    whole = by == "correct" and bool(((a == 0) | (a == 1)).all() and ((b == 0) | (b == 1)).all())
    if whole:
        p, (low, high) = mcnemar(gained, lost), paired_interval(gained, lost, n)
    else:
        half = 1.96 * float(change.std(correction=1)) / math.sqrt(n) if n > 1 else math.inf
        p, low, high = sign_flips(change), mean - half, mean + half
    return {
        "by": by, "samples": n, "difference": mean, "low": low, "high": high, "gained": gained, "lost": lost, "p": p,
        "test": "McNemar" if whole else "permutation",
    }  # fmt: skip


def paired_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """A 95 % interval of the difference of two shares of the same n samples.

    Half a sample is added to each of the four cells, so that it has a width where few samples differ, or none.

    Source: Agresti, Min 2005, "Simple improved confidence intervals for comparing matched proportions".

    >>> [round(end, 4) for end in paired_interval(4, 0, 359)]
    [-0.001, 0.0232]
    """
    both, apart = gained + lost + 1, gained - lost
    half = 1.96 * math.sqrt(both - apart**2 / (n + 2))
    return (apart - half) / (n + 2), (apart + half) / (n + 2)


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided probability that equal networks differ so unevenly on the samples where they differ.

    Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions", with the
    binomial distribution in place of its approximation.

    >>> round(mcnemar(8, 2), 6), mcnemar(0, 0), mcnemar(5, 5)
    (0.109375, 1.0, 1.0)
    """
    n, k = gained + lost, min(gained, lost)
    if n >= 1000:
        return min(1.0, math.erfc((abs(gained - lost) - 1) / math.sqrt(2 * n)))
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def sign_flips(change: Tensor, flips: int = FLIPS, seed: int = 0) -> float:
    """The two-sided probability of so large a mean if each sample's difference had either sign with equal chance.

    Args:
        change: differences of paired samples, shape [n].
        flips: random choices of signs.
        seed: of these.
    """
    change = change[change != 0].double()
    if not len(change):
        return 1.0
    generator = torch.Generator().manual_seed(seed)
    observed, reached, done = abs(float(change.sum())) * (1 - 1e-12), 0, 0
    while done < flips:  # in parts that fit in memory
        count = min(flips - done, max(1, 4_000_000 // len(change)))
        signs = torch.randint(0, 2, (count, len(change)), generator=generator, dtype=torch.int8)
        sums = (2 * signs - 1).double() @ change
        reached, done = reached + int((sums.abs() >= observed).sum()), done + count
    return (reached + 1) / (flips + 1)


def changed(before: Scores, after: Scores, targets: Tensor, most: int = 24) -> dict[str, Any]:
    """Where quantization made a right prediction wrong, and the other way round.

    Args:
        before, after: scores of the float and of the quantized network.
        targets: labels, [n, ...].
        most: as many are listed: those whose true class lost most of its probability. Of positions where the networks
            say exactly the same (a window that begins with the same character) one is.

    Returns:
        `introduced` and `repaired` (how many predictions), `positions` (of all), and `worst`: dicts with `index` (of
        the sample, and of the position in it where there are several), `label`, `before`, `after` (classes),
        `before_sure`, `after_sure` (their probabilities), `before_expected`, `after_expected` (of the true class).
    """
    was, now = before.predicted == targets, after.predicted == targets
    flat = (was & ~now).nonzero()
    drop = (before.expected - after.expected)[was & ~now]
    worst: list[dict[str, Any]] = []
    known = set()
    for i in drop.argsort(descending=True, stable=True).tolist():
        at = tuple(flat[i].tolist())
        same = (int(targets[at]), round(float(before.expected[at]), 6), round(float(after.expected[at]), 6))
        if same in known:
            continue
        known.add(same)
        if len(worst) == most:
            break
        worst.append({
            "index": list(at), "label": int(targets[at]), "before": int(before.predicted[at]),
            "after": int(after.predicted[at]), "before_sure": float(before.sure[at]),
            "after_sure": float(after.sure[at]), "before_expected": float(before.expected[at]),
            "after_expected": float(after.expected[at]),
        })  # fmt: skip
    return {"introduced": len(flat), "repaired": int((~was & now).sum()), "positions": was.numel(), "worst": worst}


def show(found: Mapping[str, Any], inputs: Tensor, about: Mapping[str, Any]) -> dict[str, Any]:
    """`changed` with what a reader can judge by: each sample's picture or text, and the names of classes.

    Args:
        found: from `changed`.
        inputs: the whole test set.
        about: of the data (`describe()` of a data module): `classes`; `mean` and `std` of pictures.

    Returns:
        With `kind`: "pictures" (each entry has `picture`, a PNG as a data URI), "text" (`text`, what the network read up
        to there, where an input is indices of classes), or "samples".
    """  # noqa: E501
    from qat.analysis.png import data_uri

    classes = [str(name) for name in about.get("classes") or ()]

    def named(label: int) -> str:
        return classes[label] if label < len(classes) else str(label)

    pictures = inputs.dim() == 4 and inputs.shape[1] in (1, 3) and inputs.is_floating_point()
    text = inputs.dim() == 2 and not inputs.is_floating_point() and bool(classes)
    entries = []
    for entry in found["worst"]:
        shown = entry | {key: named(entry[key]) for key in ("label", "before", "after")}
        sample = inputs[entry["index"][0]]
        if pictures:
            mean, std = (torch.tensor(about.get(key) or [value]).reshape(-1, 1, 1) for key, value in
                         (("mean", 0.0), ("std", 1.0)))  # fmt: skip
            shown["picture"] = data_uri(sample * std + mean)
        elif text and len(entry["index"]) > 1:
            shown["text"] = "".join(named(i) for i in sample[: entry["index"][1] + 1].tolist())
        entries.append(shown)
    kind = "pictures" if pictures else "text" if text else "samples"
    return {**found, "kind": kind, "worst": entries}
