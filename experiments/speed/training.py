"""What a step of quantized training costs against a float one: time and memory, ours and the peers'.

python -m experiments.speed.training                              # all that is installed, about 16 minutes
python -m experiments.speed.training --short                      # ours, about 4 minutes (`make bench`)
python -m experiments.speed.training --peers .venv-peers          # peers from their environment (`make peers`)
python -m experiments.speed.training --device cuda

Float and quantized steps alternate, each network in a process of its own; a ratio is of two neighbours. Preparation is
that of a float network and 8 batches of calibration, in float steps.
Memory is the growth of the peak of resident memory over the built network, once libraries are loaded and what was freed
is given back, in another fresh process.
"""

import argparse
import csv
import ctypes
import dataclasses
import datetime
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.speed.turns import compare, request_of
from experiments.speed.variants import OURS, VARIANTS, built
from experiments.speed.work import WORK

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
WANTED = {"frozen": 1.05, "ema": 1.08, "lsq": 1.10, "compiled": 1.05, "memory": 1.15, "preparation": 12}
"""What ours is held to (times float)."""


def measure_memory(variant: str, work: str, device: str) -> dict[str, Any]:
    """MB by which four steps raise the peak over the built network, which has seen steps of four samples.

    So code that is loaded with the first step (libraries, compilers) is not counted, of whatever network. What the
    network has freed before, by calibration say, is given back to the system first: it would serve the steps unseen.
    """
    task = WORK[work](device=device)
    net = built(variant, task.net, task.x, work)
    task.net.to("meta")  # only the copy is trained
    few = dataclasses.replace(task, x=task.x[:4], y=task.y[:4]).step_of(net)
    started = _status("VmRSS")
    for _ in range(2):
        few()
    del few
    net.zero_grad(set_to_none=True)
    step = task.step_of(net)
    gc.collect()
    first = round((_status("VmRSS") - started) / 2**10, 1)
    _give_back()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        for _ in range(4):
            step()
        return {"growth_mb": round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1), "first_mb": first}
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    for _ in range(4):
        step()
    return {"growth_mb": round((_status("VmHWM") - before) / 2**10, 1), "first_mb": first}


def _give_back() -> None:
    """Free memory to the system: of glibc's heap, and of qat's kernels."""
    if "qat.numerics.native" in sys.modules:
        sys.modules["qat.numerics.native"].clear_blocks()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(field: str) -> int:
    """KiB that Linux says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def interpreter(package: str, peers: Path | None) -> str | None:
    """A Python that has `package`: this one, or the one of the peers' environment."""
    candidates = [sys.executable] + ([str(peers / "bin" / "python")] if peers is not None else [])
    for python in candidates:
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({package.split('.')[0]!r}) is None)"
        if Path(python).is_file() and subprocess.run([python, "-c", code], cwd=ROOT, check=False).returncode == 0:
            return python
    return None


