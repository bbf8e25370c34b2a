"""What fake quantization costs: forward and backward against `x.clone()`'s, with two allocators.

python -m experiments.speed.kernels --repeats 15
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from qat.fake_quant import FakeQuantize
from qat.mode import Mode
from qat.numerics import fast
from qat.numerics.fake_quantize import fake_quantize
from qat.scheme import TensorScheme

ALLOCATORS = {"default": {}, "reuse": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}}
"""glibc's settings: by default a large tensor is fresh pages from the kernel each time; with `reuse` it is memory that
was used before, as mostly in a training step.
"""
FORMS = {"native": "on", "compiled": "inductor", "blocked": "off", "composed": "off"}
"""Form -> what QAT_KERNELS says."""
LOW, HIGH, MOMENTUM = -128, 127, 0.05


class Row(NamedTuple):
    """A kind of range in one form."""

    what: str
    form: str
    forward: Callable[[], Tensor]


@contextmanager
def taken_by(form: str) -> Iterator[None]:
    """Have one of the forms take every tensor."""
    before = fast.SMALLEST_BLOCKED
    os.environ["QAT_KERNELS"] = FORMS[form]
    if form == "composed":
        fast.SMALLEST_BLOCKED = sys.maxsize
    yield
    fast.SMALLEST_BLOCKED = before


def ours(x: Tensor, scale: Tensor, grad_scale: float | None, form: str) -> Callable[[], Tensor]:
    zero_point = torch.zeros_like(scale)

    def forward() -> Tensor:
        with taken_by(form):
            take = fake_quantize if form == "composed" else fast.fake_quantize
            return take(x, scale, zero_point, LOW, HIGH, grad_scale=grad_scale)

    return forward


def running(x: Tensor, form: str) -> Callable[[], Tensor]:
    node = FakeQuantize(TensorScheme(bits=8, range="running", observer="ema", symmetric=False, momentum=MOMENTUM))
    node.observe(x)
    node.set_range_from_observer()
    node.mode, node.kept = Mode.quantize, False  # no integers: what reads the result is not part of this

    def forward() -> Tensor:
        with taken_by(form):
            return node(x)  # type: ignore[no-any-return]

    return forward


def rows(x: Tensor) -> list[Row]:
    """Every kind of range in every form, and PyTorch's own operation."""
    c0, c1 = x.shape[:2]

    def scale(*shape: int) -> Tensor:
        return torch.full(shape, 0.02)

    def learned(*shape: int) -> Tensor:
        return scale(*shape).requires_grad_()

    one, i32 = scale(1), torch.int32
    zero = torch.zeros(1)
    state = [torch.ones(1, dtype=torch.long)] * 2 + [torch.tensor([v]) for v in (-4.0, 4.0, 0.02)]
    state.append(torch.zeros(1, dtype=i32))
    ends = (LOW, HIGH)
    channel_1, channel_0, learned_1 = scale(c1), scale(c0), learned(c1)
    learned_one = learned(1)
    aten: dict[str, Callable[[], Tensor]] = {
        "fixed, tensor": lambda: torch.fake_quantize_per_tensor_affine(x, one, zero.to(i32), *ends),
        "fixed, channels (axis 1)": lambda: torch.fake_quantize_per_channel_affine(
            x, channel_1, torch.zeros(c1, dtype=i32), 1, *ends
        ),
        "fixed, channels (axis 0)": lambda: torch.fake_quantize_per_channel_affine(
            x, channel_0, torch.zeros(c0, dtype=i32), 0, *ends
        ),
        "LSQ, tensor": lambda: torch._fake_quantize_learnable_per_tensor_affine(x, learned_one, zero, *ends, 1.0),
        "LSQ, channels (axis 1)": lambda: torch._fake_quantize_learnable_per_channel_affine(
            x, learned_1, torch.zeros(c1), 1, *ends, 1.0
        ),
        "EMA, tensor, observing": lambda: torch.fused_moving_avg_obs_fake_quant(x, *state, MOMENTUM, *ends, -1),
    }
    found = []
    for form in FORMS:
        found += [
            Row("fixed, tensor", form, ours(x, scale(), None, form)),
            Row("fixed, channels (axis 1)", form, ours(x, scale(1, c1, 1, 1), None, form)),
            Row("fixed, channels (axis 0)", form, ours(x, scale(c0, 1, 1, 1), None, form)),
            Row("LSQ, tensor", form, ours(x, learned(), 1.0, form)),
            Row("LSQ, channels (axis 1)", form, ours(x, learned(1, c1, 1, 1), 1.0, form)),
            Row("EMA, tensor, observing", form, running(x, form)),
        ]
    found += [Row(what, "ATen", forward) for what, forward in aten.items()]
    return sorted(found, key=lambda row: (list(aten).index(row.what), (*FORMS, "ATen").index(row.form)))


