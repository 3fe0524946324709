"""Where every byte of a compressed checkpoint lies: role by precision. What stayed in 16 bits stands in the table."""

from __future__ import annotations

from collections.abc import Mapping

from moeforge.checkpoint.roles import Role, is_matrix, role_of
from moeforge.checkpoint.tensor import TensorInfo
from moeforge.errors import BadInput
from moeforge.options import format_bytes

COMPRESSED: tuple[Role, ...] = ("attention", "feed-forward", "experts", "shared experts")
"""The roles that every method compresses: the matrices that hold nearly all bytes."""

Table = dict[str, dict[str, int]]
"""role -> precision -> bytes. A matrix in nf4 counts with its scales; anything else counts under its stored dtype."""


def account(tensors: Mapping[str, TensorInfo], stored: Mapping[str, Mapping[str, TensorInfo]], precision: str) -> Table:
    """The table of an output.

    Args:
        tensors: headers of the source, by name.
        stored: name of each compressed matrix -> the tensors stored for it.
        precision: the method's name.
    """
    table: Table = {}
    for info in tensors.values():
        parts = stored.get(info.name)
        row = table.setdefault(role_of(info), {})
        key, nbytes = (info.dtype, info.nbytes) if parts is None else (precision, sum(p.nbytes for p in parts.values()))
        row[key] = row.get(key, 0) + nbytes
    return table


def check_nothing_left(tensors: Mapping[str, TensorInfo], stored: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Refuse an output in which a matrix that should be compressed is not.

    Raises:
        BadInput: names the first such tensor and counts the rest.
    """
    left = [i for i in tensors.values() if role_of(i) in COMPRESSED and is_matrix(i) and i.name not in stored]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise BadInput(
            f"{left[0].name}{more}: stored as {left[0].dtype}, which compress cannot read; write the source in bfloat16 first"
        )


def unknown(tensors: Mapping[str, TensorInfo]) -> list[TensorInfo]:
    """Matrices and larger tensors of no known role, which are therefore left as they are."""
    return [info for info in tensors.values() if role_of(info) == "other" and len(info.shape) >= 2]


def lines(table: Table) -> list[str]:
    """The table for people, largest row first."""
    rows = sorted(table.items(), key=lambda row: -sum(row[1].values()))
    width = max(len(role) for role in table) + 1
    return [
        f"{role + ':':<{width}} " + ", ".join(f"{format_bytes(size)} in {kind}" for kind, size in sorted(row.items()))
        for role, row in rows
    ]
