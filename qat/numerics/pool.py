"""Memory for what our kernels write, used again from step to step.

Between forward and backward a step makes and drops hundreds of tensors. In glibc's heap a freed place does not take an
aligned tensor of the same size again, so most of the heap is holes (a step of ResNet-20 used 107 MB of 300), and what
the heap gives back to the system it gets again page by page. Kernels that write to memory of their own leave the heap
to the others, and find their pages where they were. It is for CPUs: on a GPU torch's allocator does this.
"""

import math
import mmap
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALLEST = 2**16
"""Bytes from which a tensor gets a block: smaller ones find room in the heap."""

PATIENCE = 64
"""After so many new blocks, sizes that none of them took are given back to the system."""

_DTYPES: dict[torch.dtype, Any] = {
    torch.int8: np.int8,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: np.int16,  # NumPy has no such type
}


class _Blocks(list[mmap.mmap]):
    """Free blocks of one size, the latest last: it may be in the cache still."""

    used = False


class _Held(np.ndarray[Any, Any]):
    """An array on a block, which goes back where it came from when the last tensor on the array is gone."""

    home: _Blocks | None = None
    block: mmap.mmap

    def __del__(self) -> None:
        if self.home is not None:
            self.home.append(self.block)


class Pool:
    """Blocks by size. Threads may share it: what it does to a list is one operation of the interpreter."""

    def __init__(self) -> None:
        self._free: defaultdict[int, _Blocks] = defaultdict(_Blocks)
        self._made = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor without gaps and of any contents; its block is free again once nothing refers to it."""
        size = math.prod(shape) * dtype.itemsize
        if size < SMALLEST:
            return torch.empty(shape, dtype=dtype)
        unit = 1 << (size.bit_length() - 4)  # sizes of one power of two share eight sizes of blocks
        size = -(-size // unit) * unit
        blocks = self._free[size]
        blocks.used = True
        try:
            block = blocks.pop()
        except IndexError:
            block = self._new(size)
        array = np.ndarray.__new__(_Held, shape, _DTYPES[dtype], block)
        array.home, array.block = blocks, block
        x = torch.from_numpy(array)
        return x.view(dtype) if dtype is torch.bfloat16 else x

    def _new(self, size: int) -> mmap.mmap:
        self._made += 1
        if self._made % PATIENCE == 0:
            for blocks in list(self._free.values()):
                if not blocks.used:
                    blocks.clear()
                blocks.used = False
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def free(self) -> list[int]:
        """Sizes of the blocks that no tensor holds, in bytes, from small to large."""
        return sorted(size for size, blocks in list(self._free.items()) for _ in blocks)

    def clear(self) -> None:
        """Give the free blocks back to the system."""
        for blocks in list(self._free.values()):
            blocks.clear()


POOL = Pool()
"""Of this process."""

usable = hasattr(mmap, "MAP_ANONYMOUS")
"""Whether the system has such memory: not on Windows."""
