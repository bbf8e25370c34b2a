"""How the cost of quantized training grows: width, depth, batch and group size, each doubled four times.

python -m experiments.speed.growth                        # about 8 minutes
python -m experiments.speed.growth --axes batch group     # some of it

Width and batch are of ResNet-20, depth of a GPT, with frozen, running and learned ranges; groups are of the weights of
a GPT whose activations stay float. Float and quantized steps alternate, each network in a process of its own.
"""

import argparse
import csv
import datetime
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.speed.machine import machine
from experiments.speed.turns import compare, request_of
from experiments.speed.variants import GROUPS, OURS, VARIANTS

FOLDER = Path(__file__).parent
GROUPED = "groups"
FIELDS = ("axis", "value", "variant", "ratio", "ratio_min", "ratio_max", "ms", "float_ms", "failed")


@dataclass(frozen=True)
class Axis:
    """What is doubled.

    Attributes:
        title: for people.
        values: from small to large.
        size: arguments of the work at a value.
        work: key of WORK.
        variants: what is measured; groups have the value in their name.
    """

    title: str
    values: tuple[int, ...]
    size: Callable[[int], dict[str, int]]
    work: str = "resnet20"
    variants: tuple[str, ...] = OURS


AXES: dict[str, Axis] = {
    "width": Axis(
        "width: channels of ResNet-20's first stage, batch 16",
        (4, 8, 16, 32, 64),
        lambda n: {"batch": 16, "width": n},
    ),
    "depth": Axis(
        "depth: layers of a GPT, width 128, batch 8 x 64",
        (1, 2, 4, 8, 16),
        lambda n: {"batch": 8, "length": 64, "n_layer": n, "width": 128},
        "lm",
    ),
    "batch": Axis("batch: images, ResNet-20", (8, 16, 32, 64, 128), lambda n: {"batch": n}),
    "group": Axis("group: weights a scale, GPT, 4-bit weights", tuple(GROUPS), lambda n: {}, "lm", (GROUPED,)),
}


def measure(axis: str, value: int, variant: str, repeats: int, threads: int) -> dict[str, Any]:
    """Ratios of quantized to float steps at one point."""
    about = AXES[axis]
    name = f"groups of {value}" if variant == GROUPED else variant
    requests = {key: request_of(key, about.work, threads=threads, size=about.size(value)) for key in ("float", name)}
    found = compare(dict.fromkeys(requests, sys.executable), requests, repeats)
    return {"axis": axis, "value": value, "variant": variant} | {key: found[key] for key in FIELDS if key in found}


def plot(rows: list[dict[str, Any]], path: Path, about: str) -> None:
    """A panel an axis: the ratio, and its spread, against what is doubled."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    fig, panels = plt.subplots(1, len(shown), figsize=(3.6 * len(shown), 3.6), squeeze=False, sharey=True)
    for axis, panel in zip(shown, panels[0], strict=True):
        for variant in AXES[axis].variants:
            points = [row for row in rows if (row["axis"], row["variant"]) == (axis, variant) and not row.get("failed")]
            if points:
                at, *ratios = (
                    [float(row[key]) for row in points] for key in ("value", "ratio", "ratio_min", "ratio_max")
                )
                [line] = panel.plot(at, ratios[0], "o-", label=title_of(variant))
                panel.fill_between(at, ratios[1], ratios[2], color=line.get_color(), alpha=0.12, linewidth=0)
        panel.axhline(1, color="0.4", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xticks(AXES[axis].values, [str(value) for value in AXES[axis].values])
        panel.minorticks_off()
        panel.set_xlabel(AXES[axis].title.replace(": ", "\n", 1), fontsize=9)
        panel.grid(axis="y", alpha=0.3)
        if panel.lines[:-1]:
            panel.legend(fontsize=7)
    panels[0][0].set_ylabel("quantized step / float step")
    panels[0][0].set_ylim(bottom=0.8)
    fig.suptitle(f"How the cost grows ({about})", fontsize=10)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


def title_of(variant: str) -> str:
    """What a line is called."""
    return "4-bit weights in groups" if variant == GROUPED else VARIANTS[variant].title.removeprefix("qat, ")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    result.add_argument("--repeats", type=int, default=10, help="pairs of steps a point")
    result.add_argument("--threads", type=int, default=2)
    result.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    return result


def main() -> None:
    args = parser().parse_args()
    from rich.console import Console
    from rich.progress import track

    console = Console()
    points = [(axis, n, name) for axis in args.axes for n in AXES[axis].values for name in AXES[axis].variants]
    rows = []
    for axis, value, variant in track(points, "points", console=console):
        found = measure(axis, value, variant, args.repeats, args.threads)
        rows.append(found)
        said = found.get("failed") or f"{found['ratio']:.2f} ({found['ratio_min']:.2f} to {found['ratio_max']:.2f})"
        console.print(f"{axis} {value}, {title_of(variant)}: {said}")
    kept = args.out / "growth_cpu.csv"
    if kept.is_file():
        rows = [row for row in csv.DictReader(kept.open()) if row["axis"] not in args.axes] + rows
    rows.sort(key=lambda row: list(AXES).index(row["axis"]))
    with kept.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    facts = {"date": datetime.date.today().isoformat(), **machine(), "threads": args.threads}
    kept.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    plot(rows, kept.with_suffix(".svg"), f"{facts['processor']}, {args.threads} threads, torch {facts['torch']}")
    console.print(f"wrote {kept}, .json and .svg")


if __name__ == "__main__":
    main()
