"""FSDP2 shards a prepared transformer over two processes (gloo, `sharded.py`), which train as one does."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.modes import quantizers, set_mode
from qat.training.shard import shard

sys.path.insert(0, str(Path(__file__).parent))
import sharded


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("sharded")
    script = str(Path(__file__).parent / "sharded.py")
    running = [
        subprocess.Popen([sys.executable, script, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(sharded.WORLD)
    ]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(sharded.WORLD)]


@pytest.mark.parametrize("kind", sharded.RANGES)
def test_sharded_training_is_that_of_one_process(both: list[dict[str, Any]], kind: str) -> None:
    alone = sharded.train(kind)
    assert alone["losses"][-1] < alone["losses"][0]
    for result in both:
        assert result[kind]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert result[kind]["state"].keys() == alone["state"].keys()
        for name, value in alone["state"].items():
            got = result[kind]["state"][name]
            assert torch.allclose(got.reshape(value.shape), value, rtol=1e-4, atol=1e-5, equal_nan=True), name


def test_every_parameter_is_sharded(both: list[dict[str, Any]]) -> None:
    names = [name for name, _ in sharded.prepared("learned").named_parameters()]
    assert sorted(both[0]["learned"]["sharded"]) == sorted(names)


def test_lightnings_model_parallel_strategy_does_the_same(both: list[dict[str, Any]]) -> None:
    for result in both:
        assert result["lightning"]["losses"] == pytest.approx(result["learned"]["losses"], rel=1e-6)


def test_a_sharded_checkpoint_loads_into_a_whole_network(both: list[dict[str, Any]]) -> None:
    net = sharded.prepared("learned")
    net.load_state_dict(both[0]["learned"]["state"])
    assert {q.scale.dim() for _, q in quantizers(net)} == {0, 1}
    set_mode(net, "frozen")
    net.eval()
    assert torch.isfinite(net(sharded.tokens(0))).all()


def test_a_network_without_ranges_is_not_sharded() -> None:
    with pytest.raises(ValueError, match=r"has no range yet; run qat.calibrate\(net, batches\) before shard"):
        shard(sharded.prepared("learned"))
