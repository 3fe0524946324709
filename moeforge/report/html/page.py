"""The page: sections in order, each with its data or with what would make it; one style, one script, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import PurePath
from typing import Any

from ...pipeline.place import PAGE
from .drift import apart_section, drift_section
from .lineage import lineage_section
from .markup import Markup, facts, format_bytes, join, missing, tag, text
from .sizes import active, sizes_section
from .tokens import tokens_section
from .training import eval_section, load_section, loss_section, specialisation_section

Numbers = Mapping[str, Any]
SECTIONS: dict[str, tuple[str, Callable[[Numbers], Markup]]] = {
    "lineage": ("Lineage", lineage_section),
    "sizes": ("Sizes", lambda numbers: sizes_section(numbers["sizes"])),
    "training": ("Loss", lambda numbers: loss_section(numbers["training"])),
    "eval": ("Evaluation", lambda numbers: eval_section(numbers["eval"])),
    "load": ("Expert load", lambda numbers: load_section(numbers["training"], numbers["eval"], numbers["tokens"])),
    "specialisation": ("Specialisation", lambda numbers: specialisation_section(numbers["specialisation"])),
    "tokens": ("Text routing", lambda numbers: tokens_section(numbers["tokens"])),
    "drift": ("Drift", lambda numbers: drift_section(numbers["drift"])),
    "apart": ("Experts apart", lambda numbers: apart_section(numbers["apart"])),
}
"""Name (of the anchor, and in `missing`) -> title, and what makes its body."""


def page(numbers: Numbers) -> str:
    """The whole file.

    Args:
        numbers: what `moeforge report --json` says: `ref`, `kind`, `digest`, `moeforge` (the version that writes it); one entry a section, None or left out where it has no data;
            `missing`, section -> {why, command}.
    """
    style, script = _asset("page.css"), _asset("page.js")
    # only this very script may run, whatever else found its way into the page
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    name = PurePath(str(numbers["ref"])).name or str(numbers["ref"])
    sections = {key: title for key, (title, _) in SECTIONS.items()}
    head = join([
        tag("title", f"{name} · moeforge report"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        tag("style", Markup(style)),
    ])  # fmt: skip
    body = join([
        tag("a", "Skip to the content", href="#content", class_="skip"),
        tag("header", tag("h1", name), tag("p", _opening(numbers)), facts(_tiles(numbers)), class_="top"),
        tag("nav", tag("ul", *(tag("li", tag("a", title, href=f"#{key}")) for key, title in sections.items())), aria_label="Sections"),
        tag("main", *(_section(key, numbers) for key in SECTIONS), id="content"),
        tag("footer", tag("p", f"Written by moeforge {numbers['moeforge']}; every number is in ", tag("code", "moeforge report --json"), ".")),
        tag("noscript", tag("p", "Heat maps and routing are drawn by the script in this page; without it the tables hold their numbers.")),
        tag("script", Markup(script)),
    ])  # fmt: skip
    return f"{PAGE.decode()}{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n"


def _asset(name: str) -> str:
    return resources.files("moeforge.report.html").joinpath(name).read_text("utf-8")


def _section(key: str, numbers: Numbers) -> Markup:
    title, body = SECTIONS[key]
    absent = numbers["missing"].get(key)
    inside = body(numbers) if absent is None else missing(text(absent["why"]), absent.get("command"))
    return tag("section", tag("h2", title, id=f"{key}-title"), inside, id=key, aria_labelledby=f"{key}-title")


def _opening(numbers: Numbers) -> str:
    steps, step = [], numbers["lineage"]
    while step is not None:
        steps.append(
            " ".join(filter(None, (step.get("verb"), step.get("method")))) or PurePath(str(step.get("ref", ""))).name
        )
        step = next(iter(step.get("parents") or ()), None)
    made = " → ".join(reversed(steps))
    return f"{str(numbers['kind']).capitalize()}" + (f", made by {made}." if made else f" at {numbers['ref']}.")


def _tiles(numbers: Numbers) -> dict[str, object]:
    """What one wants to know first."""
    sizes, training, files = numbers["sizes"], numbers["training"], numbers["files"]
    found: dict[str, object] = {}
    if sizes is not None:
        found["parameters"] = active(sizes).rstrip(".").replace(" parameters", "", 1)
        found["architecture"] = ", ".join(sizes["architectures"]) or sizes["model_type"]
        found["weights"] = format_bytes(sum(sizes["bytes_by_dtype"].values()))
    if files:
        found["on disk"] = f"{format_bytes(sum(files.values()))} in {len(files)} files"
    if training is not None and training["held_out"]:
        first, last = training["held_out"][0], training["held_out"][-1]
        found["held-out loss"] = f"{first[1]:.3f} → {last[1]:.3f} nats a token"
    if numbers["digest"]:
        found["digest"] = tag("code", str(numbers["digest"]))
    return found
