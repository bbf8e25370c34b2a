"""Memory for the bytes between forward and backward: who has it, and when it is free again."""

import gc
import threading

import pytest
import torch
from torch import Tensor

import qat
from experiments.speed import work
from qat.fake_quant import FakeQuantize
from qat.numerics import kernels
from qat.numerics.pool import PATIENCE, POOL, SMALLEST, Pool


def test_a_block_is_free_with_the_end_of_its_tensor() -> None:
    pool = Pool()
    x = pool.empty((4, SMALLEST), torch.int8)
    assert (x.shape, x.dtype, x.is_contiguous()) == ((4, SMALLEST), torch.int8, True)
    x.fill_(7)
    address, view = x.data_ptr(), x[1]
    del x
    assert pool.free() == []  # a view holds it
    assert bool((view == 7).all())
    del view
    gc.collect()
    assert pool.free() == [4 * SMALLEST]
    assert pool.empty((SMALLEST - 1,), torch.float32).data_ptr() == address  # it fits well enough
    assert pool.empty((7, SMALLEST // 14), torch.bfloat16).dtype == torch.bfloat16
    pool.clear()
    assert pool.free() == []


def test_two_tensors_never_share_memory() -> None:
    pool = Pool()
    held: list[Tensor] = []
    for number in range(40):
        held.append(pool.empty((SMALLEST + 1000 * (number % 7),), torch.int8).fill_(number))
        if number % 3 == 0:
            del held[0]
    gc.collect()
    assert all(len(x.unique()) == 1 for x in held)
    assert len({int(x[0]) for x in held}) == len(held)


def test_sizes_that_nothing_takes_any_more_are_dropped() -> None:
    pool = Pool()
    large = pool.empty((4 * SMALLEST,), torch.int8)
    del large
    small = pool.empty((SMALLEST,), torch.int8)
    assert pool.free() == [4 * SMALLEST]  # it is not taken for much less
    held = [small] + [pool.empty((SMALLEST,), torch.int8) for _ in range(2 * PATIENCE)]
    assert pool.free() == []
    held.clear()
    del small
    gc.collect()
    assert pool.free() == [SMALLEST] * (2 * PATIENCE + 1)


def test_small_tensors_are_the_heaps() -> None:
    pool = Pool()
    x = pool.empty((SMALLEST - 1,), torch.int8)
    del x
    gc.collect()
    assert pool.free() == []


def test_threads_take_their_own() -> None:
    pool = Pool()
    failed = []

    def work_(number: int) -> None:
        for _ in range(200):
            x = pool.empty((SMALLEST,), torch.int8).fill_(number)
            y = pool.empty((SMALLEST + 8,), torch.int8).fill_(-number)
            if not (bool((x == number).all()) and bool((y == -number).all())):
                failed.append(number)

    threads = [threading.Thread(target=work_, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    gc.collect()
    assert len(pool.free()) <= 4 * 4  # two old ones and two new


@pytest.mark.skipif(not kernels.available(False, "flat"), reason="there is no compiler")
def test_a_step_takes_no_new_blocks_after_the_first() -> None:
    POOL.clear()
    task = work.resnet20(8)
    net = qat.prepare(task.net, qat.preset("int8"), task.x[:2])
    qat.calibrate(net, [task.x])
    step = task.step_of(net.train())
    step()
    gc.collect()
    blocks = POOL.free()
    assert sum(blocks) > 8 * 16 * 32 * 32 * 7 * 2  # the first stage's alone
    for _ in range(3):
        step()
    gc.collect()
    assert POOL.free() == blocks
    POOL.clear()


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
