"""Steps of networks in turns, each network in a process of its own.

In one process they would share a heap: what one leaves there makes the other faster or slower. A ratio is of two steps
that follow each other.
"""

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAUSE = 0.02
"""Seconds between two turns, in which the threads of the one process go to sleep."""


class Stepper:
    """A process that builds a network, and does a step each time it is asked."""

    def __init__(self, python: str, request: Mapping[str, Any]) -> None:
        command = [python, "-W", "ignore", "-m", "experiments.speed.turns", json.dumps(dict(request))]
        self.process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.built: dict[str, Any] = self._answer()

    def step(self) -> float:
        """Seconds of a step."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return float(self._answer()["seconds"])

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # packages print what they like
                found: dict[str, Any] = json.loads(line)
                return found
        lines = [line for line in self.process.communicate()[1].splitlines() if line.strip()]
        raise RuntimeError((lines or ["no message"])[-1][:200])


def compare(pythons: Mapping[str, str], requests: Mapping[str, Mapping[str, Any]], repeats: int) -> dict[str, Any]:
    """Ratios of the second network's steps to the first's.

    Args:
        pythons: name -> interpreter.
        requests: name -> what `serve` takes; two of them.
        repeats: steps of each.

    Returns:
        As plain data; {"failed": reason} if a process ended.
    """
    steppers: dict[str, Stepper] = {}
    taken: dict[str, list[float]] = {name: [] for name in requests}
    try:
        for name, request in requests.items():
            steppers[name] = Stepper(pythons[name], request)
        for _ in range(repeats):
            for name, stepper in steppers.items():
                time.sleep(PAUSE)
                taken[name].append(stepper.step())
    except RuntimeError as error:
        return {"failed": str(error)}
    finally:
        for stepper in steppers.values():
            stepper.close()
    first, second = taken.values()
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    built = list(steppers.values())[1].built
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "ms": round(1e3 * statistics.median(second), 2),
        "float_ms": round(1e3 * statistics.median(first), 2),
        "preparation_s": round(built["preparation_s"], 2),
        "preparation_steps": round(built["preparation_s"] / statistics.median(first), 1),
        "first_step_s": round(built["first_step_s"], 2),
        "loss": round(built["loss"], 4),
    }


def request_of(
    variant: str, work: str, *, device: str = "cpu", threads: int = 2, compiled: bool = False,
    size: Mapping[str, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What `serve` builds: `variant` (key of VARIANTS, or `float`) of WORK[work](**size)."""
    return {"variant": variant, "work": work, "device": device, "threads": threads, "compiled": compiled,
            "size": dict(size or {})}  # fmt: skip


def serve(request: Mapping[str, Any], turns: Sequence[str] | Any = sys.stdin) -> None:
    """Build, do three steps, and then one a line of `turns`; print what was measured."""
    import torch

    from experiments.speed.variants import built
    from experiments.speed.work import WORK

    torch.set_num_threads(request["threads"])
    cuda = request["device"] != "cpu"

    def now() -> float:
        if cuda:
            torch.cuda.synchronize(request["device"])
        return time.perf_counter()

    task = WORK[request["work"]](device=request["device"], **request["size"])
    start = now()
    net = built(request["variant"], task.net, task.x, request["work"])
    preparation = now() - start
    task.net.to("meta")  # only the copy is trained
    step = task.step_of(torch.compile(net) if request["compiled"] else net)
    start = now()
    loss = step()
    first = now() - start
    for _ in range(2):
        step()
    gc.collect()
    gc.disable()
    print(json.dumps({"preparation_s": preparation, "first_step_s": first, "loss": float(loss)}), flush=True)
    for _ in turns:
        start = now()
        step()
        print(json.dumps({"seconds": now() - start}), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
