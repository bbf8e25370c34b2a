"""What compressed-tensors holds, the weight format of vLLM: pairs of a weight's scheme and its input's.

A file of that format says how the weights are stored and how a runtime makes its activations, layer by layer:

| format               | weight                                      | input                                         |
|----------------------|---------------------------------------------|-----------------------------------------------|
| pack-quantized       | int4, int8; a channel or 32, 64, 128 inputs | float                                         |
| int-quantized        | int8, symmetric, a channel                  | int8: a tensor, kept; a token, dynamic        |
| float-quantized      | e4m3fn, a channel                           | float; e4m3fn: a tensor, kept; a token, dynamic |
| nvfp4-pack-quantized | nvfp4                                       | float                                         |
| mxfp4-pack-quantized | mxfp4                                       | float                                         |

The package itself unpacks integers of 1 to 8 bits and groups of any size; vLLM has kernels for the above
(`WNA16_SUPPORTED_BITS`, `MARLIN_SUPPORTED_GROUP_SIZES` in its source). A scale a tensor is written as one a channel.
"""

from collections.abc import Iterator

from qat.ranges import RANGES
from qat.scheme.checks import Refusal
from qat.scheme.config import QuantConfig
from qat.scheme.tensor import Granularity, TensorScheme, override

GROUP_SIZES = (32, 64, 128)
"""Inputs that share a scale, with integers."""

STORED = {
    "int": "pack-quantized",
    "e4m3fn": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}
"""Format of a weight -> what compressed-tensors calls it, with float inputs."""

_NEAREST = {
    "e5m2": "format=e4m3fn",
    "mxfp8_e4m3": "format=e4m3fn granularity=channel group_size=null allow_padding=false",
    "mxfp8_e5m2": "format=e4m3fn granularity=channel group_size=null allow_padding=false",
    "e2m1": "format=nvfp4 granularity=group group_size=16 block_size=null range=dynamic axis=null",
    "mxfp6_e3m2": "format=mxfp4 bits=4",
    "mxfp6_e2m3": "format=mxfp4 bits=4",
}
_INT = (
    "format=int bits={} granularity=channel group_size=null block_size=null range=dynamic rounding=nearest subspaces=1"
)


def check_compressed(config: QuantConfig) -> None:
    """Refuse a configuration whose linear layers no file of compressed-tensors can hold.

    Raises:
        ValueError: names the field, the reason, and the nearest scheme that it holds.
    """
    check_pair(config.weight, config.activation, "quant")
    for i, rule in enumerate(config.rules):
        where = f"quant.rules[{i}]"
        weight, activation = (
            override(config.weight, rule.weight, where),
            override(config.activation, rule.activation, where),
        )
        check_pair(weight, activation, where)


def check_pair(weight: TensorScheme, activation: TensorScheme, where: str) -> str | None:
    """The format of a layer's weight.

    Args:
        weight: its scheme.
        activation: that of the layer's input.
        where: path of both, for the message.

    Returns:
        The name that compressed-tensors has for it; None for a layer that stays float.

    Raises:
        ValueError: names the field, the reason, and the nearest scheme.
    """
    if not weight.quantized:
        return None
    for refusal in _of_weight(weight):
        raise ValueError(refusal.message(weight, f"{where}.weight"))
    if not activation.quantized:
        return STORED[weight.format]
    for role, scheme, refusal in _of_pair(weight, activation):
        raise ValueError(refusal.message(scheme, f"{where}.{role}"))
    return "int-quantized" if weight.format == "int" else STORED[weight.format]


def _of_weight(weight: TensorScheme) -> Iterator[Refusal]:
    name, bits = weight.format, weight.bits or 0
    near = 4 if bits <= 4 else 8
    if name not in STORED:
        nearest = _NEAREST.get(name, _INT.format(near))
        yield Refusal("format", f"compressed-tensors has no weights of it (valid: {', '.join(STORED)})", nearest)
    if name == "int" and weight.range == "dorefa":
        yield Refusal("range", "its levels are odd integers of one bit more", "range=dynamic")
    if name == "int" and bits not in (4, 8):
        yield Refusal("bits", "vLLM has kernels for integer weights of 4 and 8 bits", f"bits={near}")
    if name in ("int", "e4m3fn"):
        if weight.granularity is Granularity.block or (weight.axis or 0) != 0:
            yield Refusal("granularity", "a scale belongs to an output channel or to consecutive inputs of one",
                          "granularity=channel axis=null block_size=null")  # fmt: skip
        if weight.granularity is Granularity.group and name != "int":
            yield Refusal("granularity", f"{name} has a scale an output channel", "granularity=channel group_size=null")
        if weight.granularity is Granularity.group and weight.group_size not in GROUP_SIZES:
            size = min(GROUP_SIZES, key=lambda n: abs(n - (weight.group_size or 0)))
            yield Refusal("group_size", f"vLLM has kernels for groups of {', '.join(map(str, GROUP_SIZES))}",
                          f"group_size={size}")  # fmt: skip


def _of_pair(weight: TensorScheme, activation: TensorScheme) -> Iterator[tuple[str, TensorScheme, Refusal]]:
    """What a quantized input refuses: the role, its scheme, the refusal."""
    name, dynamic = weight.format, RANGES[activation.range].dynamic
    if name in ("nvfp4", "mxfp4"):
        why = {
            "nvfp4": "its file has one float32 scale for every input of a layer, kept; here it is one of each input",
            "mxfp4": "engines round the scale of a block of activations up or down, the MX specification down only",
        }[name]
        yield "activation", activation, Refusal("bits", why, "bits=null format=int granularity=tensor group_size=null "
                                                "allow_padding=false range=fixed")  # fmt: skip
    if name == "int":
        why = "integer activations are multiplied by symmetric int8 weights with a scale a channel"
        if weight.bits != 8:
            yield "weight", weight, Refusal("bits", why, "bits=8")
        if not weight.symmetric:
            yield "weight", weight, Refusal("symmetric", why, "symmetric=true")
        if weight.granularity is Granularity.group:
            yield "weight", weight, Refusal("granularity", why, "granularity=channel group_size=null")
    if activation.format != name:
        yield "activation", activation, Refusal("format", f"{name} weights have {name} inputs",
                                                f"format={name} bits=8 granularity=tensor group_size=null axis=null "
                                                "symmetric=true range=fixed observer=minmax")  # fmt: skip
    if activation.bits != 8:
        yield "activation", activation, Refusal("bits", "activations have 8 bits, or are float", "bits=8")
    if activation.narrow_range:
        yield "activation", activation, Refusal("narrow_range", "runtimes use all 256 integers", "narrow_range=false")
    if activation.granularity not in (Granularity.tensor, Granularity.token):
        yield "activation", activation, Refusal("granularity", "an input has a scale a tensor or token",
                                                "granularity=tensor group_size=null axis=null range=fixed")  # fmt: skip
    if activation.granularity is Granularity.tensor and dynamic:
        yield "activation", activation, Refusal("granularity", "a dynamic range is one a token", "granularity=token")
    if dynamic and not (activation.symmetric and activation.signed is not False):
        field = "symmetric" if not activation.symmetric else "signed"
        yield "activation", activation, Refusal(field, "a dynamic range is symmetric and signed",
                                                "symmetric=true signed=null")  # fmt: skip
