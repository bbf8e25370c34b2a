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