def kept(forward: Callable[[], Tensor], elements: int) -> float:
    """Bytes an element that backward needs."""
    total: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.nbytes) or t, lambda t: t):
        forward()
    return round(sum(total) / elements, 3)


def measure(shape: tuple[int, ...], repeats: int, threads: int, forms: list[str]) -> None:
    """Print a line for each row and the result, as JSON."""
    torch.set_num_threads(threads)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def seconds(forward: Callable[[], Tensor]) -> float:
        x.grad = None
        start = time.perf_counter()
        forward().backward(grad)
        return time.perf_counter() - start

    todo = [row for row in rows(x) if row.form in forms]
    memory = [kept(row.forward, x.numel()) for row in todo]
    result = []
    for row, bytes_kept in zip(todo, memory, strict=True):
        pairs = [(seconds(lambda: x.clone()), seconds(row.forward)) for _ in range(repeats + 2)][2:]  # 2: to warm up
        clone, ours = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(ours / clone for clone, ours in pairs)  # of neighbours: the machine's moods cancel
        figures = {"ratio": round(ratio, 2), "ms": round(ours, 2), "clone_ms": round(clone, 2)}
        result.append({"range": row.what, "form": row.form, **figures, "bytes_kept": bytes_kept})
        print("row", flush=True)
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=(128, 64, 32, 32), metavar="N")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.csv"))
    parser.add_argument("--forms", nargs="+", default=[*FORMS, "ATen"], choices=[*FORMS, "ATen"], help="of each range")
    parser.add_argument("--measure", action="store_true", help="measure in this process (used by the script itself)")
    args = parser.parse_args()
    if args.measure:
        measure(tuple(args.shape), args.repeats, args.threads, args.forms)
        return
    console = Console()
    results: dict[str, list[dict[str, object]]] = {}
    with Progress(console=console) as progress:
        task = progress.add_task("rows", total=len(ALLOCATORS) * 6 * len(args.forms))
        for name, environment in ALLOCATORS.items():
            progress.update(task, description=f"allocator: {name}")
            command = [sys.executable, "-m", "experiments.speed.kernels", *sys.argv[1:], "--measure"]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, env=os.environ | environment, bufsize=1
            ) as child:
                assert child.stdout is not None
                for line in child.stdout:
                    if line.startswith("row"):
                        progress.advance(task)
                    else:
                        results[name] = json.loads(line)
            if child.returncode:
                raise SystemExit(f"the measurement with allocator '{name}' failed (exit status {child.returncode})")

    table = Table("range", "form", *(f"{name}" for name in ALLOCATORS), "bytes kept an element")
    table.title = f"forward and backward / clone's, {'x'.join(map(str, args.shape))} float32, {args.threads} threads"
    lines = []
    for both in zip(*results.values(), strict=True):
        line = {"range": both[0]["range"], "form": both[0]["form"]}
        for name, one in zip(results, both, strict=True):
            line |= {f"{key}_{name}": one[key] for key in ("ratio", "ms", "clone_ms")}
        line["bytes_kept"] = both[0]["bytes_kept"]
        lines.append(line)
        ratios = [f"{one['ratio']:.2f}" for one in both]
        form = str(line["form"])
        style = "bold" if form == "native" else None
        table.add_row(
            str(line["range"]), form, *ratios, str(line["bytes_kept"]), style=style, end_section=form == "ATen"
        )
    console.print(table)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
