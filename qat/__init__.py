"""Quantization-aware training for PyTorch: what trains is what runs."""

from qat.analysis.preparation import report
from qat.calibrate import calibrate
from qat.export import export, load
from qat.lower import lower
from qat.mode import Mode
from qat.modes import set_mode
from qat.prepare import prepare
from qat.presets import preset
from qat.scheme import Granularity, LayerRule, QuantConfig, TensorScheme

__version__ = "0.1.0"

__all__ = [
    "Granularity",
    "LayerRule",
    "Mode",
    "QuantConfig",
    "TensorScheme",
    "calibrate",
    "export",
    "load",
    "lower",
    "prepare",
    "preset",
    "report",
    "set_mode",
]
