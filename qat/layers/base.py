"""What every quantized layer is: the float layer plus quantizers for its weights."""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self, TypeVar

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from qat.fake_quant import FakeQuantize
from qat.scheme import Granularity, TensorScheme

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Weight:
    """One weight of a layer.

    Attributes:
        name: of the parameter.
        tensor: the weight as its quantizer sees it, [out, inputs...].
        weight_quantizer: its quantizer.
        bias: what is added to its product; None for nothing.
    """

    name: str
    tensor: Tensor
    weight_quantizer: FakeQuantize
    bias: Tensor | None

    def outputs_first(self) -> Tensor:
        """The weight as its quantizer sees it."""
        return self.tensor


class Quantized(nn.Module):
    """Mixin of all layers with quantized weights: each keeps its float type's parameters, names and arguments.

    So a float checkpoint loads into it, and `isinstance(layer, nn.Linear)` holds.
    """

    called_with: Mapping[str, Any] = MappingProxyType({})
    """What a layer that no recording calls was called with in the example: parameter -> value, of tensors the shape."""
    multiplies: bool = True
    """An output is a sum of products of inputs with the weight, plus a bias: what the integer runtime computes."""
    biased: bool = True
    """An output has channels that a bias, or a BatchNorm behind the layer, can shift."""

    @classmethod
    def from_float(
        cls, module: nn.Module, scheme: TensorScheme, name: str, activation: TensorScheme | None = None
    ) -> Self:
        """Build from a float layer. Parameters, buffers and hooks are shared with it, not copied.

        Args:
            module: the float layer.
            scheme: how to quantize its weights.
            name: the layer's module path, for messages.
            activation: how to quantize what the layer computes inside, if it does; its input and output are quantized
                where they are read.

        Raises:
            ValueError: an axis that the weight does not have; a group size that does not divide its inputs.
        """
        layer = with_state_of(module, cls)
        layer._add_quantizers(scheme, name, activation)
        return layer

    def _add_quantizers(self, scheme: TensorScheme, name: str, activation: TensorScheme | None) -> None:
        raise NotImplementedError

    def quantize_input(self, scheme: TensorScheme, example: Tensor, name: str, sites: int = 1) -> None:
        """Give the layer a quantizer of its own for what it reads, where no graph shows who made it.

        Args:
            scheme: of the activation.
            example: what the layer reads, batch included.
            name: the layer's module path, for messages.
            sites: how many inputs it has; they share the scale.
        """
        self.input_quantizer = FakeQuantize(scheme, activation=example.shape, sites=sites)
        self.input_quantizer.name = f"{name}.input"

    def read(self, input: Tensor, site: int = 0) -> Tensor:
        """The input as the layer computes with it: fake-quantized by the layer's own quantizer, if it has one."""
        quantizer = self._modules.get("input_quantizer")
        if quantizer is None:
            return input
        result: Tensor = quantizer(input, site) if site else quantizer(input)
        return result

    def weights(self) -> Iterator[Weight]:
        """The layer's weights with their quantizers."""
        raise NotImplementedError


class QuantizedLayer(Quantized):
    """Mixin, first base of each layer with one weight: `class QuantLinear(QuantizedLayer, nn.Linear)`.

    Activations are not its concern: they are quantized where they are made.

    Attributes:
        sources: the quantizers whose grid the input may lie on, where a function reads the output: set by
            `qat.prepare`, so that sums are exact in evaluation (`qat.layers.exact`). Not submodules: they are others'.
    """

    sources: tuple[FakeQuantize, ...] = ()

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_quantizer: FakeQuantize

    def _add_quantizers(self, scheme: TensorScheme, name: str, activation: TensorScheme | None) -> None:
        view = self.outputs_first()
        check_fits(scheme, view, f"layer '{name}' (weight {list(self.weight.shape)})")
        self.weight_quantizer = FakeQuantize(scheme, view.shape)
        self.weight_quantizer.name = f"{name}.weight"

    def weights(self) -> Iterator[Weight]:  # noqa: D102
        yield Weight("weight", self.outputs_first(), self.weight_quantizer, self.bias)

    def outputs_first(self) -> Tensor:
        """The weight as its quantizer sees it, [out, inputs...]: channels, groups and blocks count in this view."""
        apply_masks(self)
        return self.arranged(self.weight)

    def arranged(self, weight: Tensor) -> Tensor:
        """A weight in the shape of the parameter as `outputs_first` arranges it."""
        return weight

    @property
    def arrangement(self) -> Hashable:
        """What tells two arrangements of the same parameter apart, where their shapes do not."""
        return None

    def as_kept(self, weight: Tensor) -> Tensor:
        """Inverse of `arranged`: a weight in the shape of the parameter."""
        return weight

    def quantized_weight(self) -> Tensor:
        """The fake-quantized weight."""
        return self.as_kept(self.weight_quantizer(self.outputs_first()))

    def add_bias(self, value: Tensor) -> None:
        """Give a layer without a bias one."""
        self.bias = nn.Parameter(value)

    def activations(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The activations among what a call of the layer is given."""
        return tensors

    def compute(self, *inputs: Tensor) -> Tensor:
        """The output for activations; without hooks."""
        result: Tensor = type(self).forward(self, *inputs)
        return result


def with_state_of(module: nn.Module, kind: type[M]) -> M:
    """A module of another type with the state of one as it stands, hooks included; parameters are shared."""
    made = kind.__new__(kind)
    # the containers are copied to leave the original alone
    made.__dict__ = {k: v.copy() if isinstance(v, dict | list) else v for k, v in module.__dict__.items()}
    return made


def apply_masks(layer: nn.Module) -> None:
    """Set what `torch.nn.utils.prune` prunes, as calling the layer does: before that, it is of the step before."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            hook(layer, ())


def check_fits(scheme: TensorScheme, view: Tensor, layer: str) -> None:
    """Refuse an axis that a weight, [out, inputs...], does not have, and groups that do not divide its inputs.

    Raises:
        ValueError: names the layer and what would fit.
    """
    if scheme.axis is not None and not -view.dim() <= scheme.axis < view.dim():
        raise ValueError(
            f"quant.weight.axis={scheme.axis}: the weight of {layer} has {view.dim()} dimensions as it is quantized, "
            f"[out, inputs...]; give an axis in [{-view.dim()}, {view.dim() - 1}], or another for the layer by a rule"
        )
    if scheme.granularity is not Granularity.group or not scheme.group_size:
        return
    inputs = view.shape[1:].numel()
    if inputs % scheme.group_size and not scheme.allow_padding:
        raise ValueError(
            f"quant.weight.group_size={scheme.group_size} does not divide the {inputs} inputs of {layer}; give "
            f"a divisor of {inputs}, exempt the layer by a rule, or set quant.weight.allow_padding=true"
        )
    groups = -(-inputs // scheme.group_size)
    if groups % scheme.subspaces:
        raise ValueError(
            f"quant.weight.subspaces={scheme.subspaces} does not divide the {groups} groups of inputs of "
            f"{layer}; give a divisor of {groups}"
        )


def weights_of(net: nn.Module) -> dict[FakeQuantize, Tensor]:
    """Quantizer -> the weight that it sees, of every layer of a network."""
    layers = (module for module in net.modules() if isinstance(module, Quantized))
    return {weight.weight_quantizer: weight.tensor for layer in layers for weight in layer.weights()}
