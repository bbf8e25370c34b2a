import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SUMMARY = {
    "name": "digits / small_cnn / w4a4_lsq",
    "config": {"quant.weight.bits": 4, "quant.activation.bits": 4},
    "stages": {
        "float": {
            "metrics": {"loss": 0.0812, "accuracy": 0.98},
            "bytes": 41234,
            "latency_ms": {"1": 0.4, "64": 3.1},
        },
        "ptq": {"metrics": {"loss": 0.1912, "accuracy": 0.9611}, "bytes": None, "latency_ms": {}},
        "qat": {"metrics": {"loss": 0.0901, "accuracy": 0.9778}, "bytes": None, "latency_ms": {"1": 0.52, "64": 4.1}},
        "int8": {"metrics": {"loss": 0.0901, "accuracy": 0.9777}, "bytes": 9120, "latency_ms": {"1": 1.2, "64": 12.4}},
        "onnx": {"metrics": {"loss": 0.0902, "accuracy": 0.9776}, "bytes": 14321, "latency_ms": {"1": 0.1, "64": 1.3}},
    },
    "parity": {
        "qat_int8": {
            "max_abs": 1e-4,
            "max_steps": 1,
            "mean_steps": 2e-5,
            "agreement": 0.9975,
            "agreement_outside_ties": 1.0,
            "equal_share": 0.99998,
            "metrics": {"loss": 0.0, "accuracy": -0.0012},
            "layers": [
                {"name": "stem", "max_steps": 0, "mean_steps": 0.0, "equal_share": 1.0, "bits": 8, "ties": 0},
                {"name": "fc", "max_steps": 1, "mean_steps": 4e-5, "equal_share": 0.99996, "bits": 8, "ties": 2},
            ],
        },
        "qat_onnx": {
            "max_abs": 0.0013,
            "max_steps": 2,
            "agreement": 0.9999,
            "equal_share": 0.9998,
            "layers": [{"name": "fc", "max_steps": 2, "mean_steps": 0.5, "equal_share": 0.5, "bits": 8, "ties": 0}],
        },
        "int8_onnx": {"max_abs": 0.0, "max_steps": 0, "agreement": 1.0, "equal_share": 1.0},
    },
    "seconds": {"float": 12.0, "qat": 9.0, "export": 3.5},
    "files": {"int8": "export/model.safetensors", "onnx": "export/model.onnx"},
}


@pytest.fixture
def summary() -> dict[str, Any]:
    return copy.deepcopy(SUMMARY)


@pytest.fixture
def paired() -> dict[str, Any]:
    """A paired test of PTQ and QAT."""
    return {
        "by": "correct", "samples": 400, "difference": 0.0167, "low": 0.002, "high": 0.0314, "gained": 9, "lost": 1,
        "p": 0.0215, "test": "McNemar",
    }  # fmt: skip


