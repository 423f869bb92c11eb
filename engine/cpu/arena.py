"""Memory in huge pages for what a step reads, weights and the cache: many small ones would take time to look up."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

HUGE_PAGE, BLOCK, LINE = 2 << 20, 64 << 20, 64


class Arena:
    """Blocks of memory in which tensors lie one behind the other; it all goes when the last of them goes."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for a tensor."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._rest):
            self._rest = _block(max(BLOCK, size))
        taken = self._rest[:size].view(dtype).view(shape)
        self._rest = self._rest[-(-size // LINE) * LINE :]
        return taken


def _block(size: int) -> Tensor:
    """Fresh memory that begins and ends with a huge page, if the system has them; untouched, it takes nothing."""
    size = -(-size // HUGE_PAGE) * HUGE_PAGE
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(memory, dtype=torch.uint8)
    return block[-block.data_ptr() % HUGE_PAGE :][:size]
