"""Where a step of quantized training spends more than the same float step, and what the least would be.

python -m experiments.speed.profile                                  # ResNet-20 and the GPT, all three kinds of ranges
python -m experiments.speed.profile --work lm --variants lsq --steps 6

Each network is stepped under torch.profiler. An operation counts for itself alone, without those that it calls; our
kernels tell the profiler their names. What lies between operations is Python. The floor
is what the quantizers have to move, over the bandwidth of a copy: values read and written, and the bytes that backward
is left.
"""

import argparse
import datetime
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from experiments.speed.machine import machine
from experiments.speed.variants import OURS, VARIANTS, built
from experiments.speed.work import WORK
from qat.fake_quant import FakeQuantize
from qat.numerics import native

FOLDER = Path(__file__).parent
MARK = "qat::"
STEP = "step: "
NODES = "quantizers: Python around the kernels"
CAUSES: dict[str, tuple[str, ...]] = {
    "quantizers: forward kernels": (MARK + "forward",),
    "quantizers: backward kernels": (MARK + "backward",),
    "quantizers: integers back to real numbers": (MARK + "decode",),
    "quantizers: ranges": (MARK + "range", "aten::aminmax"),
    NODES: (MARK + "node",),
    "layers: convolutions and products of matrices": (
        "aten::mkldnn", "aten::convolution", "aten::_conv", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm",
        "aten::linear", "aten::matmul",
    ),
    "layers: attention": (
        "aten::_scaled_dot", "aten::_softmax", "aten::_safe_softmax", "aten::softmax", "aten::scaled_dot",
    ),
    "layers: normalisation": ("aten::native_batch_norm", "aten::batch_norm", "aten::native_layer_norm", "aten::cudnn"),
    "layers: activations": (
        "aten::relu", "aten::threshold", "aten::clamp_min", "aten::gelu", "aten::hardtanh", "aten::native_dropout",
    ),
    "optimizer": ("Optimizer.", "aten::_fused", "aten::sqrt", "aten::addcdiv", "aten::addcmul", "aten::lerp"),
    "copies": ("aten::copy_", "aten::clone", "aten::contiguous", "aten::empty", "aten::zero", "aten::fill"),
    "masks and views": (
        "aten::masked_fill", "aten::where", "aten::view", "aten::as_strided", "aten::t", "aten::expand",
    ),
    "arithmetic": ("aten::add", "aten::mul", "aten::div", "aten::sub", "aten::sum", "aten::neg", "aten::pow"),
}  # fmt: skip
"""What a cause is made of: how the names of its operations begin; the first cause that has one counts."""
KERNELS = tuple(MARK + name for name in ("forward", "backward", "decode", "range"))
"""What counts with all that it calls."""
PYTHON = "Python and autograd between operations"
OTHER = "other operations"


def cause_of(event: Any) -> str:
    """The cause that the time of the profiler's event counts for; what a kernel calls is the kernel's."""
    if event.name.startswith(STEP):
        return PYTHON
    caller = event
    while caller is not None and not caller.name.startswith(KERNELS):
        caller = caller.cpu_parent
    name = event.name if caller is None else caller.name
    if name.startswith(("autograd::", "AOTDispatcher")) or "Backward" in name:
        return NODES if any(node in name for node in ("Inside", "Whole", "Learned")) else PYTHON
    return next((cause for cause, beginnings in CAUSES.items() if name.startswith(beginnings)), OTHER)


@contextmanager
def marked() -> Iterator[None]:
    """Within it, the profiler sees our nodes by name; kernels it sees anyway."""
    forward = FakeQuantize.forward

    def seen_forward(node: FakeQuantize, *args: Any, **kwargs: Any) -> Tensor:
        with record_function(f"{MARK}node"):
            return forward(node, *args, **kwargs)

    FakeQuantize.forward = seen_forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        FakeQuantize.forward = forward  # type: ignore[method-assign]


