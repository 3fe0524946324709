"""Which rows each program of a grouped product computes: found on the device, so that nobody waits for the offsets.

Rows are cut into tiles of `size` that never cross from one expert to the next. How many there are depends on the data; the grid
has the upper bound P / size + E + 1, and programs beyond the last tile leave at once. The empty pairs at the end of the list are
cut likewise, as expert E.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# (a kernel's body is another language: literals are constexpr, launch options are keywords)

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..triton_parts import opaque

PROGRAM = 32
"""Tiles that one program places."""


class Tiles(NamedTuple):
    expert: Tensor
    """[G] int32: 0..E-1; E for empty pairs; E + 1 beyond the last tile."""
    row: Tensor
    """[G] int32: the first row."""


@triton.jit
def _place(Offsets, Expert, Row, pairs, experts, grid, SIZE: tl.constexpr, WIDE: tl.constexpr, PROGRAM: tl.constexpr):
    e = tl.arange(0, WIDE)
    end = tl.load(Offsets + e, mask=e < experts, other=0)
    end = tl.where(e < experts, end, pairs)
    begin = tl.load(Offsets + e - 1, mask=(e > 0) & (e <= experts), other=0)
    begin = tl.where(e <= experts, begin, pairs)
    count = (end - begin + SIZE - 1) // SIZE
    last = tl.cumsum(count, 0)
    tile = tl.program_id(0) * PROGRAM + tl.arange(0, PROGRAM)
    found = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), 1)
    first = begin + (tile[:, None] - (last - count)[None, :]) * SIZE
    row = tl.sum(tl.where(e[None, :] == found[:, None], first, 0), 1)
    inside = tile < grid
    tl.store(Expert + tile, tl.minimum(found, experts + 1), mask=inside)
    tl.store(Row + tile, row, mask=inside)


def _fake(offsets: Tensor, pairs: int, size: int) -> tuple[Tensor, Tensor]:
    grid = pairs // size + offsets.shape[0] + 1
    return offsets.new_empty(grid), offsets.new_empty(grid)


@opaque(_fake)
def tiles(offsets: Tensor, pairs: int, size: int) -> tuple[Tensor, Tensor]:
    """(expert, row) of every tile: see :class:`Tiles`."""
    experts = offsets.shape[0]
    expert, row = _fake(offsets, pairs, size)
    wide = triton.next_power_of_2(experts + 1)
    _place[(triton.cdiv(len(expert), PROGRAM),)](
        offsets, expert, row, pairs, experts, len(expert), SIZE=size, WIDE=wide, PROGRAM=PROGRAM
    )  # fmt: skip
    return expert, row
