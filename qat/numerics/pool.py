"""Memory for what our kernels write, used again from step to step.

Between forward and backward a step makes and drops hundreds of tensors. In glibc's heap a freed place does not take an
aligned tensor of the same size again, so most of the heap is holes (a step of ResNet-20 used 107 MB of 300), and what
the heap gives back to the system it gets again page by page. Kernels that write to memory of their own leave the heap
to the others, and find their pages where they were. It is for CPUs: on a GPU torch's allocator does this.
"""

import bisect
import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SMALLEST = 2**16
"""Bytes from which a tensor gets a block: smaller ones find room in the heap."""

LARGEST = 1.25
"""A block has at most so many times the size of its tensor."""


class Block(NamedTuple):
    """Bytes of the pool. In order of size, and of `since` among equal ones: how many were taken before it came back."""

    size: int
    since: int
    memory: mmap.mmap


class Pool:
    """Blocks, each free or held by one tensor. They never have more bytes than were held at once."""

    def __init__(self) -> None:
        self._free: list[Block] = []
        self._returned: deque[Block] = deque()  # a finalizer may run anywhere, so it takes no lock
        self._taken = 0
        self._held = self._most = 0  # bytes
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor without gaps and of any contents; its block is free again once nothing refers to it."""
        size = math.prod(shape) * dtype.itemsize
        if size < SMALLEST or not hasattr(mmap, "MAP_ANONYMOUS"):
            return torch.empty(tuple(shape), dtype=dtype)
        block = self._take(size)
        array = np.frombuffer(block.memory, np.int8, size)
        weakref.finalize(array, self._returned.append, block).atexit = False
        return torch.from_numpy(array).view(dtype).view(tuple(shape))

    def _take(self, size: int) -> Block:
        with self._lock:
            self._collect()
            first = bisect.bisect_left(self._free, (size,))
            if first < len(self._free) and (found := self._free[first].size) <= LARGEST * size:
                latest = bisect.bisect_left(self._free, (found + 1,)) - 1  # what came back last may be in the cache
                block = self._free.pop(latest)
            else:
                self._make_room(size)
                block = Block(size, 0, mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            self._taken += 1
            self._held += block.size
            self._most = max(self._most, self._held)
            return block

    def _collect(self) -> None:
        while self._returned:
            size, _, memory = self._returned.popleft()
            self._held -= size
            bisect.insort(self._free, Block(size, self._taken, memory), key=lambda block: block[:2])

    def _make_room(self, size: int) -> None:
        """Drop free blocks, the oldest first, as far as a new one would make more than were ever held."""
        excess = self._held + size + sum(block.size for block in self._free) - max(self._most, self._held + size)
        while self._free and excess > 0:
            oldest = min(self._free, key=lambda block: block.since)
            self._free.remove(oldest)
            excess -= oldest.size

    def free(self) -> list[int]:
        """Sizes of the blocks that no tensor holds, in bytes, from small to large."""
        with self._lock:
            self._collect()
            return [block.size for block in self._free]

    def clear(self) -> None:
        """Give the free blocks back to the system, and forget how much was held."""
        with self._lock:
            self._collect()
            self._free.clear()
            self._most = self._held


POOL = Pool()
"""Of this process."""
