"""What compressed-tensors holds: what vLLM has kernels for (`qat.targets.vllm`), checked whatever the target is."""

from dataclasses import replace

from qat.scheme import QuantConfig, TensorScheme
from qat.targets.checks import Engine, check_kernels, check_pair
from qat.targets.nearest import nearest
from qat.targets.vllm import VLLM

COMPRESSED = Engine("compressed-tensors", VLLM, "another of export.formats")


def check_compressed(config: QuantConfig) -> None:
    """Refuse a configuration whose linear layers no file of compressed-tensors can hold.

    Raises:
        ValueError: names the field, the reason, and the nearest scheme that it holds.
    """
    known = replace(config, activation=_signed(config.activation), input=_signed(config.input))
    check_kernels(known, COMPRESSED)


def stored_as(weight: TensorScheme, activation: TensorScheme, where: str) -> str | None:
    """What a file calls a layer's weights.

    Args:
        weight: its scheme.
        activation: that of the layer's input.
        where: path of both, for the message.

    Returns:
        The name that compressed-tensors has for their format; None for a layer that stays float.

    Raises:
        ValueError: names the field, the reason, and the nearest scheme.
    """
    if not weight.quantized:
        return None
    activation, kernels = _signed(activation), VLLM.layers["default"]
    check_pair(COMPRESSED, kernels, weight, activation, where)
    way = nearest(kernels, weight, activation)
    assert way is not None
    return way.kernel.stored


def _signed(activation: TensorScheme) -> TensorScheme:
    """With a sign where the scheme leaves that open: of a layer's input nothing says that it is not negative."""
    open_ = activation.format == "int" and activation.signed is None and activation.symmetric
    return replace(activation, signed=True) if open_ else activation
