"""LightningModules as people write them: none of them knows anything of `qat`."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

FEATURES, CLASSES = 6, 3


def network(norm: bool = False) -> nn.Sequential:
    norms = [nn.BatchNorm1d(16)] if norm else []
    return nn.Sequential(nn.Linear(FEATURES, 16), *norms, nn.ReLU(), nn.Linear(16, CLASSES))


def features(count: int = 4) -> Tensor:
    return torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(1))


class Blobs(Dataset[Any]):
    """Three classes around three points; samples are (x, y), or dicts of them."""

    def __init__(self, as_dict: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.y = torch.arange(96) % CLASSES
        centres = torch.randn(CLASSES, FEATURES, generator=generator)
        self.x = centres[self.y] + 0.3 * torch.randn(96, FEATURES, generator=generator)
        self.as_dict = as_dict

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return {"x": self.x[i], "y": self.y[i]} if self.as_dict else (self.x[i], self.y[i])


def batches(as_dict: bool = False) -> DataLoader[Any]:
    """6 batches of 16."""
    return DataLoader(Blobs(as_dict), batch_size=16)


class Automatic(L.LightningModule):
    """`save_hyperparameters`, metrics, and steps that call `self`."""

    def __init__(self, lr: float = 0.05, norm: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = network(norm)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        self.metrics = torchmetrics.MetricCollection({"f1": torchmetrics.F1Score("multiclass", num_classes=CLASSES)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        outputs = self(x)
        return F.cross_entropy(outputs, y), outputs, y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, outputs, y = self.loss(batch)
        self.accuracy(outputs, y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("loss", loss)
        return loss

    def evaluation(self, batch: Any) -> Tensor:
        loss, outputs, y = self.loss(batch)
        self.metrics.update(outputs, y)
        self.log_dict(dict(self.metrics.items()))
        self.log("evaluated", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.evaluation(batch)

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.evaluation(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class CallsNet(Automatic):
    """Steps call `self.net`, not `self`."""

    def loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        outputs = self.net(x)
        return F.cross_entropy(outputs, y), outputs, y


class OwnLayers(Automatic):
    """Layers of its own, functions in forward, and an example input."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        del self.net
        self.example_input_array = features()
        self.first = nn.Linear(FEATURES, 16)
        self.second = nn.Linear(16, 16)
        self.last = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        y = F.dropout(torch.tanh(self.second(x)) + x, 0.1, self.training)
        return self.last(torch.cat([x, y], 1))


class Configured(Automatic):
    """Layers are made in `configure_model`."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.net = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.net is None:
            self.net = network()


class Dicts(Automatic):
    """Batches are dicts, and forward takes keyword arguments."""

    def forward(self, *, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        y = self.net(x)
        return {"logits": y if scale is None else y * scale}

    def loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        outputs = self(x=batch["x"])["logits"]
        return F.cross_entropy(outputs, batch["y"]), outputs, batch["y"]


class Manual(Automatic):
    """Manual optimization with two optimizers and a schedule."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.automatic_optimization = False
        self.both = [self.net[0], self.net[2]]  # beside the registered ones
        self.biases = [layer.bias for layer in self.both]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss, _, _ = self.loss(batch)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        schedules: Any = self.lr_schedulers()
        schedules.step()
        self.log("loss", loss)

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.net[0].parameters(), lr=self.lr)
        second = torch.optim.Adam(self.net[2].parameters(), lr=self.lr)
        return [first, second], [torch.optim.lr_scheduler.StepLR(first, 3)]


class GAN(L.LightningModule):
    """A generator, which forward runs, and a discriminator, which only training does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(), nn.Linear(16, FEATURES))
        self.discriminator = nn.Sequential(nn.Linear(FEATURES, 16), nn.LeakyReLU(), nn.Linear(16, 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, _ = batch
        generator, discriminator = self.optimizers()  # type: ignore[misc]
        made = self(torch.randn(len(real), 4))
        judged = torch.cat([self.discriminator(real), self.discriminator(made.detach())])
        truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
        self.toggle_optimizer(discriminator)
        discriminator.zero_grad()
        self.manual_backward(F.binary_cross_entropy_with_logits(judged, truth))
        discriminator.step()
        self.untoggle_optimizer(discriminator)
        self.toggle_optimizer(generator)
        generator.zero_grad()
        fooled = self.discriminator(self(torch.randn(len(real), 4)))
        self.manual_backward(F.binary_cross_entropy_with_logits(fooled, torch.ones(len(real), 1)))
        generator.step()
        self.untoggle_optimizer(generator)

    def configure_optimizers(self) -> Any:
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in networks], []
