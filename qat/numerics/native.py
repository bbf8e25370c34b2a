"""Compiles the C++ of `cpu/`, once on a machine, and loads it: the fast path's kernels and nodes on CPUs.

A node of a few hundred thousand values takes less time than Python around it, so all of it is C++: range, quantization,
the autograd node, and memory that is used again from step to step. What it computes is written down in
`qat.numerics.kernels`, which Inductor compiles for other devices, and in `qat.observers.histogram`. Products are
torch's.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("cpu")

OPTIMIZED = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
"""No option that changes a result: all rounding is as in the operations that define it."""

VECTORS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
"""What a processor has, by torch's name for it; others get their compiler's default."""


LIBRARIES = ["-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"]
"""They are in the process already."""


def folder() -> Path:
    """Where compiled code is kept: `TORCH_EXTENSIONS_DIR`, as torch has it, or the user's cache."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qat"


def _options() -> list[str]:
    """What the result depends on beside source, compiler and torch."""
    options = [*OPTIMIZED, *VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])]
    options += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-fopenmp"]
    return [*options, "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", "-DTORCH_EXTENSION_NAME=native"]


def _paths() -> list[str]:
    """Where this installation has torch and Python."""
    home = Path(torch.__file__).parent
    headers = (
        home / "include",
        home / "include" / "torch" / "csrc" / "api" / "include",
        sysconfig.get_paths()["include"],
    )
    return [*(f"-I{path}" for path in headers), f"-L{home / 'lib'}"]


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout


def _build() -> Path:
    """The shared library, compiled unless it was before; processes wait for each other.

    Raises:
        OSError: there is no compiler, or no place to write to.
        CalledProcessError: the compiler refuses.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no g++ and no clang++ on PATH, and no CXX in the environment")
    sources = [path.read_text() for path in sorted(SOURCES.iterdir())]
    made_of = (*sources, torch.__version__, sys.version, _version(compiler), *_options())
    key = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    place = folder() / f"native_{key}"
    library = place / f"native{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.exists():
        return library
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "lock"):
        if not library.exists():
            log.info("Compiling the kernels of quantized training for this machine; it takes half a minute, once.")
            with tempfile.TemporaryDirectory(dir=place) as scratch:
                made = Path(scratch) / library.name
                command = [compiler, *_options(), *_paths(), str(SOURCES / "native.cpp"), *LIBRARIES, "-o", str(made)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                os.replace(made, library)  # whole, or not there
    return library


@functools.cache
def module() -> Any | None:
    """The compiled module; None, and a warning, where it cannot be had."""
    try:
        library = _build()
        spec = importlib.util.spec_from_file_location("native", library)
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
    except (OSError, ImportError, subprocess.CalledProcessError) as error:  # the other forms serve
        said = f"{error}\n{error.stderr[-2000:]}" if isinstance(error, subprocess.CalledProcessError) else str(error)
        log.warning("Compiled kernels are not available; training is slower without them: %s", said)
        return None
    return made


@functools.lru_cache(maxsize=1024)
def options(quant_min: float, quant_max: float, symmetric: bool, relu: bool, codes: bool) -> Any:
    """What a call is told of the grid; made once.

    Args:
        quant_min, quant_max: the integers.
        symmetric: the zero point is 0 (of ranges that the call chooses).
        relu: apply ReLU first.
        codes: also return the integers, of which there are at most 256.
    """
    return _loaded().Options(quant_min, quant_max, symmetric, relu, codes)


def free_blocks() -> list[int]:
    """Sizes of the places in memory that no tensor holds, in bytes, from small to large."""
    native = module()
    return [] if native is None else list(native.free_blocks())


def clear_blocks() -> None:
    """Give the free places back to the system."""
    native = module()
    if native is not None:
        native.clear_blocks()


Result = tuple[Tensor, Tensor | None, Tensor]
"""The quantized tensor; its integers if asked for (int8, counted from the smallest one, less 128); the numbers of its
range ("params"), float32 [3, channels]: scale, smallest and largest integer less the zero point."""


def kept(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Any, inner: int, grad_scale: float | None = None
) -> Result:
    """With a range that is given.

    Args:
        x: dense, float32, bfloat16 or float16.
        scale: float32, one entry a scale; its magnitude counts.
        zero_point: as many entries, or one; None for 0.
        grid: from `options`.
        inner: how many neighbours in memory have one scale.
        grad_scale: makes the scale learned, as of `fake_quantize`.
    """
    native = _loaded()
    if grad_scale is None:
        return native.fixed(x, scale, zero_point, grid, inner)
    return native.learned(x, scale, zero_point, grid, inner, grad_scale)


def given(x: Tensor, params: Tensor, inner: int, relu: bool, codes: bool, whole: bool) -> Result:
    """With the numbers of a range; `whole` if it clips nothing of `x`, so that every gradient passes."""
    return _loaded().given(x, params, inner, relu, codes, whole)


def measured(x: Tensor, channels: int, whole: bool, grid: Any) -> Result:
    """With the range of `x` itself: of its first of as many equal parts, of the next, and so on."""
    return _loaded().measured(x, channels, whole, grid)


def following(
    x: Tensor, low: Tensor, high: Tensor, scale: Tensor, zero_point: Tensor, momentum: float, grid: Any
) -> Result:
    """With a range that follows moving averages of the extremes (`observers.Ema`).

    Args:
        x: as above.
        low, high, scale, zero_point: float32 of one number: averages and range before this tensor; written to.
        momentum: weight of the newest extremes.
        grid: from `options`.
    """
    return _loaded().following(x, low, high, scale, zero_point, momentum, grid)


def decode(
    codes: Tensor, params: Tensor, inner: int, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Real numbers of integers, in any dense shape and order of memory.

    Args:
        codes, params: from a call above, with its `inner`.
        inner: how many neighbours in memory have one scale.
        shape, stride, dtype: of the result.
    """
    result: Tensor = _loaded().decode(codes, params, inner, shape, stride, dtype)
    return result


