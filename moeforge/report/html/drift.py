"""How far the weights went from the parent's, and the experts from each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .heat import Map, Scale, beside, extremes, heat_map, top, within
from .markup import Markup, fold, join, number, table, tag
from .training import CELLS

NAMES = 40
"""Tensors without a counterpart that are named."""


def drift_section(found: Mapping[str, Any]) -> Markup:
    """||b - a|| / ||a|| of layers, kinds of tensors and experts."""
    rows = [str(layer) for layer in found["layers"]]
    roles = list(found["roles"])
    by_role = [list(values) for values in zip(*found["roles"].values(), strict=True)]
    maps = [Map("kinds of tensors", rows, by_role, roles, top([by_role]) or 1.0)]
    if any(found["experts"]):
        maps.insert(0, Map("experts", rows, found["experts"], high=top([found["experts"]]) or 1.0))
    scale = Scale("relative distance from the parent", 1.0)
    parts: list[object] = [_about(found)]
    if rows:
        caption = ("The distance of all weights of a place from the parent's, over the length of the parent's: ‖b − a‖ / ‖a‖. "
                   "0 is untouched; 1 is as far as the parent is from zero.")  # fmt: skip
        picture = heat_map("drift-map", maps, scale, row="layer", column="expert", choice="of", caption=caption)
        cells = [
            (row, *(number(found["roles"][role][at]) for role in roles), _range(found["experts"][at]))
            for at, row in enumerate(rows)
        ]
        parts.append(
            beside(
                picture, table(("layer", *roles, "single experts"), cells, "Relative distance from the parent"), maps
            )
        )
    if found["outside"]:
        outside = [(role, number(value)) for role, value in found["outside"].items()]
        parts.append(table(("outside the layers", "distance"), outside, "Relative distance outside the layers"))
    if found["without"]:
        named = tag("ul", *(tag("li", tag("code", name)) for name in found["without"][:NAMES]))
        more = len(found["without"]) - NAMES
        title = f"{len(found['without'])} tensors have no counterpart in the parent (new, or of another shape) and are not counted"
        parts.append(fold(title, named, tag("p", f"… and {more} more") if more > 0 else ""))
    return join(parts)


def _about(found: Mapping[str, Any]) -> Markup:
    changed = "" if found["same"] is not False else " It is not the recorded parent any more: it changed since."
    return tag(
        "p", f"{found['compared']} tensors were compared with those of ", tag("code", found["parent"]), ".", changed
    )


def _range(row: Any) -> str:
    at = extremes(row)
    return "–" if at is None else f"{number(row[at[1]])} to {number(row[at[0]])}"


def apart_section(found: Mapping[str, Any]) -> Markup:
    """How different the experts of a layer are."""
    rows = [str(layer) for layer in found["layers"]]
    maps = [Map("each expert from the others, mean", rows, found["mean"])]
    for row, matrix in zip(rows, found["pairs"] or (), strict=False):
        maps.append(Map(f"layer {row}: expert by expert", [str(e) for e in range(len(matrix))], matrix))
    shown = list(within(maps, CELLS))
    caption = ("Distance of two experts' stored tensors over their mean length, ‖a − b‖ / √((‖a‖² + ‖b‖²) / 2): 0 is equal, "
               "about 1.41 is unrelated.")  # fmt: skip
    scale = Scale("distance between experts", top(one.values for one in shown) or 1.0)
    cells = []
    for row, means, near in zip(rows, found["mean"], found["nearest"], strict=True):
        known = [value for value in means if value is not None]
        pair = "–" if near is None else f"{number(near[0])} ({near[2]} and {near[1]})"
        cells.append((row, number(sum(known) / len(known) if known else None), pair))
    picture = heat_map("apart-map", shown, scale, row="layer", column="expert", choice="show", caption=caption)
    return beside(
        picture,
        table(("layer", "mean distance", "nearest two"), cells, "Distance between the experts of a layer"),
        shown,
    )
