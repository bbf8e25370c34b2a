"""Operations in place: what reads overwritten memory later, by whatever name, reads what the network reads there."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from tests.networks.blocks import Net

CONFIG = qat.QuantConfig.from_dict({"weight": {"bits": 8}, "activation": {"bits": 8}, "input": {"bits": 8}})


class Case(Net):
    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__(
            lambda s, x: run(s, s.a(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1), same=nn.Identity(),
            relu=nn.ReLU(inplace=True), drop=nn.Dropout(0.5), drop_in_place=nn.Dropout(0.5, inplace=True),
            n=torch.zeros(4, 1, 1),
        )  # fmt: skip


def case(run: Callable[..., Tensor]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Case(run).eval(), torch.randn(2, 3, 4, 4)


def overwritten(write: Callable[[Any, Tensor], Any], view: Callable[[Any, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The base is overwritten, a view of it is read."""

    def run(s: Any, y: Tensor) -> Tensor:
        z = view(s, y)
        write(s, y)
        return s.b(z).sum((2, 3), keepdim=True) + s.b(y)

    return run


def flat(s: Any, y: Tensor) -> Tensor:
    z = y.flatten(2)
    y.relu_()
    return s.b(z.view(-1, 4, 4, 4))


def renamed(s: Any, y: Tensor) -> Tensor:
    s.same(y).mul_(3.0)
    return s.b(y)


def again(s: Any, y: Tensor) -> Tensor:
    z, t = y.transpose(2, 3), s.same(y)
    s.relu(y)
    t += 1
    y.clamp_(max=1.2)
    return s.b(z) + s.b(t)


def parts_apart(s: Any, y: Tensor) -> Tensor:
    a, b = y.split(2, 1)
    a.mul_(3.0)
    return s.b(torch.cat([b, a], 1))


def size(s: Any, y: Tensor) -> Tensor:
    n = m = y.shape[1]
    n += 1
    return s.b(y * m) + n


def constant(s: Any, y: Tensor) -> Tensor:
    mask = torch.zeros(4, 1, 1)
    mask += y.mean((0, 2, 3), keepdim=True)[0]
    return s.b(y * mask)


