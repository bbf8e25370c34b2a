"""Memory for what C++ writes between forward and backward: who has it, and when it is free again."""

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import qat
from experiments.speed import work
from qat.fake_quant import FakeQuantize
from qat.numerics import fast, native

pytestmark = pytest.mark.skipif(native.module() is None, reason="there is no compiler")

SMALLEST = 2**16
"""Bytes from which a tensor has a block."""

PATIENCE = 64
"""After so many new blocks, sizes that none of them took are given back."""


@pytest.fixture(autouse=True)
def empty_pool() -> Iterator[None]:
    native.clear_blocks()
    yield
    gc.collect()
    native.clear_blocks()


def empty(size: int, dtype: torch.dtype = torch.int8) -> Tensor:
    made: Tensor = native.module().empty([size], [1], dtype)
    return made


def test_a_block_is_free_with_the_end_of_its_tensor() -> None:
    x = native.module().empty([4, SMALLEST], [1, 4], torch.int8)
    assert (x.shape, x.dtype, x.stride()) == ((4, SMALLEST), torch.int8, (1, 4))
    x.fill_(7)
    address, view = x.data_ptr(), x[1]
    del x
    assert native.free_blocks() == []  # a view holds it
    assert bool((view == 7).all())
    del view
    assert native.free_blocks() == [4 * SMALLEST]
    assert empty(SMALLEST - 1, torch.float32).data_ptr() == address  # it fits well enough
    assert empty(SMALLEST // 2, torch.bfloat16).dtype == torch.bfloat16
    native.clear_blocks()
    assert native.free_blocks() == []


def test_two_tensors_never_share_memory() -> None:
    held: list[Tensor] = []
    for number in range(40):
        held.append(empty(SMALLEST + 1000 * (number % 7)).fill_(number))
        if number % 3 == 0:
            del held[0]
    assert all(len(x.unique()) == 1 for x in held)
    assert len({int(x[0]) for x in held}) == len(held)


def test_sizes_that_nothing_takes_any_more_are_dropped() -> None:
    large = empty(4 * SMALLEST)
    del large
    small = empty(SMALLEST)
    assert native.free_blocks() == [4 * SMALLEST]  # it is not taken for much less
    held = [small] + [empty(SMALLEST) for _ in range(2 * PATIENCE)]
    assert native.free_blocks() == []
    held.clear()
    del small
    assert native.free_blocks() == [SMALLEST] * (2 * PATIENCE + 1)


def test_small_tensors_are_the_heaps() -> None:
    x = empty(SMALLEST - 1)
    del x
    assert native.free_blocks() == []


def test_threads_take_their_own() -> None:
    failed = []

    def work_(number: int) -> None:
        for _ in range(200):
            x = empty(SMALLEST).fill_(number)
            y = empty(SMALLEST + 8).fill_(-number)
            if not (bool((x == number).all()) and bool((y == -number).all())):
                failed.append(number)

    threads = [threading.Thread(target=work_, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(native.free_blocks()) <= 4 * 4  # two old ones and two new


def test_a_step_takes_no_new_blocks_after_the_first() -> None:
    task = work.resnet20(8)
    net = qat.prepare(task.net, qat.preset("int8"), task.x[:2])
    qat.calibrate(net, [task.x])
    step = task.step_of(net.train())
    step()
    gc.collect()
    blocks = native.free_blocks()
    assert sum(blocks) > 8 * 16 * 32 * 32 * 7 * 2  # the first stage's alone
    for _ in range(3):
        step()
    gc.collect()
    assert native.free_blocks() == blocks


def test_steps_before_backward_keep_their_own() -> None:
    """Two forwards, then both backwards: neither reads what the other left."""
    torch.manual_seed(0)
    node = FakeQuantize(qat.preset("int8").activation)
    inputs = [torch.randn(4 * SMALLEST, requires_grad=True) for _ in range(2)]
    node.range.set(torch.tensor(0.01), torch.tensor(0.0))
    node.mode = qat.Mode.frozen
    alone = []
    for x in inputs:
        [grad] = torch.autograd.grad(node(x).sum(), x)
        alone.append(grad)
    outs = [node(x) for x in inputs]
    together = torch.autograd.grad(sum(out.sum() for out in outs), inputs)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)
        assert 0 < int(b.sum()) < b.numel()  # some are clipped


@pytest.mark.parametrize("learned", [False, True])
def test_a_gradient_is_overwritten_only_where_nobody_else_holds_it(learned: bool) -> None:
    """Two readers of one gradient, a hook that keeps it, `retain_grad`, a gradient of the caller's."""
    x, scale = torch.randn(SMALLEST, requires_grad=True), torch.tensor(0.5, requires_grad=learned)
    grad_scale = 0.1 if learned else None

    def quantized(x: Tensor) -> Tensor:
        return fast.fake_quantize(x, scale, None, -1, 1, grad_scale=grad_scale)

    given = torch.randn(SMALLEST)
    expected = torch.where((torch.round(x.detach() / 0.5).abs() <= 1), given, 0)
    before, kept = given.clone(), []
    (passed,) = torch.autograd.grad(quantized(x), x, given)
    assert torch.equal(passed, expected)
    assert torch.equal(given, before)
    y = quantized(x)
    y.retain_grad()
    y.register_hook(kept.append)
    z = y * 1.0
    z.register_hook(kept.append)
    z.retain_grad()
    z.backward(given)
    assert torch.equal(x.grad, expected)
    assert all(torch.equal(t, before) for t in (given, y.grad, z.grad, *kept))
    assert len(kept) == 2
    a, b = x * 1.0, x * 2.0  # an addition hands one gradient to both
    (passed,) = torch.autograd.grad(quantized(a) + quantized(b), x, given)
    inside = [(torch.round(t.detach() / 0.5).abs() <= 1).float() for t in (a, b)]
    assert torch.equal(passed, given * inside[0] + 2 * (given * inside[1]))
    view = given.clone().view(2, -1)
    (passed,) = torch.autograd.grad(quantized(x), x, view[:].flatten())
    assert torch.equal(view.flatten(), before)
