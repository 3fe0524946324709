"""Where parameters and bytes are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...checkpoint.anatomy import Mixture
from ...pipeline.describe import describe_value
from .markup import Markup, format_bytes, join, table, tag


def sizes_section(sizes: Mapping[str, Any]) -> Markup:
    """Parameters by kind of tensor, bytes by kind and by precision, and the mixtures.

    Args:
        sizes: `Anatomy.as_json()`.
    """
    parameters, held = sizes["parameters_by_role"], sizes["bytes_by_role"]
    whole, largest = sum(held.values()), max(held.values(), default=0)
    rows: list[tuple[object, ...]] = [(role, count(parameters[role]), f"{share(parameters[role], sizes['parameters_total']):.1%}", format_bytes(size), bar(size, largest))
            for role, size in sorted(held.items(), key=lambda row: -row[1])]  # fmt: skip
    rows.append(("in all", count(sizes["parameters_total"]), "", format_bytes(whole), ""))
    kinds = sizes["bytes_by_dtype"]
    precisions = [(kind, format_bytes(size), f"{share(size, whole):.1%}", bar(size, max(kinds.values()))) for kind, size in
                  sorted(kinds.items(), key=lambda row: -row[1])]  # fmt: skip
    mixtures = [Mixture(**{**one, "layers": tuple(one["layers"])}).describe() for one in sizes["mixtures"]]
    return join([
        tag("p", active(sizes)),
        tag("ul", *(tag("li", text) for text in mixtures)) if mixtures else "",
        table(("kind of tensor", "parameters", "share", "stored in", ""), rows, "By kind of tensor"),
        table(("stored as", "bytes", "share", ""), precisions, "By precision"),
    ])  # fmt: skip


def active(sizes: Mapping[str, Any]) -> str:
    """Total and active parameters in a sentence."""
    total, used = sizes["parameters_total"], sizes["parameters_active"]
    if used is None:
        return f"{count(total)} parameters; how many of them one token visits, the config does not say."
    if used == total:
        return f"{count(total)} parameters, all of which every token visits."
    return f"{count(total)} parameters, of which one token visits {count(used)} ({share(used, total):.1%})."


def count(parameters: int) -> str:
    return describe_value("parameters", parameters)


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def bar(size: float, largest: float) -> Markup:
    """A length beside its number."""
    return tag("div", class_="bar", style=f"width:{100 * share(size, largest):.1f}%", aria_hidden="true")
