"""Validated data: what is quantized, and how. Nothing here computes."""

from qat.scheme.checks import check_scheme
from qat.scheme.config import LayerRule, QuantConfig
from qat.scheme.tensor import Granularity, TensorScheme, choice, override

__all__ = [
    "Granularity",
    "LayerRule",
    "QuantConfig",
    "TensorScheme",
    "check_scheme",
    "choice",
    "override",
]
