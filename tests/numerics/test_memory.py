"""Memory for what C++ writes between forward and backward: who has it, and when it is free again."""

import gc
import itertools
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

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

CHUNK = 2**25
"""Bytes that are asked of the system at once."""

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def empty_pool() -> Iterator[None]:
    native.clear_blocks()
    yield
    gc.collect()
    native.clear_blocks()


def empty(size: int, dtype: torch.dtype = torch.int8) -> Tensor:
    made: Tensor = native.module().empty([size], [1], dtype)
    return made


def places_of(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """Where each lies, in whole pages, from low to high."""
    return sorted((x.data_ptr(), x.data_ptr() + -(-x.nbytes // PAGE) * PAGE) for x in tensors)


def test_a_place_is_free_with_the_end_of_its_tensor() -> None:
    x = native.module().empty([4, SMALLEST], [1, 4], torch.int8)
    assert (x.shape, x.dtype, x.stride()) == ((4, SMALLEST), torch.int8, (1, 4))
    x.fill_(7)
    address, view = x.data_ptr(), x[1]
    del x
    assert native.free_blocks() == [CHUNK - 4 * SMALLEST]  # a view holds it
    assert bool((view == 7).all())
    del view
    assert native.free_blocks() == [CHUNK]
    assert empty(SMALLEST, torch.float32).data_ptr() == address
    assert empty(SMALLEST // 2, torch.bfloat16).dtype == torch.bfloat16
    native.clear_blocks()
    assert native.free_blocks() == []


def test_two_tensors_never_share_memory() -> None:
    draw, held = random.Random(0), list[Tensor]()
    for number in range(600):
        size = draw.choice((SMALLEST, SMALLEST + 1, 3 * SMALLEST + 1000, 40 * SMALLEST, CHUNK + 5))
        held.append(empty(size, draw.choice((torch.int8, torch.int16))).fill_(number % 100))
        held[-1].mark = number % 100  # type: ignore[attr-defined]
        while sum(x.nbytes for x in held) > 3 * CHUNK:
            gone = held.pop(draw.randrange(len(held)))
            assert bool((gone[:: len(gone) - 1] == gone.mark).all())  # type: ignore[attr-defined]
    places = places_of(held)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    assert all(len(x.unique()) == 1 and int(x[0]) == x.mark for x in held)  # type: ignore[attr-defined]


def test_neighbours_that_are_free_are_one_place() -> None:
    """In any order: from below, from above, and between two."""
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3), (1, 3, 2, 0)):
        held: list[Tensor | None] = [empty(4 * SMALLEST) for _ in range(4)]
        assert native.free_blocks() == [CHUNK - 16 * SMALLEST]
        for i in order:
            held[i] = None
        assert native.free_blocks() == [CHUNK]


def test_the_smallest_place_that_fits_is_taken() -> None:
    held = [empty(size * SMALLEST) for size in (8, 1, 3, 1, 2, 1, 16, 1)]  # ones keep places apart
    rest = CHUNK - 33 * SMALLEST
    place = held[2].data_ptr()
    held = held[1::2]
    assert native.free_blocks() == [size * SMALLEST for size in (2, 3, 8, 16)] + [rest]
    x = empty(3 * SMALLEST - PAGE + 1)
    assert x.data_ptr() == place
    y = empty(5 * SMALLEST)
    assert native.free_blocks() == [size * SMALLEST for size in (2, 3, 16)] + [rest]
    del x, y
    assert native.free_blocks() == [size * SMALLEST for size in (2, 3, 8, 16)] + [rest]
    assert len(held) == 4


def test_what_is_free_goes_back_where_it_is_more_than_what_is_in_use() -> None:
    large = empty(CHUNK)
    small = empty(SMALLEST)
    del large
    assert sum(native.free_blocks()) == 2 * CHUNK - SMALLEST
    huge = empty(3 * CHUNK)  # fits nowhere
    assert native.free_blocks() == []
    small.fill_(1)
    more = empty(CHUNK - SMALLEST)
    larger = empty(2 * CHUNK)
    assert native.free_blocks() == [SMALLEST]  # little beside what is in use
    assert all(x.numel() for x in (huge, more, larger))


def resident() -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells")
def test_memory_that_is_cleared_is_the_systems_again() -> None:
    before = resident()
    x = empty(3 * CHUNK).fill_(1)
    full = resident()
    assert full - before > 2.5 * CHUNK / 1024
    del x
    assert resident() - before > 2.5 * CHUNK / 1024
    native.clear_blocks()
    assert resident() - before < CHUNK / 1024


def test_small_tensors_are_the_heaps() -> None:
    x = empty(SMALLEST - 1)
    assert native.free_blocks() == []
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
    assert sum(native.free_blocks()) % CHUNK == 0  # all of it is free again


def test_a_step_takes_no_new_memory_after_the_first() -> None:
    task = work.resnet20(8)
    net = qat.prepare(task.net, qat.preset("int8"), task.x[:2])
    qat.calibrate(net, [task.x])
    step = task.step_of(net.train())
    step()
    gc.collect()
    blocks = native.free_blocks()
    assert blocks  # or nothing was in the pool
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
