"""Several processes hold the same ranges as one that sees everything: two real ones, over gloo (`ranks.py`)."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import ranks

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


def check_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(got[name].double(), value.double(), rtol=1e-6, atol=1e-6, equal_nan=True), name


@pytest.mark.parametrize("name", ranks.SCHEMES)
def test_two_processes_hold_what_one_holds(both: list[dict[str, Any]], name: str) -> None:
    alone = ranks.phases(name)
    for phase in PHASES:
        first, second = (result[name][phase] for result in both)
        for key, value in first.items():
            assert torch.equal(value.nan_to_num(7.0), second[key].nan_to_num(7.0)), f"{phase}: {key}"
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
