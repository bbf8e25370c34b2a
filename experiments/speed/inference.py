"""What exported networks cost: time of a call over the same engine's float32, engine by engine.

Each session has a process of its own (several in one process slow each other), and rounds are interleaved: a round asks
every row once, so that the machine's moods meet all rows alike.

python -m experiments.speed.inference                              everything: half an hour on two cores
python -m experiments.speed.inference --short                      ResNet-20, three rounds of a quarter of a second
python -m experiments.speed.inference --engines onnxruntime --threads 2 --rounds 5

Results of rows that are not measured again stay in inference.csv.
"""

import argparse
import csv
import datetime
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import qat
from experiments.speed.machine import machine
from qat.export.onnxruntime import OnnxNetwork
from qat.export.openvino import OpenVinoNetwork
from qat.ptq import PTQConfig, finalize
from qat.zoo.models import ResNet
from tests.networks.mobilenet import MobileNetV2

Network = Callable[[Tensor], Any]

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "resnet20": (lambda: ResNet(20, "A"), (3, 32, 32)),
    "mobilenetv2": (MobileNetV2, (3, 224, 224)),
}
"""Name -> what builds it, and the shape of an image."""

CONFIGS = {"int8": {"target": "generic"}, "weights7": {"target": "onnxruntime_x86"}}
"""Name of exported files -> settings of the preset int8."""


class Row(NamedTuple):
    """One engine on one of the files.

    Attributes:
        engine: what runs; `float32` of the same engine is what the others are compared with.
        variant: of the network.
        make: (folder of the files, name of the network, threads) -> a network that is called with images.
        package: what has to be installed.
    """

    engine: str
    variant: str
    make: Callable[[Path, str, int], Network]
    package: str = "torch"


def _onnxruntime(file: str, target: str) -> Callable[[Path, str, int], Network]:
    return lambda folder, name, threads: OnnxNetwork(folder / file, target, threads)


def _openvino(file: str) -> Callable[[Path, str, int], Network]:
    return lambda folder, name, threads: OpenVinoNetwork(folder / file, threads)


def _float(folder: Path, name: str, threads: int) -> Network:
    return float_network(name)


def _loaded(folder: Path, name: str, threads: int) -> Network:
    return qat.load(folder / "int8" / "model.safetensors")


def _torch_ao(folder: Path, name: str, threads: int) -> Network:
    """What torch.ao's FX mode makes of the same network: its defaults for x86, calibrated on the same images."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "x86"
    x = torch.randn(16, *NETWORKS[name][1], generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        prepared = prepare_fx(float_network(name), get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        return convert_fx(prepared)


def _compiled(make: Callable[[Path, str, int], Network]) -> Callable[[Path, str, int], Network]:
    """Weights are constants in both, which Inductor then lays out as its kernels like them."""

    def compiled(folder: Path, name: str, threads: int) -> Network:
        from torch._inductor import config

        config.freezing = True
        return torch.compile(make(folder, name, threads))

    return compiled


FAST, EXACT = "onnxruntime_x86", "generic"
"""Targets whose session options are ONNX Runtime's fast and exact kernels."""

ROWS = (
    Row("onnxruntime", "float32", _onnxruntime("float.onnx", FAST), "onnxruntime"),
    Row("onnxruntime", "int8", _onnxruntime("int8/model.onnx", FAST), "onnxruntime"),
    Row("onnxruntime", "7-bit weights", _onnxruntime("weights7/model.onnx", FAST), "onnxruntime"),
    Row("onnxruntime", "int8, exact mode", _onnxruntime("int8/model.onnx", EXACT), "onnxruntime"),
    Row("openvino", "float32", _openvino("float.onnx"), "openvino"),
    Row("openvino", "int8", _openvino("int8/model.onnx"), "openvino"),
    Row("torch eager", "float32", _float),
    Row("torch eager", "int8", _loaded),
    Row("torch eager", "torch.ao", _torch_ao),
    Row("torch compiled", "float32", _compiled(_float)),
    Row("torch compiled", "int8", _compiled(_loaded)),
)


