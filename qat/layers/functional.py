"""Layers that a network calls as functions, with a weight that it holds itself: `F.linear(x, self.weight)`.

In a traced network such a call becomes a module that is given the weight and the bias with every call. It has none of
its own: they stay parameters of the network, under their own names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from qat.layers.base import QuantizedLayer
from qat.layers.bilinear import QuantBilinear
from qat.layers.conv import QuantConv1d, QuantConv2d, QuantConv3d
from qat.layers.conv_transpose import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from qat.layers.linear import QuantLinear
from qat.layers.lookup import QuantEmbedding, QuantEmbeddingBag, check_settings
from qat.numerics.granularity import swap_channels
from qat.scheme import TensorScheme

Given = Callable[[], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Form:
    """What a function computes.

    Attributes:
        layer, quantized: the layer that computes the same, float and quantized.
        inputs: names of its activations, and of what else it reads beside weight and bias.
        settings: its other parameters in torch's order (behind input, weight and bias), with their defaults.
    """

    layer: type[nn.Module]
    quantized: type[QuantizedLayer]
    inputs: tuple[str, ...]
    settings: dict[str, Any]


_CONV = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_TRANSPOSED = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
_TABLE = {"padding_idx": None, "max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False}
_BAG = {"max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False, "mode": "mean", "sparse": False,
        "include_last_offset": False, "padding_idx": None}  # fmt: skip
_TABLES = (nn.Embedding, nn.EmbeddingBag)

FORMS: dict[str, Form] = {
    "linear": Form(nn.Linear, QuantLinear, ("input",), {}),
    "bilinear": Form(nn.Bilinear, QuantBilinear, ("input1", "input2"), {}),
    "conv1d": Form(nn.Conv1d, QuantConv1d, ("input",), _CONV),
    "conv2d": Form(nn.Conv2d, QuantConv2d, ("input",), _CONV),
    "conv3d": Form(nn.Conv3d, QuantConv3d, ("input",), _CONV),
    "conv_transpose1d": Form(nn.ConvTranspose1d, QuantConvTranspose1d, ("input",), _TRANSPOSED),
    "conv_transpose2d": Form(nn.ConvTranspose2d, QuantConvTranspose2d, ("input",), _TRANSPOSED),
    "conv_transpose3d": Form(nn.ConvTranspose3d, QuantConvTranspose3d, ("input",), _TRANSPOSED),
    "embedding": Form(nn.Embedding, QuantEmbedding, ("input",), _TABLE),
    "embedding_bag": Form(nn.EmbeddingBag, QuantEmbeddingBag, ("input", "offsets", "per_sample_weights"), _BAG),
}
"""Name of a function of torch.nn.functional -> its form."""


class Functional(nn.Module):
    """A call of a function of FORMS.

    Args:
        function: key of FORMS.
        settings: what the call gives for the form's settings.
        path: of the parameter that the weight is, or is a part of; what rules match.
    """

    def __init__(self, function: str, settings: dict[str, Any], path: str) -> None:
        super().__init__()
        self.function, self.settings, self.path = function, settings, path
        self.register_parameter("own_bias", None)

    @property
    def form(self) -> Form:
        """What the function computes."""
        return FORMS[self.function]

    def bind(self, given: Given) -> None:
        """Tell where to look for weight and bias between calls; copies and pickles lose it."""
        self.__dict__["given"] = given

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "given"}

    @property
    def weight(self) -> Tensor:
        """The weight as it is given to the call."""
        return self._given()[0]

    @property
    def bias(self) -> Tensor | None:
        """The bias as it is given to the call, or the one that was added."""
        bias = self._given()[1]
        return self.own_bias if bias is None else bias

    def _given(self) -> tuple[Tensor, Tensor | None]:
        if "given" not in self.__dict__:
            raise RuntimeError(f"the weight '{self.path}' is held by the prepared network: copy the network as a whole")
        weight, bias = self.__dict__["given"]()
        return weight, bias

    def add_bias(self, value: Tensor) -> None:
        """Add a bias to a call that gives none."""
        self.own_bias = nn.Parameter(value)

    def activations(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The activations among what a call is given."""
        behind = 1 if self.form.layer in _TABLES else 1 + (self._given()[1] is not None)  # weight and bias
        return tensors[: len(tensors) - behind]

    def compute(self, *inputs: Tensor) -> Tensor:
        """The function of activations, with weight and bias as they are; without hooks."""
        weight, bias = self._given()
        left_out = [None] * (len(self.form.inputs) - len(inputs))
        return type(self).forward(self, *inputs, *left_out, weight, bias)

    def forward(self, *tensors: Tensor | None) -> Tensor:
        """Compute the function.

        Args:
            tensors: activations (None for those that the call leaves out), weight, bias.
        """
        *inputs, weight, bias = tensors
        named = dict(zip(self.form.inputs, inputs, strict=True)) | {"weight": self.transformed(weight)}
        if self.form.layer not in _TABLES:
            named["bias"] = self.own_bias if bias is None else bias
        result: Tensor = getattr(F, self.function)(**named, **self.settings)
        return result

    def transformed(self, weight: Any) -> Tensor:
        """The weight that is computed with."""
        result: Tensor = weight
        return result

    def ordinary(self) -> nn.Module:
        """The layer that computes the same, its numbers shared."""
        weight, bias = self._given()
        bias = self.own_bias if bias is None else bias
        kind: Any = self.form.layer
        shape, settings = list(weight.shape), dict(self.settings)
        layer: nn.Module
        if kind in _TABLES:
            layer = kind(shape[0], shape[1], **settings, device="meta")
        elif kind is nn.Linear:
            layer = kind(shape[1], shape[0], device="meta")
        elif kind is nn.Bilinear:
            layer = kind(shape[1], shape[2], shape[0], device="meta")
        else:
            inner = shape[1] * settings["groups"]
            channels = [shape[0], inner] if self._transposed else [inner, shape[0]]
            layer = kind(*channels, tuple(shape[2:]), **settings, device="meta")
        layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if kind not in _TABLES:
            layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @property
    def _transposed(self) -> bool:
        return "output_padding" in self.form.settings

    def extra_repr(self) -> str:  # noqa: D102
        return ", ".join([self.function, self.path, *(f"{k}={v}" for k, v in self.settings.items())])


