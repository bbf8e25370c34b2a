"""Checkpoints with a good checksum and a description that is not: refused, or run to an answer or an error in bounds.

One mutation again:

    QAT_FUZZ_SEED=123 pytest tests/export/test_fuzz_checkpoints.py -k one_mutation
"""

import copy
import functools
import os
import random
import resource
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.export.checkpoint import load_checkpoint, save_checkpoint
from qat.ptq import PTQConfig, finalize
from qat.runtime.functions import FUNCTIONS, MOVES
from qat.runtime.network import LAYERS
from qat.zoo.gpt import CharGPT
from qat.zoo.models import SmallCNN
from tests.export.test_checkpoint_safety import forged
from tests.networks.recurrent import Forecaster

SECONDS, MEMORY = 20, 3 * 2**30
"""What one file may take to be loaded and run, beyond what the process has."""
DEFAULT, LARGE = 15, 2000


class Moves(nn.Module):
    """What makes tensors larger: repeating, expanding, padding, interpolating, and pooling to a size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.head = nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.conv(x), (1, 1, 0, 1)).repeat(1, 1, 2, 1)
        x = nn.functional.interpolate(x, scale_factor=2) + x.new_zeros(1).expand(1, 4, 1, 1)
        x = nn.functional.pad(self.up(x), (2, 1, 1, 1), mode="reflect").roll(1, 2).flip(3)
        x = nn.functional.max_pool2d(nn.functional.adaptive_avg_pool2d(nn.functional.pixel_shuffle(x, 2), 8), 2)
        return self.head(x[:, :, 1:].reshape(x.shape[0], -1).repeat(1, 2)[:, :16])


class Case(NamedTuple):
    """A network, what it reads, and its configuration."""

    net: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    preset: str = "int8"
    target: str = "generic"


CASES = {
    "convolutions": Case(lambda: SmallCNN(1, 10, width=4), lambda: torch.randn(4, 1, 8, 8), "w4a8"),
    "fixed point": Case(lambda: SmallCNN(1, 10, width=4), lambda: torch.randn(4, 1, 8, 8), target="cmsis_nn"),
    "codebook": Case(lambda: SmallCNN(1, 10, width=4), lambda: torch.randn(4, 1, 8, 8), "codebook4"),
    "blocks": Case(lambda: SmallCNN(1, 10, width=4), lambda: torch.randn(4, 1, 8, 8), "nvfp4"),
    "recurrent": Case(lambda: Forecaster(3, 4, 4), lambda: torch.randn(4, 6, 3)),
    "transformer": Case(
        lambda: CharGPT(num_classes=11, context=8, n_layer=1, n_head=2, width=8), lambda: torch.randint(11, (4, 8))
    ),
    "look-ups of tables": Case(
        lambda: CharGPT(num_classes=11, context=8, n_layer=1, n_head=2, width=8),
        lambda: torch.randint(11, (4, 8)),
        "codebook4",
    ),
    "moves": Case(Moves, lambda: torch.randn(4, 2, 8, 8)),
}


@functools.cache
def exported(name: str) -> tuple[bytes, Tensor]:
    """The file of a case, and inputs."""
    torch.manual_seed(0)
    case = CASES[name]
    x = case.inputs()
    prepared = qat.prepare(case.net().eval(), qat.preset(case.preset, target=case.target), x)
    finalize(prepared, [x], PTQConfig(adaptive_rounding_steps=0), trained=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_checkpoint(qat.lower(prepared), path)
        return path.read_bytes(), x


# ---- mutations -------------------------------------------------------------------------------------------------------

SIZES = [0, 1, 2, 3, 7, 64, 1000, 2**16, 2**20, 2**31, 2**32, 2**60, 2**63, 2**64, 10**30]
ABSURD = [*SIZES, *(-size for size in SIZES), 0.5, -1.5, 1e30, 1e-30, float("inf"), float("nan"), None, True, False, "",
          "x", "float64", "mean", [], {}, [1], [2**31], [[0, 2**31]], [1] * 70, {"a": 1}]  # fmt: skip
WORDS = [*LAYERS, *FUNCTIONS, *MOVES, "float16", "bool", "int64", "reflect", "circular", "bilinear", "packed", "same"]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterable[tuple[Any, Any]]:
    """Every (container, key) in plain data, but for what the file says of where it comes from."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        if key == "info" and len(path) == 1:
            continue
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key], (*path, key))


