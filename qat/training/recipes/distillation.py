"""Knowledge distillation: the quantized network learns from the float one, too."""

import copy
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


def soft_cross_entropy(outputs: Tensor, taught: Tensor, temperature: float, class_dim: int = 1) -> Tensor:
    """How far the softened predictions are from the teacher's: `T^2 KL(softmax(taught / T) || softmax(outputs / T))`.

    The factor keeps gradients of one size whatever the temperature is.

    Args:
        outputs, taught: logits of student and teacher, of one shape.
        temperature: above 0; the higher, the more the unlikely classes count.
        class_dim: the dimension of the classes; the result is the mean over all others.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    student = F.log_softmax(outputs.float() / temperature, dim=class_dim)
    teacher = F.log_softmax(taught.float() / temperature, dim=class_dim)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(class_dim).mean() * temperature**2


def feature_error(feature: Tensor, taught: Tensor) -> Tensor:
    """Squared error of a feature in units of the teacher's mean square, so that layers of any size count alike.

    Source: Romero et al. 2015, "FitNets", equation 3, without a regressor, as both networks have the same shapes.
    """
    taught = taught.float()
    return (feature.float() - taught).square().mean() / taught.square().mean().clamp(min=1e-12)


class Distillation(L.Callback):
    """Train on the float network's logits beside the labels, and on its intermediate features where they are named.

    loss = (1 - weight) * task + weight * soft_cross_entropy + feature_weight * mean of feature_error

    The teacher is the float network of the same run, in eval mode and without gradients. It is no part of the trained
    module, so no checkpoint holds it; a run that is resumed gives it anew.

    Args:
        teacher: the float network; in a run `train.py` gives it.
        temperature: of the softened predictions.
        weight: share of the loss that the teacher's predictions have, in [0, 1].
        features: names of layers whose outputs are compared. A layer that quantization absorbs (a ReLU) has none.
        feature_weight: of the features' term.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2; for quantized students,
    Mishra and Marr 2018, "Apprentice", and Polino et al. 2018, "Model compression via distillation and quantization".

    Raises:
        ValueError: a number outside its range; at the start of `fit`: no teacher, or a feature that does not exist.
        TypeError: at the start of `fit`: the module is not a QATModule.
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        temperature: float = 4.0,
        weight: float = 0.5,
        features: Sequence[str] = (),
        feature_weight: float = 1.0,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"distillation.temperature={temperature}: give a number above 0")
        if not 0 <= weight <= 1:
            raise ValueError(f"distillation.weight={weight}: give a share of the loss in [0, 1]")
        if feature_weight < 0:
            raise ValueError(f"distillation.feature_weight={feature_weight}: give a number of at least 0")
        self.teacher, self.temperature, self.weight = teacher, temperature, weight
        self.features, self.feature_weight = list(features), feature_weight
        self._handles: list[Any] = []
        self._outputs: dict[tuple[str, str], Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Join the module's loss."""
        terms = getattr(pl_module, "loss_terms", None)
        if terms is None:
            raise TypeError(
                f"Distillation adds to the loss of a QATModule; {type(pl_module).__name__} computes its own: call "
                f"qat.training.recipes.distillation.soft_cross_entropy(outputs, taught, temperature) in training_step"
            )
        if self.teacher is None:
            raise ValueError("distillation.teacher=None: give the float network, Distillation(teacher=net)")
        student: Any = pl_module.net
        names = called(student, self.teacher)
        for name in self.features:
            if name not in names:
                raise ValueError(
                    f"distillation.features: '{name}' is no layer whose output both networks have, the float and the "
                    f"quantized one (valid: {', '.join(names)})"
                )
        self.teacher = copy.deepcopy(self.teacher).to(pl_module.device).eval().requires_grad_(False)
        for role, net in (("student", student), ("teacher", self.teacher)):
            self._handles += [net.get_submodule(name).register_forward_hook(self._keep(role, name))
                              for name in self.features]  # fmt: skip
        self._term = lambda loss, inputs, outputs: self.loss(pl_module, loss, inputs, outputs)
        terms.append(self._term)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()
        terms = getattr(pl_module, "loss_terms", [])
        terms[:] = [term for term in terms if term is not vars(self).get("_term")]

    def loss(self, module: Any, loss: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The loss with the teacher's terms; `outputs` are the student's logits for `inputs`."""
        assert self.teacher is not None
        with torch.no_grad():
            taught = self.teacher(inputs)
        soft = soft_cross_entropy(outputs, taught, self.temperature, getattr(module.task, "class_dim", 1))
        module.log("train_distillation", soft)
        loss = (1 - self.weight) * loss + self.weight * soft
        if self.features:
            errors = [feature_error(*self._pair(name)) for name in self.features]
            error = torch.stack(errors).mean()
            module.log("train_features", error)
            loss = loss + self.feature_weight * error
        self._outputs.clear()
        return loss

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        missing = [role for role in ("student", "teacher") if (role, name) not in self._outputs]
        if missing:
            raise ValueError(f"distillation.features: '{name}' was not called by the {missing[0]}; name another layer")
        return self._outputs["student", name], self._outputs["teacher", name]

    def _keep(self, role: str, name: str) -> Any:
        def keep(layer: nn.Module, args: Any, output: Tensor) -> None:
            self._outputs[role, name] = output

        return keep


def called(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Names of modules that both networks call; of a recorded network those of its recording."""
    names = [name for name, _ in student.named_modules() if name]
    if isinstance(student, fx.GraphModule):
        own = [str(node.target) for node in student.graph.nodes if node.op == "call_module"]
        inside = tuple(f"{name}." for name in own)
        names = [name for name in names if name in own or name.startswith(inside)]
    theirs = {name for name, _ in teacher.named_modules()}
    return [name for name in names if name in theirs]
