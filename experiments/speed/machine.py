"""On what was measured, as plain data that goes beside every result."""

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch

INSTRUCTIONS = {"avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}


def machine(packages: tuple[str, ...] = ("torch",), device: str = "cpu") -> dict[str, Any]:
    """Processor and versions; nothing that names this one machine."""
    path = Path("/proc/cpuinfo")
    fields = [line.partition(":")[::2] for line in (path.read_text() if path.is_file() else "").splitlines()]
    info = {name.strip(): value.strip() for name, value in fields}
    facts = {
        "processor": info.get("model name", "") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": sorted(INSTRUCTIONS & {*info.get("flags", "").split(), *info.get("Features", "").split()}),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)},
    }
    return facts if device == "cpu" else {**facts, "device": torch.cuda.get_device_name(device)}
