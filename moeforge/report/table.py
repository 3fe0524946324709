"""Aligned tables for terminals."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table: head, rule, rows; columns of numbers (by their first character) lean right.

    Raises:
        ValueError: a row is not as long as the head.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    columns = list(zip(head, *cells, strict=True)) if cells else [(name,) for name in head]
    widths = [max(map(len, column)) for column in columns]
    right = [
        bool(column[1:]) and all(cell[:1].isdigit() or cell in ("", "-") for cell in column[1:]) for column in columns
    ]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()

    return [line(list(head)), "  ".join("-" * width for width in widths), *map(line, cells)]
