"""What stops a recording is named: the line of the user's code, and what to write there."""

import dataclasses
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qat

REQUIRED = qat.QuantConfig.from_dict({"weight": {"bits": 8}, "activation": {"bits": 8}, "graph": "required"})
X = torch.randn(2, 3, 4, 4)


class Inner(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.run = nn.Conv2d(3, 4, 1), run

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return self.run(y)


class Outer(nn.Module):
    """The code that stops the recording is in a submodule of a submodule."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.b = nn.Sequential(Inner(run)), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.inner(x))
        return y


def branch(y: Tensor) -> Tensor:
    y = y * 2
    if y.sum() > 0:  # branch
        y = -y
    return y


def length(y: Tensor) -> Tensor:
    z = y + 1
    return z * len(y)  # length


def integer(y: Tensor) -> Tensor:
    return (
        y  #
        * int(y.sum())  # integer
    )


def loop(y: Tensor) -> Tensor:
    for i in range(y.shape[1]):  # loop
        y = y + i
    return y


def parts(y: Tensor) -> Tensor:
    return torch.stack([2 * part for part in y])  # parts


def numbers(y: Tensor) -> Tensor:
    z = np.tanh(y.numpy())  # numbers
    return torch.from_numpy(z)


def copied(y: Tensor) -> Tensor:
    return y * torch.tensor(y.shape[1])  # copied


def filled(y: Tensor) -> Tensor:
    return y + torch.zeros(y.shape[0], 4, 1, 1)  # filled


def written(y: Tensor) -> Tensor:
    y[:, 0] = 0  # written
    return y


ADVICE: dict[Callable[[Tensor], Tensor], str] = {
    branch: "Control flow .* move it out of forward, into a submodule of its own", length: r"write x\.shape\[0\]",
    integer: r"x\.sum\(\) for float\(x\.sum\(\)\)", loop: "a loop cannot run over a size", parts: "index them",
    numbers: "NumPy .* copy values", copied: r"torch\.tensor\(\) copy values", filled: r"x\.new_zeros\(\.\.\.\)",
    written: r"y\.masked_fill\(mask, value\) for y\[part\] = value",
}  # fmt: skip


def line(of: str, path: Path = Path(__file__)) -> int:
    """The number of the line that ends in a comment of that name."""
    return next(i for i, text in enumerate(path.read_text().splitlines(), 1) if text.endswith(f"# {of}"))


@pytest.mark.parametrize("run", ADVICE, ids=lambda run: str(run.__name__))
def test_the_line_and_the_advice_fit_the_cause(run: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=ADVICE[run]) as error:
        qat.prepare(Outer(run).eval(), REQUIRED, X)
    assert f" at {__file__}:{line(run.__name__)}" in str(error.value)


def test_a_branch_on_the_mode_names_its_line() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return torch.tanh(x)  # mode
            return torch.sigmoid(x)  # evaluated

    net = nn.Sequential(nn.Conv2d(3, 4, 1), Branch())
    with pytest.raises(ValueError, match="another path in training") as error:
        qat.prepare(net, REQUIRED, X)
    assert f" at {__file__}:{line('mode')}. A trace" in str(error.value)


def test_files_of_the_user_are_told_from_torchs_and_our_own(tmp_path: Path) -> None:
    """A folder of the user's may be called torch; torch's own functions and ours are no place to look at."""
    path = tmp_path / "torch" / "nets.py"
    path.parent.mkdir()
    shutil.copy(__file__, path)
    spec = importlib.util.spec_from_file_location("nets", path)
    assert spec is not None
    assert spec.loader is not None
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    with pytest.raises(ValueError, match="Control flow") as error:
        qat.prepare(nets.Outer(nets.branch).eval(), REQUIRED, X)
    assert f" at {path}:{line('branch', path)}" in str(error.value)

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x, x, x, is_causal=True)[0]  # attends
            return y

    with pytest.raises(ValueError, match="is_causal=True is only a hint") as error:
        qat.tracing.trace(Attends())
    assert f" at {__file__}:{line('attends')}" in str(error.value)


def test_what_forward_writes_into_a_buffer_is_not_lost() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 2, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)  # type: ignore[operator]
            y: Tensor = self.a(x) * self.calls
            return y

    net = nn.Sequential(nn.Conv2d(3, 4, 1), Counts())
    with pytest.raises(ValueError, match=r"writes into its own tensor '1\.calls'"):
        qat.prepare(net, REQUIRED, X)
    prepared = qat.prepare(net, dataclasses.replace(REQUIRED, graph="auto"), X)
    before = net[1].calls.clone()
    prepared(X)
    assert prepared.get_submodule("1").calls == before + 1
