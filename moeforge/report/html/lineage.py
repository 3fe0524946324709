"""How an artifact came to be: a list of steps, newest first, each with what it was made from inside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from .markup import Markup, facts, fold, join, tag, value

HIDDEN = ("bytes_by_role",)
"""Counts that another section shows."""
MEASURED = "measured: "
"""Verdicts behind the verdict."""
LONG = 8
"""Elements of a list that are told one by one."""


def lineage_section(numbers: Mapping[str, Any]) -> Markup:
    """The chain, then what is known of the newest run alone."""
    step = numbers["lineage"]
    parts = [tag("ol", _step(step), class_="lineage")] if step is not None else []
    if numbers.get("files_present") is not None:
        told = (
            "all there, of the recorded sizes"
            if numbers["files_present"]
            else "missing, or of other sizes than recorded"
        )
        run = {"created": numbers.get("created"), "files": f"{len(numbers['files'])}, {told}",
               "versions": _told(numbers.get("versions")), "timings": _told(numbers.get("timings"))}  # fmt: skip
        parts.append(join([tag("h3", "This run"), facts(run)]))
    if numbers.get("warnings"):
        parts.append(join([tag("h3", "Warnings"), tag("ul", *(tag("li", str(text)) for text in numbers["warnings"]))]))
    return join(parts)


def _told(held: Any) -> str | None:
    return ", ".join(f"{name.replace('_', ' ')} {value(name, inner)}" for name, inner in held.items()) if held else None


def _step(step: Mapping[str, Any]) -> Markup:
    parents = step.get("parents") or ()
    inside = tag("ol", *(_step(parent) for parent in parents)) if parents else ""
    if "verb" not in step:
        return tag(
            "li",
            tag("h3", "teacher: " if step.get("role") == "teacher" else "source: ", _name(step)),
            _source(step),
            inside,
        )
    title = tag("h3", step["verb"], *((" ", tag("em", step["method"])) if step.get("method") else ()))
    taken = {**(step.get("options") or {}), **(step.get("method_options") or {})}
    changed = step.get("chosen", taken)
    about = facts(
        {"output": step.get("ref"), "method's origin": step.get("reference"), "digest": _digest(step.get("digest"))}
    )
    parts: list[object] = [title, about]
    if changed:
        parts += [tag("h4", "Options that were chosen"), _table(changed)]
    if verdicts := dict(flat(step.get("verdicts") or {})):
        measured = {name: held for name, held in verdicts.items() if name.startswith(MEASURED)}
        parts += [tag("h4", "Promised and verified"), _table({k: v for k, v in verdicts.items() if k not in measured})]
        parts += [fold("what was measured for it", _table(measured))] if measured else []
    if counts := {name: held for name, held in flat(step.get("counts") or {}) if not name.startswith(HIDDEN)}:
        parts.append(fold("what was counted", _table(counts)))
    if rest := {name: held for name, held in taken.items() if name not in changed}:
        parts.append(fold("options at their defaults", _table(rest)))
    return tag("li", tag("div", *parts, class_="card"), inside)


def _table(held: Mapping[str, Any]) -> Markup:
    return facts({name.replace("_", " "): value(name.rpartition(": ")[2], inner) for name, inner in held.items()})


def _source(step: Mapping[str, Any]) -> Markup:
    base = step.get("base") or {}
    return tag("div", facts({
        "place": step.get("ref"), "format": step.get("format"), "stored as": value("", step["stored"]) if step.get("stored") else None,
        "revision": step.get("revision"), "licence": step.get("license") or "unknown", "digest": _digest(step.get("digest")),
        "its base": base.get("ref") if isinstance(base, Mapping) else None,
    }), class_="card")  # fmt: skip


def _name(step: Mapping[str, Any]) -> str:
    return PurePath(str(step.get("ref", "unknown"))).name or str(step.get("ref"))


def _digest(digest: object) -> Markup | None:
    return None if digest is None else tag("code", digest)


def flat(held: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Tables within tables as `outer: inner`; of a list of tables only how many there are."""
    for name, inner in held.items():
        if isinstance(inner, Mapping):
            yield from flat(inner, f"{prefix}{name}: ")
        elif isinstance(inner, list) and (len(inner) > LONG or any(isinstance(one, list | Mapping) for one in inner)):
            yield f"{prefix}{name}", f"{len(inner)} entries"
        else:
            yield f"{prefix}{name}", inner
