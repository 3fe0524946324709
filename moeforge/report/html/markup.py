"""HTML from values that may come from a stranger: every text is escaped here, and only here."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...errors import one_line
from ...options import format_bytes
from ...pipeline.describe import describe_value

LONGEST = 400
"""Characters of a value that are shown."""


class Markup(str):
    """Text that is HTML already. Everything else is escaped where it is put in."""


def text(value: object) -> Markup:
    """`value` as HTML text; what is Markup stays."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def tag(name: str, *inside: object, **attributes: object) -> Markup:
    """`<name attribute="...">inside</name>`. An underscore in an attribute's name is a dash (at its end: nothing); None leaves it out."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
                    for key, value in attributes.items() if value is not None)  # fmt: skip
    return Markup(f"<{name}{given}>{join(inside)}</{name}>")


def join(parts: Iterable[object]) -> Markup:
    return Markup("".join(text(part) for part in parts))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], caption: str, numbers: int = 1) -> Markup:
    """A table that scrolls in its own box.

    Args:
        caption: what it shows, read out and seen.
        numbers: the column from which on cells lean right.
    """

    def cell(name: str, at: int, value: object, **attributes: object) -> Markup:
        return tag(name, value, class_="number" if at >= numbers else None, **attributes)

    top = tag("thead", tag("tr", *(cell("th", at, name, scope="col") for at, name in enumerate(head))))
    body = [
        tag(
            "tr",
            *(
                cell("td" if at else "th", at, value, **({} if at else {"scope": "row"}))
                for at, value in enumerate(row)
            ),
        )
        for row in rows
    ]
    inside = tag("table", tag("caption", caption), top, tag("tbody", *body))
    return tag("div", inside, class_="scroll", tabindex="0", role="region", aria_label=caption)


def facts(rows: Mapping[str, object]) -> Markup:
    """Names and values; what is None is left out."""
    return tag("dl", *(join([tag("dt", name), tag("dd", value)]) for name, value in rows.items() if value is not None))


def fold(title: object, *inside: object) -> Markup:
    """What is there but not in the way."""
    return tag("details", tag("summary", title), *inside)


def missing(why: str, command: str | None = None) -> Markup:
    """A section that has no data: why, and what would make it."""
    return tag("p", why, *((" ", tag("code", command)) if command else ()), class_="missing")


def value(name: str, held: Any) -> str:
    """An option, a count or a verdict in words."""
    if held is None:
        return "unset"
    shown = one_line(describe_value(name, held))
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"


def number(held: float | None, digits: int = 3, none: str = "–") -> str:
    """For a table's cell."""
    return none if held is None else f"{held:.{digits}g}"


def data(name: str, held: Any) -> Markup:
    """What the script draws: JSON in the page. No `<` is left in it, so nothing in it can end the element."""
    body = json.dumps(held, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    escaped = body.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return tag("script", Markup(escaped), type="application/json", id=name)


__all__ = [
    "LONGEST",
    "Markup",
    "data",
    "facts",
    "fold",
    "format_bytes",
    "join",
    "missing",
    "number",
    "table",
    "tag",
    "text",
    "value",
]
