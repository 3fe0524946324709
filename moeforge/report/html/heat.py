"""Heat maps: what the script needs to draw one on a canvas, and the element that it draws into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ...checkpoint.roles import place_of
from .markup import Markup, data, join, tag

Row = Sequence[float | None]
NARROW = 10
"""Columns of a map that leave room for a table at its side."""


@dataclass(frozen=True)
class Scale:
    """How values become colours.

    Attributes:
        kind: `plain` runs from `low` to `high`; `even` from 0 over 1, which is neither here nor there, to high; `ratio` is logarithmic
            around 1, from 1 / high to high.
        label: what is measured, with its unit.
        unit: behind a value.
        clipped: whether there are values above `high`.
    """

    label: str
    high: float
    low: float = 0.0
    kind: Literal["plain", "even", "ratio"] = "plain"
    unit: str = ""
    clipped: bool = False


@dataclass(frozen=True)
class Map:
    """One table of values; rows may be of different lengths, None is a cell without a value."""

    title: str
    rows: Sequence[str]
    values: Sequence[Row]
    columns: Sequence[str] | None = None
    """Names; None: numbers from 0."""
    high: float | None = None
    """The end of its own scale; None: that of the figure."""

    def as_json(self) -> dict[str, Any]:
        values = [[None if value is None else _short(value) for value in row] for row in self.values]
        return {"title": self.title, "rows": list(self.rows), "values": values, "high": self.high,
                "columns": self.columns and list(self.columns)}  # fmt: skip

    @property
    def cells(self) -> int:
        return sum(map(len, self.values))


def _short(value: float) -> float:
    """Three digits are more than a colour shows."""
    return float(f"{value:.3g}")


def heat_map(
    name: str, maps: Sequence[Map], scale: Scale, *, row: str, column: str, choice: str, caption: str
) -> Markup:
    """A figure; the reader chooses among the maps.

    Args:
        name: of the element, unique in the page.
        row, column: what one is: `layer`, `expert`.
        choice: what the maps differ in.
        caption: what is seen.
    """
    spec = {
        "maps": [one.as_json() for one in maps],
        "scale": asdict(scale),
        "row": row,
        "column": column,
        "choice": choice,
    }
    figure = tag("figure", tag("figcaption", caption), class_="heat", id=name, data_from=f"{name}-data")
    return join([figure, data(f"{name}-data", spec)])


def beside(picture: Markup, numbers: Markup, maps: Sequence[Map]) -> Markup:
    """A picture with its table at its side, where the picture is narrow and the window is not."""
    narrow = max((len(row) for one in maps for row in one.values), default=0) <= NARROW
    return tag("div", picture, numbers, class_="beside" if narrow else None)


def within(maps: Iterable[Map], cells: int) -> Iterator[Map]:
    """The first maps that have no more than so many cells together, the very first whatever its size."""
    left = cells
    for at, one in enumerate(maps):
        left -= one.cells
        if at and left < 0:
            return
        yield one


def top(tables: Iterable[Sequence[Row]]) -> float:
    """The largest value; 0 where there is none."""
    return max((value for rows in tables for row in rows for value in row if value is not None), default=0.0)


def site_labels(sites: Sequence[str]) -> list[str]:
    """Short names of mixtures: the layer's number, with what stands below it where a layer has several; the name itself where it has no
    number."""
    layers = [place_of(f"{site}.")[0] for site in sites]
    numbered = [layer for layer in layers if layer is not None]
    several = len(set(numbered)) < len(numbered)
    found = []
    for site, layer in zip(sites, layers, strict=True):
        if layer is None:
            found.append(site)
        else:
            found.append(f"{layer} {site.partition(f'.{layer}.')[2]}" if several else str(layer))
    return found


def extremes(row: Row) -> tuple[int, int] | None:
    """Where the largest and the smallest value of a row stand."""
    known: Mapping[int, float] = {at: value for at, value in enumerate(row) if value is not None}
    return (max(known, key=lambda at: known[at]), min(known, key=lambda at: known[at])) if known else None
