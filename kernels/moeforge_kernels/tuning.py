"""Block sizes of the Triton kernels: a rule that is good everywhere, and a table of what was measured on this machine.

The table is one JSON file that people can read, in the user's cache directory: device -> kernel -> data type -> shape -> blocks
and milliseconds. `moeforge bench --tune` fills it; nothing else writes it, so a run never stops to measure.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

VERSION = 1
"""Of the table's layout and of the kernels' meaning of the blocks: tables of another version are ignored."""


@dataclass(frozen=True)
class Blocks:
    """Rows, columns and depth of a tile; warps and pipeline stages of a program."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Shape:
    """What decides which blocks are best: rows an expert gets on average, to the next power of two; output columns; depth."""

    rows: int
    n: int
    k: int

    @classmethod
    def of(cls, pairs: int, experts: int, n: int, k: int) -> Shape:
        mean = max(1, -(-pairs // experts))
        return cls(min(1 << (mean - 1).bit_length(), 4096), n, k)

    def __str__(self) -> str:
        return f"rows={self.rows} n={self.n} k={self.k}"


def path() -> Path:
    """Of the table: `$MOEFORGE_HOME/kernels.json`, by default in `~/.cache/moeforge`."""
    return Path(os.environ.get("MOEFORGE_HOME") or "~/.cache/moeforge").expanduser() / "kernels.json"


@functools.cache
def _table(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found["devices"] if isinstance(found, dict) and found.get("version") == VERSION else {}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


_FORCED: dict[str, Blocks] = {}


@contextlib.contextmanager
def forced(kernel: str, blocks: Blocks) -> Iterator[None]:
    """While it is open that kernel takes these blocks: for measuring them."""
    _FORCED[kernel] = blocks
    try:
        yield
    finally:
        del _FORCED[kernel]


def blocks(kernel: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Blocks:
    """The measured ones where there are any, else the rule's."""
    if kernel in _FORCED:
        return _FORCED[kernel]
    at = _table(path()).get(device_name(device), {}).get(kernel, {}).get(str(dtype).removeprefix("torch."), {})
    if (entry := at.get(str(shape))) is not None:
        return Blocks(**entry["blocks"])
    return rule(kernel, shape, dtype)


def rule(kernel: str, shape: Shape, dtype: torch.dtype) -> Blocks:
    """By what fits: a tile as tall as an expert's rows; two accumulators (gated) or a wide element halve its width."""
    narrow = dtype == torch.float32
    if kernel == "gram":
        # rows are its depth
        return Blocks(128, 64, 32, 4, 3) if narrow else Blocks(128, 128, 64, 8, 3)
    m = min(max(16, shape.rows), 64 if narrow else 128)
    n = 64 if narrow or kernel == "gated" else 128
    if m >= 128 and kernel == "gated":
        n = 128
    return Blocks(m, n, 32 if narrow else 64, 8 if m * n >= 128 * 128 else 4, 3 if narrow else 4)


def candidates(kernel: str, shape: Shape, dtype: torch.dtype) -> list[Blocks]:
    """What `--tune` measures: the rule's choice first, then its neighbours."""
    first = rule(kernel, shape, dtype)
    made = [first]
    for m in sorted({max(16, first.m // 2), first.m, min(256, first.m * 2)}):
        for n in (64, 128, 256):
            for k, stages in ((32, 4), (64, 3), (64, 4)):
                # what two stages of operands and the accumulator take must fit into shared memory and registers
                wide = 2 if kernel == "gated" else 1
                if m * n * wide <= 256 * 128 and (m + n * wide) * k * dtype.itemsize * stages <= 220_000:
                    made.append(Blocks(m, n, k, 8 if m * n * wide >= 128 * 128 else 4, stages))
    return list(dict.fromkeys(made))


def remember(kernel: str, shape: Shape, dtype: torch.dtype, device: torch.device, best: Blocks, ms: float) -> None:
    """Write one line of the table, whole: two processes that tune lose an entry at worst, never the file."""
    file = path()
    _table.cache_clear()
    devices = json.loads(json.dumps(_table(file)))
    kinds = devices.setdefault(device_name(device), {}).setdefault(kernel, {})
    entry = {"blocks": asdict(best), "ms": round(ms, 4), "torch": torch.__version__}
    kinds.setdefault(str(dtype).removeprefix("torch."), {})[str(shape)] = entry
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False, encoding="utf-8") as out:
        json.dump({"version": VERSION, "devices": devices}, out, indent=1, sort_keys=True)
    os.replace(out.name, file)
    _table.cache_clear()