def count(x: Tensor, counts: Tensor, span: Tensor) -> None:
    """Add to a histogram of each row how many of its values fall into each of as many equal parts of [-span, span].

    Args:
        x: [rows, values], contiguous, float32, bfloat16 or float16; finite.
        counts: float64, [rows, bins].
        span: float32, [rows]; powers of two.
    """
    _loaded().count(x, counts, span)


Known = tuple[Tensor, Tensor, int] | None
"""The integers of a tensor, their params and `inner`; None where nothing is known."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, of_x: Known, of_weight: Known) -> Tensor:
    """`F.linear`, which keeps for backward the integers of its factors, where they are known.

    Args:
        x: [..., inputs], without gaps, float32, bfloat16 or float16, as are the next two.
        weight: [outputs, inputs].
        bias: [outputs].
        of_x, of_weight: of a dense tensor of as many values.
    """
    result: Tensor = _loaded().linear(x, weight, bias, of_x, of_weight)
    return result


def matmul(left: Tensor, right: Tensor, of_left: Known, of_right: Known) -> Tensor:
    """`torch.matmul` of [..., n, k] and [..., k, m] with the same leading sizes, which keeps integers as `linear` does.

    A factor may also be a view of a part of a tensor with one scale, whose integers are then given.
    """
    result: Tensor = _loaded().matmul(left, right, of_left, of_right)
    return result


def gelu(x: Tensor, approximate: str) -> Tensor:
    """`F.gelu` of a tensor without gaps, float32, bfloat16 or float16."""
    result: Tensor = _loaded().gelu(x, approximate)
    return result


def silu(x: Tensor) -> Tensor:
    """`F.silu` of a tensor without gaps, float32, bfloat16 or float16."""
    result: Tensor = _loaded().silu(x)
    return result


def _loaded() -> Any:
    native = module()
    assert native is not None
    return native


if __name__ == "__main__":  # `make` compiles beside the rest of the installation
    logging.basicConfig()
    module()