def causes(step: Callable[[], Tensor]) -> Counter[str]:
    """Milliseconds of a step by cause, by the profiler's clock."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(STEP):
        step()
    spent: Counter[str] = Counter()
    for event in profiler.events() or ():
        spent[cause_of(event)] += event.self_cpu_time_total / 1e3
    return spent


def middle(seen: Sequence[Counter[str]]) -> dict[str, float]:
    """The median of each cause over steps."""
    keys = {key for spent in seen for key in spent}
    return {key: statistics.median(spent[key] for spent in seen) for key in keys}


def moved_bytes(step: Callable[[], Tensor]) -> dict[str, int]:
    """Bytes that the quantizers' kernels read and write in a step: values, and for backward a byte of each, or a bit.

    Raises:
        RuntimeError: there is no compiler for the kernels.
    """
    moved: Counter[str] = Counter()
    calls = {name: getattr(native, name) for name in ("kept", "given", "measured", "following", "decode")}
    if native.module() is None:
        raise RuntimeError("the kernels that this accounts for are not available here: see the warning above")

    def counted(name: str) -> Callable[..., Any]:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = calls[name](x, *args, **kwargs)
            if name == "decode":
                moved["decode"] += x.nbytes + result.nbytes
                return result
            y, integers, _ = result
            node = "" if y.grad_fn is None else y.grad_fn.name()
            whole = "Whole" in node or not node
            bytes_kept = 0 if whole else x.numel() if "Learned" in node else x.numel() // 8
            moved["forward"] += x.nbytes + y.nbytes + bytes_kept + (0 if integers is None else integers.nbytes)
            moved["backward"] += 0 if whole else 2 * y.nbytes + bytes_kept
            return result

        return call

    for name in calls:
        setattr(native, name, counted(name))
    try:
        step()
    finally:
        for name, function in calls.items():
            setattr(native, name, function)
    return dict(moved)


def bandwidth(repeats: int = 20) -> float:
    """Bytes a second of a copy into memory that was used before, 8 MB, as tensors of a step are."""
    source = torch.randn(2**21)
    target = torch.empty_like(source)
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        taken.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / statistics.median(taken)


def measure(work: str, variant: str, steps: int) -> dict[str, Any]:
    """A step of `variant` beside a float one: times without the profiler, causes with it, and the floor."""
    task = WORK[work]()
    nets = {name: built(name, task.net, task.x, work) for name in ("float", variant)}
    stepping = {name: task.step_of(net) for name, net in nets.items()}
    taken: dict[str, list[float]] = {name: [] for name in stepping}
    for number in range(steps + 2):
        for name, step in stepping.items():
            start = time.perf_counter()
            step()
            if number >= 2:
                taken[name].append(1e3 * (time.perf_counter() - start))
    moved = moved_bytes(stepping[variant])
    seen: dict[str, list[Counter[str]]] = {name: [] for name in stepping}
    with marked():
        for _ in range(steps):
            for name, step in stepping.items():
                seen[name].append(causes(step))
    found = {name: middle(spent) for name, spent in seen.items()}
    total = {name: sum(spent.values()) for name, spent in found.items()}
    ms = {name: statistics.median(times) for name, times in taken.items()}
    least = 1e3 * sum(moved.values()) / bandwidth()
    saved = found["float"].get("layers: activations", 0.0) - found[variant].get("layers: activations", 0.0)
    rows = {
        key: found[variant].get(key, 0.0) - found["float"].get(key, 0.0)
        for key in (*CAUSES, OTHER, PYTHON)
        if key in found[variant] or key in found["float"]
    }
    return {
        "work": work,
        "variant": variant,
        "float_ms": round(ms["float"], 1),
        "ms": round(ms[variant], 1),
        "ratio": round(statistics.median(b / a for a, b in zip(taken["float"], taken[variant], strict=True)), 3),
        "profiled_float_ms": round(total["float"], 1),
        "profiled_ms": round(total[variant], 1),
        "causes_ms": {key: round(value, 2) for key, value in rows.items()},
        "explained": round(1 - abs(rows.get(OTHER, 0.0)) / sum(map(abs, rows.values())), 3),
        "moved_mb": {key: round(value / 2**20, 1) for key, value in moved.items()},
        "floor_ms": round(least, 1),
        "floor_ratio": round((ms["float"] + least - saved) / ms["float"], 3),
    }


def show(found: dict[str, Any]) -> Any:
    """The table that people read: causes, largest first."""
    from rich.table import Table

    difference = found["profiled_ms"] - found["profiled_float_ms"]
    title = (
        f"{found['work']}, {VARIANTS[found['variant']].title}: {found['ratio']:.2f} of float's {found['float_ms']:.0f} "
        f"ms ({difference:+.1f} ms under the profiler)"
    )
    table = Table("cause", "ms more than float", "share", title=title, min_width=len(title))
    for column in table.columns[1:]:
        column.justify = "right"
    for cause, ms in sorted(found["causes_ms"].items(), key=lambda item: -abs(item[1])):
        table.add_row(cause, f"{ms:+.2f}", f"{ms / difference:+.0%}")
    moved = ", ".join(f"{name} {mb:.0f}" for name, mb in found["moved_mb"].items())
    total = sum(found["moved_mb"].values())
    table.caption = (
        f"{found['explained']:.0%} of what differs, up or down, has a cause. Floor {found['floor_ratio']:.2f}: the "
        f"kernels move {total:.0f} MB ({moved}), {found['floor_ms']:.1f} ms at the speed of a copy, less the "
        "activation functions that they absorb."
    )
    return table


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--work", nargs="+", default=list(WORK), choices=list(WORK))
    result.add_argument("--variants", nargs="+", default=list(OURS), choices=list(VARIANTS))
    result.add_argument("--steps", type=int, default=8, help="steps of each network, with and without the profiler")
    result.add_argument("--threads", type=int, default=2)
    result.add_argument("--out", type=Path, default=FOLDER / "profile_cpu.json", help="where the numbers are kept")
    return result


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    from rich.console import Console

    console = Console()
    results = []
    for work in args.work:
        for variant in args.variants:
            with console.status(f"{work}: {VARIANTS[variant].title}"):
                results.append(measure(work, variant, args.steps))
            console.print(show(results[-1]))
    facts = {"date": datetime.date.today().isoformat(), **machine(), "threads": args.threads}
    args.out.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