def in_a_process(python: str, arguments: list[str]) -> dict[str, Any]:
    """What `--measure` prints last in a process of its own; {"failed": reason} if it ends otherwise."""
    command = [python, "-W", "ignore", "-m", "experiments.speed.training", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": (lines or ["no message"])[-1][:200]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def growth_of(python: str, what: list[str]) -> float | None:
    """The median of three processes' growth, MB: where a heap leaves its holes differs from one to the next."""
    grown = [in_a_process(python, ["--measure", *what]).get("growth_mb") for _ in range(3)]
    known = [growth for growth in grown if growth is not None]
    return statistics.median(known) if known else None


def rows_of(args: argparse.Namespace, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure everything that was asked for."""
    rows = []
    chosen = args.variants or (list(OURS) if args.short else list(VARIANTS))
    ways = ("eager",) if args.no_compile or args.short else ("eager", "compiled")
    for work in args.work:
        floats: dict[str, Any] = {}
        for name in chosen:
            variant = VARIANTS[name]
            python = interpreter(variant.package, args.peers)
            if work not in variant.work or python is None:
                continue
            common = [name, work, "--device", args.device, "--threads", str(args.threads)]
            for way in ways:
                progress(f"{work}: {variant.title}, {way}")
                settings = {"device": args.device, "threads": args.threads, "compiled": way == "compiled"}
                requests = {key: request_of(key, work, **settings) for key in ("float", name)}
                measured = compare(dict.fromkeys(requests, python), requests, args.repeats)
                row = {"work": work, "variant": name, "way": way, **measured}
                if way == "eager":
                    if python not in floats:
                        floats[python] = growth_of(python, ["float", *common[1:]])
                    growth = growth_of(python, common)
                    row |= {"growth_mb": growth, "float_growth_mb": floats[python]}
                    if growth is not None:
                        row["memory_ratio"] = round(growth / floats[python], 3)
                rows.append(row)
    return rows


def merged(earlier: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was measured before, with what was measured again in its place, in the order of WORK and VARIANTS."""
    numbers = [{k: _number(v) for k, v in row.items() if v != ""} for row in earlier]
    found = {(row["work"], row["variant"], row["way"]): row for row in [*numbers, *rows]}
    works, names = list(WORK), list(VARIANTS)
    return sorted(
        found.values(), key=lambda r: (works.index(r["work"]), names.index(r["variant"]), r["way"] != "eager")
    )


def _number(text: Any) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


FIELDS = (
    "work", "variant", "way", "ratio", "ratio_min", "ratio_max", "ms", "float_ms", "memory_ratio", "growth_mb",
    "float_growth_mb", "preparation_s", "preparation_steps", "first_step_s", "loss", "failed",
)  # fmt: skip


def show(rows: list[dict[str, Any]], earlier: list[dict[str, str]]) -> Any:
    """The table that people read; with what was measured before, where there is something."""
    from rich.box import SIMPLE
    from rich.table import Table

    before = {(row["work"], row["variant"], row["way"]): row["ratio"] for row in earlier}
    table = Table(
        "", "time", "least", "most", "aim", "memory", "prepare", "first",
        title="a step / a float step", box=SIMPLE, padding=(0, 1, 0, 0),
        caption=f"prepare: in float steps; first: the first step, s. Aims: memory {WANTED['memory']}, "
        f"prepare {WANTED['preparation']}.",
    )  # fmt: skip
    if earlier:
        table.add_column("committed")
    for work in dict.fromkeys(row["work"] for row in rows):
        table.add_section()
        table.add_row(f"[bold]{work}[/]")
        for row in (row for row in rows if row["work"] == work):
            variant, way, ours = row["variant"], row["way"], row["variant"] in OURS
            bound = (WANTED["compiled"] if way == "compiled" else WANTED[variant]) if ours else None
            title = VARIANTS[variant].title + (", compiled" if way == "compiled" else "")
            if "failed" in row:
                line = [f"[red]failed[/red]: {row['failed'][:60]}"]
            else:
                line = [
                    _coloured(row, "ratio", ".2f", bound),
                    _coloured(row, "ratio_min", ".2f", None),
                    _coloured(row, "ratio_max", ".2f", None),
                    f"{bound:.2f}" if bound else "",
                    _coloured(row, "memory_ratio", ".2f", WANTED["memory"] if ours else None),
                    _coloured(row, "preparation_steps", ".1f", WANTED["preparation"] if ours else None),
                    _coloured(row, "first_step_s", ".1f", None),
                ]
            line += [""] * (7 - len(line))
            table.add_row(title, *line, *([before.get((work, variant, way), "")] if earlier else []))
    return table


def _coloured(row: dict[str, Any], field: str, form: str, bound: float | None) -> str:
    """A number, green where it is within its bound."""
    if not row.get(field):
        return ""
    text = format(float(row[field]), form)
    return text if bound is None else f"[{'green' if float(row[field]) <= bound else 'yellow'}]{text}[/]"


def plot(rows: list[dict[str, Any]], path: Path, about: str) -> None:
    """Bars of time against float, ours first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    works = list(dict.fromkeys(row["work"] for row in rows))
    names = list(dict.fromkeys(row["variant"] for row in rows))[::-1]
    figure, axes = plt.subplots(1, len(works), figsize=(5.2 * len(works) + 1.6, 0.42 * len(names) + 1.6), sharey=True)
    for axis, work in zip([axes] if len(works) == 1 else axes, works, strict=True):
        for way, offset, colour in (("eager", 0.19, "#3b6fb6"), ("compiled", -0.19, "#9db9dd")):
            found = [r for r in rows if r["work"] == work and r["way"] == way and "failed" not in r]
            if not found:
                continue
            places = [names.index(r["variant"]) + offset for r in found]
            spread = [[r["ratio"] - r["ratio_min"] for r in found], [r["ratio_max"] - r["ratio"] for r in found]]
            axis.barh(places, [r["ratio"] for r in found], 0.36, color=colour, label=way)
            axis.errorbar([r["ratio"] for r in found], places, xerr=spread, fmt="none", ecolor="#555555", lw=0.8)
            for r, place in zip(found, places, strict=True):
                ink = "white" if way == "eager" else "black"
                axis.text(0.03, place, f"{r['ratio']:.2f}", va="center", fontsize=7, color=ink)
        axis.axvline(1, color="black", lw=1)
        axis.set_title(work)
        axis.set_xlabel("time of a step / float")
        axis.set_yticks(range(len(names)), [VARIANTS[name].title for name in names])
        axis.set_xlim(0, min(axis.get_xlim()[1], 5))
        axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(about, fontsize=8, y=0.02, va="bottom")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("what", nargs="*", help=argparse.SUPPRESS)
    result.add_argument("--work", nargs="+", default=list(WORK), choices=list(WORK))
    result.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="rows (default: all)")
    result.add_argument(
        "--short", action="store_true", help="only qat, eager; compared with the committed results, not written"
    )
    result.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    result.add_argument("--peers", type=Path, help="an environment with peers")
    result.add_argument("--device", default="cpu")
    result.add_argument("--threads", type=int, default=2)
    result.add_argument("--repeats", type=int, default=None)
    result.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    result.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    return result


def main() -> None:
    args = parser().parse_args()
    args.repeats = args.repeats or (6 if args.short else 15)
    torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(measure_memory(*args.what, args.device)))
        return
    from rich.console import Console

    from experiments.speed.machine import machine

    console = Console()
    facts = {"date": datetime.date.today().isoformat(), **machine(("torch", "torchao"), args.device)}
    kept = args.out / f"training_{args.device.partition(':')[0]}.csv"
    earlier = list(csv.DictReader(kept.open())) if kept.is_file() else []
    with console.status("") as status:
        rows = rows_of(args, status.update)
    console.print(show(rows, earlier if args.short else []))
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    left_out = [v.title for v in VARIANTS.values() if interpreter(v.package, args.peers) is None]
    if left_out and not args.short:
        console.print(
            f"Not installed, so left out: {', '.join(left_out)}. `make peers` installs them; then --peers .venv-peers"
        )
    if args.short:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    rows = merged(earlier, rows)
    with kept.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    kept.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    about = (
        f"{facts.get('device', facts['processor'])}, {args.threads} threads, torch {facts['torch']}, {facts['date']}"
    )
    plot(rows, kept.with_suffix(".svg"), about)
    console.print(f"wrote {kept}, .json and .svg")


if __name__ == "__main__":
    main()
