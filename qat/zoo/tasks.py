"""Tasks: a loss and its metrics. What a LightningModule needs to know of the problem, and nothing of quantization."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy


class Classification:
    """Cross-entropy and accuracy.

    Args:
        num_classes: number of classes.
        label_smoothing: in [0, 1).
    """

    class_dim = 1
    """The dimension of the outputs along which the classes lie."""

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        if num_classes < 2:
            raise ValueError(f"task.num_classes={num_classes}: a classification has at least 2 classes")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"task.label_smoothing={label_smoothing}: give a number in [0, 1)")
        self.num_classes, self.label_smoothing = num_classes, label_smoothing

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of logits [n, classes] against labels int64 [n]."""
        return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)

    def metrics(self) -> MetricCollection:
        """Fresh metrics of (logits, labels), under their torchmetrics names."""
        return MetricCollection({"accuracy": MulticlassAccuracy(self.num_classes, average="micro")})


class BitsPerCharacter(Metric):
    """Mean of -log2 p(next character): how many bits a character would take if the model compressed the text."""

    higher_is_better = False
    nats: Tensor
    characters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("characters", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add logits (N, T, characters) and what came next, int64 (N, T)."""
        self.nats += F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="sum").double()
        self.characters += targets.numel()

    def compute(self) -> Tensor:
        """Bits a character, over all that was added."""
        return (self.nats / self.characters / math.log(2)).float()


class LanguageModel:
    """Predict the next character at every position: cross-entropy, and bits per character.

    Args:
        num_classes: size of the vocabulary.
    """

    class_dim = -1
    """The dimension of the outputs along which the classes lie."""

    def __init__(self, num_classes: int) -> None:
        if num_classes < 2:
            raise ValueError(f"task.num_classes={num_classes}: a vocabulary has at least 2 characters")
        self.num_classes = num_classes

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy (in nats) of logits (N, T, num_classes) against what came next, int64 (N, T)."""
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def metrics(self) -> MetricCollection:
        """Fresh metrics of (logits, next characters)."""
        return MetricCollection({"bits_per_character": BitsPerCharacter()})