FOLLOWED: dict[str, Callable[..., Tensor]] = {
    "slice": overwritten(lambda s, y: y.relu_(), lambda s, y: y[:, :, 1:]),
    "transpose": overwritten(lambda s, y: s.relu(y), lambda s, y: y.transpose(2, 3)),
    "chunk": overwritten(lambda s, y: y.div_(3), lambda s, y: y.chunk(2, 2)[1]),
    "masked_fill_": overwritten(lambda s, y: y.masked_fill_(y > 0.1, 0.5), lambda s, y: s.same(y)),
    "index_fill_": overwritten(lambda s, y: y.index_fill_(1, torch.tensor([2]), 1.0), lambda s, y: y.mT),
    "threshold": overwritten(lambda s, y: F.threshold(y, 0.1, 0.0, True), lambda s, y: y.unbind(0)[1][None]),
    "/=": overwritten(lambda s, y: y.__itruediv__(2.0), lambda s, y: y.view_as(y)),
    "identity": overwritten(lambda s, y: F.relu(y, inplace=True), lambda s, y: s.same(y)),
    "flatten": flat, "by another name": renamed, "several": again, "parts apart": parts_apart, "size": size,
    "constant": constant,
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
@torch.no_grad()
def test_later_readers_read_what_was_written(name: str) -> None:
    net, x = case(FOLLOWED[name])
    p = qat.prepare(net, dataclasses.replace(CONFIG, graph="required"), x)
    for _ in range(2):  # what is written into does not stay
        assert torch.equal(p(x), net(x))
    assert not [node for node in p.graph.nodes if str(node.target).endswith("_")]


def test_dropout_in_place_is_seen_by_other_names() -> None:
    for drop in (lambda s, y: s.drop_in_place(y), lambda s, y: F.dropout(y, 0.5, s.training, True)):
        net, x = case(overwritten(drop, lambda s, y: s.same(y)))
        p = qat.prepare(net, dataclasses.replace(CONFIG, graph="required"), x).train()
        torch.manual_seed(5)
        expected = net.train()(x)
        torch.manual_seed(5)
        assert torch.equal(p(x), expected)


def written(view: Callable[[Any, Tensor], Tensor], write: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    """A view is overwritten, its base is read."""

    def run(s: Any, y: Tensor) -> Tensor:
        write(view(s, y))
        return s.b(y)

    return run


def zeroed(y: Tensor) -> None:
    y[:, 0] = 0


def halved(y: Tensor) -> None:
    y /= 2


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "slice": (written(lambda s, y: y[:, :2], lambda z: z.mul_(0.5)), "'mul_'"),
    "/=": (written(lambda s, y: y[:, :2], halved), "'y /= x'"),
    "div_": (written(lambda s, y: y[:, :2], lambda z: z.div_(2)), "'div_'"),
    "chunk": (written(lambda s, y: y.chunk(2, 1)[1], lambda z: z.mul_(3.0)), "'mul_'"),
    "unbind": (written(lambda s, y: y.unbind(1)[0], lambda z: z.mul_(3.0)), "'mul_'"),
    "transpose": (written(lambda s, y: y.transpose(1, 2), lambda z: z.clamp_(min=0)), "'clamp_'"),
    "flatten": (written(lambda s, y: y.flatten(1), lambda z: z.relu_()), "'relu_'"),
    "masked_fill_": (written(lambda s, y: y[:, 1:], lambda z: z.masked_fill_(z > 0, 1.0)), "'masked_fill_'"),
    "setitem": (written(lambda s, y: y, zeroed), r"'y\[x\] = .*'"),
    "zero_": (written(lambda s, y: y, lambda z: z.zero_()), "'zero_'"),
    "out=": (written(lambda s, y: y, lambda z: torch.mul(z, 2, out=z)), "'mul'"),
    "detach": (written(lambda s, y: y.detach(), lambda z: z.clamp_(min=0)), "'clamp_'.* without its gradient"),
    "data": (written(lambda s, y: y.data, lambda z: z.clamp_(min=0)), "'clamp_'.* without its gradient"),
    "an alias in evaluation only": (written(lambda s, y: s.drop(y), lambda z: z.relu_()), "'relu_'"),
}  # fmt: skip


def counts(s: Any, y: Tensor) -> Tensor:
    s.n.add_(1)
    return s.b(y * s.n)


def follows(s: Any, y: Tensor) -> Tensor:
    s.n.copy_(y.detach().mean((0, 2, 3), keepdim=True)[0])
    return s.b(y + s.n)


REFUSED |= {"a buffer": (counts, "own tensor 'n'"), "a buffer that follows": (follows, "'copy_'.* own tensor 'n'")}


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_what_cannot_be_followed_stays_as_it_is_and_is_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    run, said = REFUSED[name]
    net, x = case(run)
    with pytest.raises(ValueError, match=said) as error:
        qat.prepare(net, dataclasses.replace(CONFIG, graph="required"), x)
    if name != "a buffer":
        assert f"{Path(__file__).name}:" in str(error.value)
    with caplog.at_level(logging.WARNING):
        p = qat.prepare(net, CONFIG, x)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    expected = net(x)
    net.load_state_dict(state)
    assert torch.equal(p(x), expected)
    assert "cannot be recorded" in caplog.text
    assert f"float: Case: its code is not recorded: {str(error.value)[:20]}" in qat.report(p)
    assert {"a", "b"} <= {name.partition(".")[0] for name, _ in qat.modes.quantizers(p)}


def test_only_the_module_that_shares_memory_is_left_out() -> None:
    net, x = case(REFUSED["slice"][0])
    whole = nn.Sequential(nn.Conv2d(3, 3, 1), net, nn.Conv2d(2, 2, 1)).eval()
    p = qat.prepare(whole, CONFIG, x)
    assert list(p.meta["qat"]["untraced"]) == ["1"]
    assert torch.equal(p(x), whole(x))
