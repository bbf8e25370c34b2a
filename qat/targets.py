"""What a deployment target can run. TARGETS is the table that configurations choose from."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from qat.ranges import RANGES
from qat.scheme import QuantConfig, TensorScheme, choice, override
from qat.scheme.checks import shown


@dataclass(frozen=True, kw_only=True)
class Target:
    """One deployment target.

    Attributes:
        description: one sentence.
        weight_bits: the widest integer weight that it computes exactly.
        activation_bits: the widest integer activation.
        integers_only: whether weights and activations are integers with scales that calibration or training fixed, one
            a tensor, output channel or group of inputs.
        onnxruntime_options: session options under which ONNX Runtime computes this target exactly.
        reason: why weights are limited, for the error.
        requantize: how an accumulator becomes the next layer's integer: `float`, by a float32 scale, or `fixed_point`,
            by an int32 multiplier and a shift.
        functions: how GELU, softmax, LayerNorm and the like are computed: in `float`, or in `integer`s of what is on a
            grid (tables, integer square roots), so that a quantizer stands in front of them.
    """

    description: str
    weight_bits: int = 16
    activation_bits: int = 16
    integers_only: bool = False
    onnxruntime_options: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    requantize: Literal["float", "fixed_point"] = "float"
    functions: Literal["float", "integer"] = "float"


TARGETS: dict[str, Target] = {
    "generic": Target(
        description="Any engine with exact int8 products (ONNX Runtime is run in its exact mode).",
        onnxruntime_options={"session.x64quantprecision": "1"},
    ),
    "onnxruntime_x86": Target(
        description="ONNX Runtime on x86 with AVX2 and no VNNI, at full speed.",
        weight_bits=7,
        activation_bits=8,
        integers_only=True,
        reason="its uint8 x int8 kernels add pairs of products in int16, which saturates with 8-bit weights",
    ),
    "cmsis_nn": Target(
        description="CMSIS-NN on Cortex-M: int8, requantized by an int32 multiplier and a shift.",
        weight_bits=8,
        activation_bits=8,
        integers_only=True,
        requantize="fixed_point",
        functions="integer",
    ),
    "integer_only": Target(
        description="No float between input and output.",
        weight_bits=8,
        activation_bits=8,
        integers_only=True,
        requantize="fixed_point",
        functions="integer",
    ),
}


def check_target(config: QuantConfig) -> None:
    """Refuse a configuration that its target cannot run.

    Raises:
        ValueError: names the field, the target's limit and its reason, and the nearest scheme that the target runs.
    """
    target = choice("quant.target", config.target, TARGETS)
    for where, scheme, role in _schemes(config):
        if not scheme.quantized:
            continue
        for field_name, value, why in _refusals(scheme, role, target):
            nearest = f"use {where}.{field_name}={value}, or target=generic"
            was = shown(getattr(scheme, field_name))
            raise ValueError(f"{where}.{field_name}={was}: target={config.target} {why}; {nearest}")


def _schemes(config: QuantConfig) -> Iterator[tuple[str, TensorScheme, str]]:
    yield "quant.weight", config.weight, "weight"
    yield "quant.activation", config.activation, "activation"
    yield "quant.input", config.input, "activation"
    for i, rule in enumerate(config.rules):
        where = f"quant.rules[{i}]"
        yield f"{where}.weight", override(config.weight, rule.weight, where), "weight"
        yield f"{where}.activation", override(config.activation, rule.activation, where), "activation"


def _refusals(scheme: TensorScheme, role: str, target: Target) -> Iterator[tuple[str, object, str]]:
    """(field, a value that the target takes, why not the scheme's)."""
    if target.integers_only:
        formats = ("int", "binary", "ternary") if role == "weight" else ("int",)
        if scheme.format not in formats:
            yield "format", "int", "computes with integers"
        granularities = ("tensor", "channel", "group") if role == "weight" else ("tensor",)
        if scheme.granularity.value not in granularities or (scheme.axis or 0) != 0:
            yield "granularity", granularities[len(granularities) // 2], "has no kernels for it"
        if role == "activation" and RANGES[scheme.range].dynamic:
            yield "range", "running", "takes ranges that are known beforehand"
    limit = target.weight_bits if role == "weight" else target.activation_bits
    if scheme.bits is not None and scheme.bits > limit and scheme.format == "int":
        reason = f" ({target.reason})" if role == "weight" and target.reason else ""
        yield "bits", limit, f"takes at most {limit} bits for {role}s{reason}"