@pytest.fixture
def evidence(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run measures of its layers."""
    curve = [0.5 / (1 + i) for i in range(49)]
    seen = {
        "sqnr_db": 36.28, "clipped": 0.0123, "levels_used": 200, "levels_total": 256, "scales": 1,
        "histogram": {
            "unit": "value", "low": -1.0, "high": 1.5, "counts": [1, 5, 3, 0], "below": 0, "above": 1,
            "clip": [-1.0, 1.0], "levels": None, "values": 10,
        },
        "error_curve": {
            "clip": 1.0, "multiples": [2 ** (i / 8) for i in range(-32, 17)], "clipping": curve,
            "rounding": curve[::-1], "chosen": 0.03, "best": 0.02, "best_multiple": 0.5,
        },
    }  # fmt: skip
    sensitivity = {part: {"loss": 0.1, "accuracy": value} for part, value in (("only", 0.97), ("all_but", 0.96))}
    layers[0] |= {
        "quantizer": "stem.conv.weight_quantizer", "layer": "stem.conv", "reads": ["stem.conv.output"],
        "input": "uint4", "seen": seen, "sensitivity": sensitivity, "bit_operations": 1234567.0, "latency_ms": 0.5,
        "latency_share": 0.25, "macs": 1000.0,
    }  # fmt: skip
    layers[1] |= {"quantizer": "stem.conv.output", "readers": ["stem.conv"], "seen": seen}
    return {
        "layers": layers,
        "sensitivity": {
            "samples": 300, "float": {"loss": 0.08, "accuracy": 0.98}, "quantized": {"loss": 0.09, "accuracy": 0.95},
            "left_out": ["head"], "seconds": 1.0,
        },
        "latency": {"measured": True, "batch": 64, "total_ms": 2.0, "other_share": 0.75},
        "samples": 512,
        "phases": [{"mode": "quantize", "start": 0, "end": 8}, {"mode": "frozen", "start": 8, "end": 10}],
        "predictions": {
            "kind": "pictures", "introduced": 30, "repaired": 2, "positions": 400,
            "worst": [{
                "index": [7], "label": "cat", "before": "cat", "after": "<dog>", "before_sure": 0.9, "after_sure": 0.61,
                "before_expected": 0.9, "after_expected": 0.2, "picture": "data:image/png;base64,AA==",
            }],
        },
    }  # fmt: skip


@pytest.fixture
def history() -> list[dict[str, Any]]:
    return [
        {"phase": "float", "step": 9, "epoch": 0, "train_loss": 2.0},
        {"phase": "float", "step": 9, "epoch": 0, "val_loss": 1.5, "val_accuracy": 0.5},
        {"phase": "float", "step": 19, "epoch": 1, "train_loss": 1.0, "lr-Adam": 0.001},
        {"phase": "float", "step": 19, "epoch": 1, "val_loss": 0.5, "val_accuracy": 0.9},
        {"phase": "qat", "step": 4, "epoch": 0, "train_loss": 0.75, "lr-Adam": 0.0001},
        {"phase": "qat", "step": 9, "epoch": 0, "val_loss": 0.625, "val_accuracy": 0.875, "test_accuracy": 0.1},
    ]


@pytest.fixture
def layers() -> list[dict[str, Any]]:
    return [
        {
            "name": "stem.conv",
            "kind": "QuantConv2d",
            "scheme": "int8 symmetric channel",
            "reason": "rule first",
            "shape": [16, 3, 3, 3],
            "parameters": 1432,
            "bits": 8,
            "bytes": 1432,
            "scale_min": 0.001,
            "scale_max": 0.02,
            "sqnr_db": 36.28,
        },
        {"name": "stem.conv.output", "kind": "edge", "scheme": "uint4 affine tensor", "bits": 4, "sqnr_db": None},
        {"name": "head", "kind": "Linear", "reason": "stays float: rule last", "shape": [10, 64], "sqnr_db": 9.5},
    ]


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., Path]:
    """Make a sweep directory of (overrides, summary or None where the job failed)."""

    def make(*jobs: tuple[list[str], dict[str, Any] | None]) -> Path:
        for i, (overrides, summary) in enumerate(jobs):
            hydra = tmp_path / str(i) / ".hydra"
            hydra.mkdir(parents=True)
            (hydra / "overrides.yaml").write_text("".join(f"- {line}\n" for line in overrides) or "[]\n")
            if summary is not None:
                (tmp_path / str(i) / "summary.json").write_text(json.dumps(summary))
        return tmp_path

    return make


@pytest.fixture
def job() -> Callable[..., dict[str, Any]]:
    """The summary of a job of a sweep."""

    def make(weight: int | None, activation: int | None, qat: float = 0.9, ptq: float = 0.8, size: int = 9000) -> Any:
        return {
            "name": "job",
            "config": {"quant.weight.bits": weight, "quant.activation.bits": activation},
            "stages": {
                "float": {"metrics": {"accuracy": 0.98}, "bytes": 41000},
                "ptq": {"metrics": {"accuracy": ptq}, "bytes": None},
                "qat": {"metrics": {"accuracy": qat}, "bytes": None},
                "int8": {"metrics": {"accuracy": qat}, "bytes": size},
            },
        }

    return make