def mutate(description: dict[str, Any], draw: random.Random) -> str:
    """Change a description in one to three places; in words."""
    said = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = list(places(description))
        at, key = draw.choice(found)
        old, how = at[key], draw.random()
        if how < 0.1:
            del at[key]
            said.append(f"without {key!r} (was {old!r:.60})")
        elif how < 0.2:
            other, second = draw.choice(found)
            at[key] = copy.deepcopy(other[second])
        elif how < 0.3 and isinstance(at, list):
            at.insert(key, copy.deepcopy(old))
        elif how < 0.4 and isinstance(old, str):
            at[key] = draw.choice(WORDS)
        elif how < 0.6 and isinstance(old, int):
            at[key] = draw.choice((old + 1, old - 1, 2 * old, -old, old * 1000, old * 10**6))
        else:
            at[key] = draw.choice(ABSURD)
        if how >= 0.1:
            said.append(f"{key!r} in {at!r:.120}, was {old!r:.60}")
    return "; ".join(said)


def outcome(name: str, seed: int, folder: Path) -> tuple[str, str]:
    """What became of a mutated file, and what was changed in it.

    Raises:
        MemoryError: it asked for more than `MEMORY`.
    """
    content, x = exported(name)
    source, said = folder / "source.safetensors", ""
    source.write_bytes(content)

    def change(description: dict[str, Any]) -> None:
        nonlocal said
        said = mutate(description, random.Random(f"{name} {seed}"))

    path = forged(source, folder / "forged.safetensors", change)
    try:
        network = load_checkpoint(path)
    except ValueError as error:
        if "allocate" in str(error):
            raise MemoryError(str(error)) from error
        return "refused", said
    try:
        with torch.no_grad():
            network(x)
    except Exception as error:  # of whatever kind: the settings are none that belong together
        if isinstance(error, MemoryError) or "allocate" in str(error):
            raise MemoryError(str(error)[:300]) from error
        return "failed", f"{said}: {type(error).__name__} {str(error)[:200]}"
    return "ran", said


def words(name: str, seed: int) -> str:
    """What a seed changes."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "source").write_bytes(exported(name)[0])
        said: list[str] = []
        forged(
            Path(folder) / "source", Path(folder) / "forged",
            lambda d: said.append(mutate(d, random.Random(f"{name} {seed}"))),
        )  # fmt: skip
    return f"QAT_FUZZ_SEED={seed} [{name}] {said[0]}"


def within_bounds(name: str, seeds: Iterable[int]) -> tuple[Counter[str], list[str]]:
    """Outcomes of mutated files, in a process of their own: one that hangs, or dies, costs no other."""
    exported(name)
    rest, counts, found = list(seeds), Counter[str](), list[str]()
    while rest:
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.close(read)
            _run(name, rest, write)
        os.close(write)
        with os.fdopen(read) as channel:
            lines = channel.read().splitlines()
        _, status = os.waitpid(child, 0)
        for line in lines:
            if line.startswith("!"):
                found.append(f"{words(name, rest[int(line.split()[1])])}: {line}")
            counts[line.split()[0]] += 1
        rest = rest[len(lines) :]
        if os.WIFSIGNALED(status) and rest:
            how = signal.Signals(os.WTERMSIG(status)).name
            found.append(f"{words(name, rest[0])}: ended by {how}")
            rest = rest[1:]
    return counts, found


def _run(name: str, seeds: list[int], channel: int) -> None:
    """The child: a line for each seed."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGESIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        with tempfile.TemporaryDirectory() as folder:
            for i, seed in enumerate(seeds):
                signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
                signal.signal(signal.SIGPROF, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                try:
                    line = outcome(name, seed, Path(folder))[0]
                except Exception as error:
                    line = f"! {i} {type(error).__name__} {error}".replace("\n", " ")[:600]
                os.write(channel, f"{line}\n".encode())
    finally:
        os._exit(0)


@pytest.mark.parametrize("name", CASES)
def test_mutated_descriptions(name: str) -> None:
    counts, found = within_bounds(name, range(DEFAULT))
    assert not found, "\n".join(found)
    assert counts.total() == DEFAULT
    assert 0 < counts["refused"] < DEFAULT  # some are run, or nothing but the checks of the file would be tried


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", CASES)
def test_thousands_of_mutated_descriptions(name: str) -> None:
    counts, found = within_bounds(name, range(LARGE))
    print(name, dict(counts))
    assert not found, f"{len(found)}\n" + "\n".join(found)
    assert min(counts["refused"], counts["ran"]) > LARGE // 20


@pytest.mark.skipif("QAT_FUZZ_SEED" not in os.environ, reason="for a seed that failed: set QAT_FUZZ_SEED")
@pytest.mark.parametrize("name", CASES)
def test_one_mutation(name: str, tmp_path: Path) -> None:
    print(outcome(name, int(os.environ["QAT_FUZZ_SEED"]), tmp_path))
