"""Plans and outcomes in words, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import printable
from ..options import format_bytes
from .artifact import Plan

if TYPE_CHECKING:
    from .run import Outcome

FILES_SHOWN = 20
"""Files that a plan lists for people; the plan itself has them all."""


def describe_value(name: str, value: Any) -> str:
    """A fact's value: `*_bytes` and `bytes_*` as sizes, `parameters*` with millions, nested tables flat."""
    if isinstance(value, Mapping):
        unit = name if _is_bytes(name) else ""
        return ", ".join(f"{key} {describe_value(unit or str(key), inner)}" for key, inner in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_bytes(name) and isinstance(value, int | float):
        return format_bytes(value)
    if name.startswith("parameters") and isinstance(value, int):
        return f"{value / 1e9:.3g} B" if value >= 1e9 else f"{value / 1e6:.4g} M"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _is_bytes(name: str) -> bool:
    return name.endswith("_bytes") or name.startswith("bytes_")


def rows(table: Mapping[str, Any]) -> list[str]:
    """`name: value` lines, aligned, underscores as spaces."""
    width = max((len(name) for name in table), default=0) + 1
    return [f"  {name.replace('_', ' ') + ':':<{width}} {describe_value(name, value)}" for name, value in table.items()]


def describe_files(sizes: Mapping[str, int]) -> list[str]:
    """One line a file (name -> bytes), the largest first."""
    ranked = sorted(sizes.items(), key=lambda row: (-row[1], row[0]))
    lines = [f"    {format_bytes(size):>8}  {name}" for name, size in ranked[:FILES_SHOWN]]
    if rest := ranked[FILES_SHOWN:]:
        lines.append(f"    {format_bytes(sum(size for _, size in rest)):>8}  in {len(rest)} more")
    return lines


def describe_plan(plan: Plan) -> list[str]:
    """The human form of `--dry-run`."""
    files = plan.facts.get("files")
    listed = isinstance(files, Mapping)  # some plans only count them
    told = {name: value for name, value in plan.facts.items() if name != "files" or not listed}
    lines = [f"plan: {plan.summary}", *rows(told)]
    if listed:
        lines += ["  files:", *describe_files(files)]
    if plan.tensors:
        lines += rows({"tensors": len(plan.tensors)})
    if plan.verdicts:
        lines += ["promises:", *rows(plan.verdicts)]
    return [printable(line) for line in lines]


def describe_outcome(outcome: Outcome) -> list[str]:
    """First the one line for stdout, then what is worth knowing about the run."""
    artifact, manifest = outcome.artifact, outcome.manifest
    first = f"{artifact.kind} {artifact.path or artifact.ref}"
    if outcome.reused:
        done = [first, f"already done: {artifact.path} was written by the same command; nothing to do"]
        verdicts = manifest.get("verdicts") or {}
        if verdicts.get("verified") is False:
            # what changes the function on purpose has no proof that `verify` could make up for
            how = (
                f"`moeforge verify {artifact.path}` proves it"
                if verdicts.get("exact")
                else "--verify --force measures it"
            )
            why = verdicts.get("why_not_verified", "no reason is recorded")
            done.append(printable(f"warning: it was never verified ({why}); {how}"))
        return done
    lines = [first, *outcome.notes]
    timings, files = manifest.get("timings"), manifest.get("files")
    if timings and files:
        size = sum(info["bytes"] for info in files.values())
        lines.append(f"wrote {format_bytes(size)} to {artifact.path} in {timings['seconds']:.1f} s, "
                     f"peak memory {format_bytes(timings['peak_rss_bytes'])}")  # fmt: skip
    return lines