@torch.no_grad()
def float_network(name: str) -> nn.Module:
    """A network of random weights whose BatchNorm has seen data; the same in every process."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = make()
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias, std=0.2)
    net.train()
    for _ in range(3):
        net(torch.randn(8, *shape))
    return net.eval()


def write_files(name: str, folder: Path) -> None:
    """Everything that rows read: float32 as ONNX, and the exported files of each configuration."""
    x = torch.randn(16, *NETWORKS[name][1], generator=torch.Generator().manual_seed(1))
    torch.onnx.export(
        float_network(name), (x[:2],), folder / "float.onnx", dynamo=True, external_data=False, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    for file, settings in CONFIGS.items():
        prepared = qat.prepare(float_network(name), qat.preset("int8", **settings), x[:2])
        finalize(prepared, [x], PTQConfig(adaptive_rounding_steps=0), trained=False)
        qat.export(qat.lower(prepared), folder / file, x[:2], formats=["int8", "onnx"])


@torch.no_grad()
def measure(row: int, folder: Path, name: str, threads: int, batches: list[int], seconds: float) -> dict[int, float]:
    """Median milliseconds of a call, by batch size."""
    torch.set_num_threads(threads)
    network, found = ROWS[row].make(folder, name, threads), {}
    for batch in batches:
        x = torch.randn(batch, *NETWORKS[name][1], generator=torch.Generator().manual_seed(2))
        for _ in range(3):
            network(x)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 5:
            start = time.perf_counter()
            network(x)
            times.append(time.perf_counter() - start)
        found[batch] = 1e3 * statistics.median(times)
    return found


def in_a_process(arguments: list[Any]) -> dict[int, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "experiments.speed.inference", "--measure", json.dumps(arguments)]
    threads = {"OMP_NUM_THREADS": str(arguments[3])}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode:
        raise SystemExit(f"{ROWS[arguments[0]].engine}, {ROWS[arguments[0]].variant}: {done.stderr[-2000:]}")
    return {int(batch): ms for batch, ms in json.loads(done.stdout.splitlines()[-1]).items()}


def lines_of(name: str, threads: int, rounds: list[dict[Row, dict[int, float]]]) -> list[dict[str, Any]]:
    """A line of the table for each row and batch size."""
    lines = []
    for row in rounds[0]:
        base = next(r for r in ROWS if r.engine == row.engine and r.variant == "float32")
        for batch in rounds[0][row]:
            ratios = [one[row][batch] / one[base][batch] for one in rounds]
            lines.append({
                "network": name, "engine": row.engine, "variant": row.variant, "threads": threads, "batch": batch,
                "ms": f"{statistics.median(one[row][batch] for one in rounds):.3f}",
                "ratio": f"{statistics.median(ratios):.3f}", "ratio_min": f"{min(ratios):.3f}",
                "ratio_max": f"{max(ratios):.3f}", "rounds": len(rounds), "date": datetime.date.today().isoformat(),
            })  # fmt: skip
    return lines


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Ratios as bars from the least to the largest round, a panel a network."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for line in lines if line["variant"] != "float32"]
    names = [name for name in NETWORKS if any(line["network"] == name for line in lines)]
    settings = sorted({(int(line["threads"]), int(line["batch"])) for line in lines})
    fig, axes = plt.subplots(1, len(names), figsize=(5.5 * len(names), 4), sharey=True, squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        rows = list(dict.fromkeys(f"{x['engine']}\n{x['variant']}" for x in lines if x["network"] == name))
        for i, (threads, batch) in enumerate(settings):
            found = {
                f"{x['engine']}\n{x['variant']}": x for x in lines
                if (x["network"], int(x["threads"]), int(x["batch"])) == (name, threads, batch)
            }  # fmt: skip
            at = [rows.index(key) + (i - (len(settings) - 1) / 2) * 0.2 for key in found]
            middle, low, high = ([float(x[k]) for x in found.values()] for k in ("ratio", "ratio_min", "ratio_max"))
            spread = [
                [m - v for m, v in zip(middle, low, strict=True)],
                [v - m for m, v in zip(middle, high, strict=True)],
            ]
            plural = "" if threads == 1 else "s"
            ax.bar(at, middle, 0.18, yerr=spread, label=f"{threads} thread{plural}, batch {batch}", error_kw={"lw": 1})
        ax.axhline(1, color="grey", lw=1, ls=":")
        ax.set_xticks(range(len(rows)), rows, fontsize=7)
        ax.set_title(name)
    axes[0][0].set_ylabel("time / the same engine's float32")
    axes[0][0].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})


def merged(path: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the file at `path` says, with `lines` in place of what is measured anew; in order."""
    keys = ("network", "engine", "variant", "threads", "batch")
    table: dict[tuple[str, ...], dict[str, Any]] = {}
    earlier = list(csv.DictReader(path.open(newline=""))) if path.is_file() else []
    for line in [*earlier, *lines]:
        table[tuple(str(line[key]) for key in keys)] = line
    order = [(row.engine, row.variant) for row in ROWS]
    return sorted(table.values(), key=lambda line: (
        list(NETWORKS).index(line["network"]), order.index((line["engine"], line["variant"])), int(line["threads"]),
        int(line["batch"]),
    ))  # fmt: skip


