"""Large results in memory that is kept when they are freed, and lent again.

A page that the system hands out has to be found and cleared first: for the gradients of a layer's weights that takes longer than
computing them. So freed memory is not given back at once: up to an eighth of the machine's waits for the next result of its size.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
import weakref

import torch
from torch import Tensor

LARGE = 4 << 20
"""Bytes from which on a result is taken from here; smaller ones torch's allocator recycles by itself."""


class Shelf:
    """Freed memory by size, the longest unused thrown away first.

    Args:
        limit: bytes that may wait here.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._free: list[mmap.mmap] = []  # the longest unused first
        # tensors may die in any thread; and, by the garbage collector, in the midst of what stands here: each step leaves the list whole
        self._lock = threading.RLock()

    @property
    def waiting(self) -> int:
        """Bytes."""
        return sum(map(len, self._free))

    def take(self, size: int) -> tuple[mmap.mmap, bool]:
        """Memory of at least `size` bytes, and whether it has been used before (else it is zeros)."""
        size = _rounded(size)
        with self._lock:
            for at in reversed(range(len(self._free))):
                if len(self._free[at]) == size:
                    return self._free.pop(at), True
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), False

    def put(self, memory: mmap.mmap) -> None:
        with self._lock:
            self._free.append(memory)
            while self.waiting > self.limit:
                self._free.pop(0)

    def clear(self) -> None:
        """Gives everything that waits back to the system."""
        with self._lock:
            self._free.clear()


def _rounded(size: int) -> int:
    """Up by less than an eighth, so that lists of many lengths share a few sizes."""
    step = max(mmap.PAGESIZE, 1 << (size.bit_length() - 4))
    return -(-size // step) * step


def _eighth() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8 if hasattr(os, "sysconf") else 0


SHELF = Shelf(_eighth())


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Contiguous; holds anything."""
    return _lend(shape, dtype)[0]


def gradient(like: Tensor, idle: list[int]) -> Tensor:
    """[E, ...], contiguous: zeros in the experts of `idle`, anything in the others.

    Pages of zeros are not touched until somebody writes there: what nobody chose costs next to nothing.
    """
    made, memory, used = _lend(like.shape, like.dtype)
    if memory is None or used:
        for expert in idle:
            _forget(made[expert], memory, expert)
    return made


def _lend(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, mmap.mmap | None, bool]:
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or not SHELF.limit:
        return torch.empty(shape, dtype=dtype, device="cpu"), None, False
    memory, used = SHELF.take(size)
    lent = (ctypes.c_char * len(memory)).from_buffer(memory)
    # runs when the last tensor on this memory is gone
    weakref.finalize(lent, SHELF.put, memory).atexit = False
    return torch.frombuffer(lent, dtype=dtype, count=math.prod(shape)).view(shape), memory, used


def _forget(part: Tensor, memory: mmap.mmap | None, index: int) -> None:
    if memory is None:
        part.zero_()
        return
    begin = index * part.nbytes
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (begin + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first >= last:
        part.zero_()
        return
    memory.madvise(mmap.MADV_DONTNEED, first, last - first)
    flat = part.view(-1)
    flat[: (first - begin) // part.element_size()].zero_()
    flat[len(flat) - (begin + part.nbytes - last) // part.element_size() :].zero_()
