"""Tasks: a loss and its metrics. What a LightningModule needs to know of the problem, and nothing of quantization."""

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy


class Classification:
    """Cross-entropy and accuracy.

    Args:
        num_classes: number of classes.
        label_smoothing: in [0, 1).
    """

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
