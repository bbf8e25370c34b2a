"""The C++ module: where it comes from, and what happens where it cannot be had."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qat.numerics import fast, native


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing was compiled yet; the folder of what will be."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    native.module.cache_clear()
    fast._plan.cache_clear()
    yield tmp_path
    native.module.cache_clear()
    fast._plan.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """An executable that stands in for g++."""
    path = folder / "g++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize("what", ["refuses", "missing", "unwritable"])
def test_without_a_compiler_training_goes_on(
    anew: Path, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told once, with the reason, and another form takes the tensors."""
    if what == "refuses":
        monkeypatch.setenv("CXX", compiler(anew, "[ $1 = --version ] || { echo 'no such header' >&2; exit 1; }"))
    elif what == "missing":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", "")
    else:
        (anew / "file").touch()
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(anew / "file" / "cache"))
    x = torch.randn(2 * fast.SMALLEST, requires_grad=True)
    for _ in range(2):
        fast.fake_quantize(x, torch.tensor(0.1), torch.tensor(0.0), -8, 7).sum().backward()
    said = {"refuses": "no such header", "missing": "no g++", "unwritable": "Not a directory"}[what]
    assert caplog.text.count(said) == 1
    assert x.grad is not None
    assert 0 < x.grad.mean() < 2


PROCESS = [sys.executable, "-P", str(native.__file__)]
"""As `make` calls it."""


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    """Also after one of them was killed while it compiled."""
    if native.module() is None:
        pytest.skip("no compiler at hand")
    count = tmp_path / "count"
    script = f"""[ "$1" = --version ] && echo stand-in && exit
echo >> {count}; sleep 1; for last; do :; done; cp {native.module().__file__} "$last"
"""
    environment = os.environ | {"CXX": compiler(tmp_path, script), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    first = subprocess.Popen(PROCESS, env=environment, start_new_session=True)
    while not count.exists():
        assert first.poll() is None
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    others = [subprocess.Popen(PROCESS, env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in others] == [0, 0]
    assert len(list((tmp_path / "cache").rglob("native.*.so"))) == 1
    assert len(count.read_text().splitlines()) == 2  # the one that was killed, and one of the two
