"""Several processes hold the same ranges as one that sees everything: two real ones, over gloo (`ranks.py`)."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import branches
import pytest
import ranks
import torch
from torch import Tensor

PHASES = ("calibrated", "trained", "frozen", "observed")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    script = str(Path(__file__).parent / "ranks.py")
    running = [
        subprocess.Popen([sys.executable, script, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(ranks.WORLD)
    ]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks.WORLD)]


def check_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value.nan_to_num(7.0), second[name].nan_to_num(7.0)), name


def check_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(got[name].double(), value.double(), rtol=1e-6, atol=1e-6, equal_nan=True), name


@pytest.mark.parametrize("name", ranks.SCHEMES)
def test_two_processes_hold_what_one_holds(both: list[dict[str, Any]], name: str) -> None:
    alone = ranks.phases(name)
    for phase in PHASES:
        first, second = (result[name][phase] for result in both)
        check_equal(first, second)
        check_close(first, alone[phase])
    assert any(not torch.equal(alone["trained"][key], alone["calibrated"][key]) for key in alone["trained"])


def test_shares_may_differ_in_number(both: list[dict[str, Any]]) -> None:
    for result in both:
        check_close(result["unequal shares"], ranks.unequal_shares(None))


def test_all_processes_are_told_when_one_fails(both: list[dict[str, Any]]) -> None:
    first, second = (result["refusals"] for result in both)
    assert "calibration failed in another process" in first["nan"]
    assert "calibration batch 0 holds 1 non-finite values" in second["nan"]
    assert first["counts"] == second["counts"]
    assert "different numbers of calibration batches" in first["counts"]
    assert first["none"] == second["none"] == "calibration needs at least one batch of inputs, got none"


def test_processes_draw_differently_unless_a_seed_is_given(both: list[dict[str, Any]]) -> None:
    first, second = (result["draws"] for result in both)
    for a, b in zip(first["own"], second["own"], strict=True):
        assert not torch.equal(a, b)
    alone, other = ranks.draws(5), ranks.draws(6)
    for a, b, c, d in zip(first["asked"], second["asked"], alone, other, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert not torch.equal(a, d)
    assert not torch.equal(alone[0], alone[1])


def test_one_process_calibrates_by_itself(both: list[dict[str, Any]]) -> None:
    assert both[0]["alone"] == ranks.lone(0)


def test_quantizers_that_never_run_do_not_stop_training(both: list[dict[str, Any]]) -> None:
    """DDP needs find_unused_parameters then, and says so; it does not hang."""
    for result in both:
        assert result["unused"] == "trained"
        assert "find_unused_parameters=True" in result["unused, not looked for"]


@pytest.mark.parametrize(("network", "ranges", "branch"), branches.CASES)
def test_two_processes_hold_what_one_holds_where_one_took_a_branch(
    both: list[dict[str, Any]], network: str, ranges: str, branch: str
) -> None:
    case = network, ranges, branch
    first, second = (result["branches"][case] for result in both)
    alone = branches.train(*case)
    for phase, expected in alone.items():
        check_equal(first[phase], second[phase])
        check_close(first[phase], expected)
    before, after = ({k: t.nan_to_num() for k, t in alone[phase].items()} for phase in ("observe", "quantize"))
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert any("extra" in name for name in moved) == (branch != "none")
    assert any("head" in name for name in moved)


@pytest.mark.parametrize("ranges", branches.NORMS)
def test_batch_norm_in_two_processes(both: list[dict[str, Any]], ranges: str) -> None:
    """Each normalises by its own part of the batch; ranges are of both. Running statistics are the first one's."""
    expected = branches.norms(ranges)
    for rank, result in enumerate(both):
        got = result["branches"]["norms", ranges]
        own = {name: t for name, t in expected.items() if "running_" in name} if rank else {}
        assert all(not torch.equal(got[name], t) for name, t in own.items())  # until DDP's next forward
        check_close(got | own, expected)


@pytest.mark.parametrize("manual", [False, True])
def test_a_lightning_module_that_needs_a_network_in_one_process_only(both: list[dict[str, Any]], manual: bool) -> None:
    first, second = (result["branches"]["lightning", manual] for result in both)
    check_equal(first, second)
    seen = [name for name in first if name.endswith("observer.low")]
    assert any(name.startswith("auxiliary") for name in seen)
    assert not any(first[name].isnan().any() for name in seen)
