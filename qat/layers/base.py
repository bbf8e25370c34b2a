"""What every quantized layer is: the float layer plus a quantizer for its weight."""

from collections.abc import Hashable
from typing import Self

from torch import Tensor, nn

from qat.fake_quant import FakeQuantize
from qat.scheme import Granularity, TensorScheme


class QuantizedLayer(nn.Module):
    """Mixin, first base of each quantized layer: `class QuantLinear(QuantizedLayer, nn.Linear)`.

    The layer keeps its float type's parameters, names and arguments, so a float checkpoint loads into it and
    `isinstance(layer, nn.Linear)` holds. Activations are not its concern: they are quantized where they are made.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_quantizer: FakeQuantize
    multiplies: bool = True
    """An output is a sum of products of one input with the weight, plus a bias: what integer kernels compute."""
    biased: bool = True
    """An output has channels that a bias, or a BatchNorm behind the layer, can shift."""

    @classmethod
    def from_float(cls, module: nn.Module, scheme: TensorScheme, name: str) -> Self:
        """Build from a float layer. Parameters, buffers and hooks are shared with it, not copied.

        Args:
            module: the float layer.
            scheme: how to quantize its weight.
            name: the layer's module path, for messages.

        Raises:
            ValueError: a group size that does not divide the layer's inputs.
        """
        weight = module.weight
        assert isinstance(weight, Tensor)
        layer = cls.__new__(cls)
        # the float layer's state as it stands, hooks included; the containers are copied to leave the original alone
        layer.__dict__ = {k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()}
        view = layer.outputs_first().shape
        if scheme.granularity is Granularity.group and scheme.group_size:
            inputs = view[1:].numel()
            shape = f"layer '{name}' (weight {list(weight.shape)})"
            if inputs % scheme.group_size and not scheme.allow_padding:
                raise ValueError(
                    f"quant.weight.group_size={scheme.group_size} does not divide the {inputs} inputs of {shape}; give "
                    f"a divisor of {inputs}, exempt the layer by a rule, or set quant.weight.allow_padding=true"
                )
            groups = -(-inputs // scheme.group_size)
            if groups % scheme.subspaces:
                raise ValueError(
                    f"quant.weight.subspaces={scheme.subspaces} does not divide the {groups} groups of inputs of "
                    f"{shape}; give a divisor of {groups}"
                )
        layer.weight_quantizer = FakeQuantize(scheme, view)
        layer.weight_quantizer.name = f"{name}.weight"
        return layer

    def outputs_first(self) -> Tensor:
        """The weight as its quantizer sees it, [out, inputs...]: channels, groups and blocks count in this view."""
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