class QuantFunctional(Functional, QuantizedLayer):  # type: ignore[misc]
    """The same with the weight fake-quantized."""

    @classmethod
    def from_float(  # noqa: D102
        cls, module: nn.Module, scheme: TensorScheme, name: str, activation: TensorScheme | None = None
    ) -> Self:
        assert isinstance(module, Functional)
        if module.form.layer in _TABLES:
            check_settings(f"F.{module.function}", module.settings, name)
        layer = super().from_float(module, scheme, name, activation)
        layer.multiplies, layer.biased = module.form.quantized.multiplies, module.form.quantized.biased
        return layer

    @property
    def arrangement(self) -> Any:  # noqa: D102
        return ("transposed", self.settings["groups"]) if self._transposed else None

    def arranged(self, weight: Tensor) -> Tensor:  # noqa: D102
        if self._transposed:
            return swap_channels(weight, self.settings["groups"])
        return weight.flatten(1) if self.form.layer is nn.Bilinear else weight

    def as_kept(self, weight: Tensor) -> Tensor:  # noqa: D102
        if self._transposed:
            return swap_channels(weight, self.settings["groups"])
        return weight

    def transformed(self, weight: Any) -> Tensor:  # noqa: D102
        return self.as_kept(self.weight_quantizer(self.arranged(weight))).reshape(weight.shape)

    def ordinary(self) -> QuantizedLayer:  # noqa: D102
        layer = self.form.quantized.from_float(super().ordinary(), self.weight_quantizer.scheme, self.path)
        layer.weight_quantizer = self.weight_quantizer
        return layer