def arguments() -> argparse.Namespace:
    engines = list(dict.fromkeys(row.engine for row in ROWS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--engines", nargs="+", default=engines, choices=engines)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a row in a round, for each batch size")
    parser.add_argument("--short", action="store_true", help="ResNet-20 alone, three short rounds")
    parser.add_argument("--files", type=Path, help="a folder that keeps the exported files for the next call")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("inference.csv"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.short:
        args.networks, args.rounds, args.seconds = ["resnet20"], 3, 0.25
    return args


def main() -> None:
    args = arguments()
    if args.measure is not None:
        row, folder, *others = json.loads(args.measure)
        print(json.dumps(measure(row, Path(folder), *others)))
        return
    console = Console()
    wanted = [row for row in ROWS if row.engine in args.engines]
    rows = [row for row in wanted if importlib.util.find_spec(row.package) is not None]
    for engine in sorted({row.engine for row in wanted} - {row.engine for row in rows}):
        console.print(f"{engine} is not installed and left out: pip install 'qat\\[all]'")
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, Progress(console=console) as progress:
        total = len(args.networks) * len(args.threads) * args.rounds * len(rows)
        task = progress.add_task("sessions", total=total)
        for name in args.networks:
            folder = (args.files or Path(temporary)) / name
            if not (folder / "float.onnx").is_file():
                folder.mkdir(parents=True, exist_ok=True)
                write_files(name, folder)
            for threads in args.threads:
                rounds: list[dict[Row, dict[int, float]]] = []
                for _ in range(args.rounds):
                    rounds.append({})
                    for row in rows:
                        request = [ROWS.index(row), str(folder), name, threads, args.batches, args.seconds]
                        rounds[-1][row] = in_a_process(request)
                        progress.advance(task)
                lines += lines_of(name, threads, rounds)
    table = Table("network", "engine", "variant", "threads", "batch", "ms", "/ float32", "from", "to")
    for line in lines:
        shown = (*list(line)[:6], "ratio", "ratio_min", "ratio_max")
        table.add_row(*(str(line[key]) for key in shown))
    console.print(table)
    lines = merged(args.out, lines)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    args.out.with_suffix(".json").write_text(json.dumps(machine(("torch", "onnxruntime", "openvino")), indent=2) + "\n")
    plot(lines, args.out.with_suffix(".svg"))
    console.print(f"wrote {args.out}, its machine (.json) and plot (.svg)")


if __name__ == "__main__":
    main()
