"""What a deployment target can run. TARGETS is the table that configurations choose from."""

from dataclasses import dataclass, field

from qat.scheme import QuantConfig, TensorScheme, choice, override


@dataclass(frozen=True, kw_only=True)
class Target:
    """One deployment target.

    Attributes:
        description: one sentence.
        weight_bits: the widest integer weight that it computes exactly.
        activation_bits: the widest integer activation.
        onnxruntime_options: session options under which ONNX Runtime computes this target exactly.
        reason: why weights are limited, for the error.
    """

    description: str
    weight_bits: int = 8
    activation_bits: int = 16
    onnxruntime_options: dict[str, str] = field(default_factory=dict)
    reason: str = ""


TARGETS: dict[str, Target] = {
    "generic": Target(
        description="Any engine with exact int8 products (ONNX Runtime is run in its exact mode).",
        onnxruntime_options={"session.x64quantprecision": "1"},
    ),
    "onnxruntime_x86": Target(
        description="ONNX Runtime on x86 with AVX2 and no VNNI, at full speed.",
        weight_bits=7,
        activation_bits=8,
        reason="its uint8 x int8 kernels add pairs of products in int16, which saturates with 8-bit weights",
    ),
}


def check_target(config: QuantConfig) -> None:
    """Refuse a configuration that its target cannot run.

    Raises:
        ValueError: names the field, the target's limit and its reason, and the nearest scheme that the target runs.
    """
    choice("quant.target", config.target, TARGETS)
    _check_weight(config.weight, "quant.weight", config.target)
    _check_activation(config.activation, "quant.activation", config.target)
    _check_activation(config.input, "quant.input", config.target)
    for i, rule in enumerate(config.rules):
        where = f"quant.rules[{i}]"
        _check_weight(override(config.weight, rule.weight, where), f"{where}.weight", config.target)
        _check_activation(override(config.activation, rule.activation, where), f"{where}.activation", config.target)


def _check_weight(scheme: TensorScheme, where: str, name: str) -> None:
    target = TARGETS[name]
    if scheme.bits is not None and scheme.bits > target.weight_bits:
        raise ValueError(
            f"{where}.bits={scheme.bits}: target={name} takes at most {target.weight_bits} bits ({target.reason}); "
            f"use {where}.bits={target.weight_bits}, or target=generic"
        )


def _check_activation(scheme: TensorScheme, where: str, name: str) -> None:
    target = TARGETS[name]
    if scheme.bits is not None and scheme.bits > target.activation_bits:
        raise ValueError(
            f"{where}.bits={scheme.bits}: target={name} takes at most {target.activation_bits} bits for activations; "
            f"use {where}.bits={target.activation_bits}, or target=generic"
        )
