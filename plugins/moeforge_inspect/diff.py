"""`moeforge diff A B`: what differs between two checkpoints, in config, headers and values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.tensor import TensorInfo
from moeforge.errors import ExitCode
from moeforge.options import opt
from moeforge.pipeline.artifact import Artifact
from moeforge.pipeline.context import Context
from moeforge.pipeline.reading import Reading
from moeforge.pipeline.stage import Answer

from .values import row_runs, wide

CHUNK_BYTES = 32 << 20
"""A tensor is compared in runs of whole rows of about this size, so memory does not grow with it."""
SHOWN = 20


@dataclass(frozen=True)
class Options(Reading):
    values: bool = opt("compare the values of tensors, not only names, dtypes and shapes", default=True)
    config_only: bool = opt("compare only the config", default=False)
    tolerance: float = opt(
        "difference, relative to the largest value in A, that still counts as equal", default=0.0, min=0
    )
    all: bool = opt(f"print every difference instead of the first {SHOWN} of a kind", default=False)
    dequantize: bool = opt(
        "compare quantised weights by the values they stand for, not as they are stored", default=False
    )


class Diff:
    """Tensors are matched by name; a renamed one is gone from A and new in B."""

    name = "diff"
    summary = "compare two checkpoints: config, tensors, values (exit code 0: equal, 4: different)"
    examples = {
        "moeforge diff moe tuned": "what training changed, largest first",
        "moeforge diff a b --tolerance 1e-3": "differences up to a thousandth of the largest value pass",
    }
    api_version = 1
    consumes = frozenset({"checkpoint", "adapter", "gguf"})
    sources = 2
    Options = Options

    def answer(self, sources: list[Artifact], options: Options, ctx: Context) -> Answer:
        a, b = (
            open_checkpoint(src.ref, allow_pickle=options.allow_pickle, dequantize=options.dequantize or None)
            for src in sources
        )
        with a, b:
            data: dict[str, Any] = {"a": a.ref, "b": b.ref, "config": config_difference(a.config, b.config)}
            if not options.config_only:
                data["tensors"] = tensor_difference(a, b, options, ctx)
        different = any(data["config"].values()) or any(
            found for kind, found in data.get("tensors", {}).items() if kind not in ("equal", "within_tolerance")
        )
        lines = [
            f"A: {a.ref}",
            f"B: {b.ref}",
            *_config_lines(data["config"], options),
            *_tensor_lines(data.get("tensors"), options),
        ]
        lines.append(
            "different"
            if different
            else "equal"
            if options.values or options.config_only
            else "equal, values not compared"
        )
        return Answer({**data, "equal": not different}, "\n".join(lines), ExitCode.GATE if different else ExitCode.OK)


def config_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Keys with a dot between levels: `only_in_a`, `only_in_b` with their values, `changed` with both."""
    left, right = dict(_flat(a)), dict(_flat(b))
    return {
        "only_in_a": {key: value for key, value in left.items() if key not in right},
        "only_in_b": {key: value for key, value in right.items() if key not in left},
        "changed": {
            key: [value, right[key]] for key, value in left.items() if key in right and not _same(value, right[key])
        },
    }


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _same(a: Any, b: Any) -> bool:
    """JSON equality: 1 and 1.0 are one number, True is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def tensor_difference(a: Checkpoint, b: Checkpoint, options: Options, ctx: Context) -> dict[str, Any]:
    """By kind: `only_in_a`, `only_in_b`, `reshaped`, `changed` (a table each), `equal`, `within_tolerance` (counts)."""
    shared = [info for info in a.tensors.values() if info.name in b.tensors]
    result: dict[str, Any] = {
        "only_in_a": {info.name: _header(info) for info in a.tensors.values() if info.name not in b.tensors},
        "only_in_b": {info.name: _header(info) for info in b.tensors.values() if info.name not in a.tensors},
        "reshaped": {}, "changed": {}, "equal": 0, "within_tolerance": 0,
    }  # fmt: skip
    with ctx.bar(
        "comparing",
        sum(info.nbytes for info in shared) if options.values else len(shared),
        "B" if options.values else "tensors",
    ) as bar:
        for info in shared:
            other = b.tensors[info.name]
            if info.shape != other.shape:
                result["reshaped"][info.name] = [_header(info), _header(other)]
                bar.advance(info.nbytes if options.values else 1)
                continue
            change: dict[str, Any] = {} if info.dtype == other.dtype else {"dtype": [info.dtype, other.dtype]}
            measured = value_difference(a, b, info, bar.advance) if options.values else {}
            if not options.values:
                bar.advance(1)
            if change or measured.get("relative", 0.0) > options.tolerance:
                # JSON has no infinity
                result["changed"][info.name] = change | {
                    k: v if math.isfinite(v) else None for k, v in measured.items()
                }
            else:
                result["within_tolerance" if measured.get("changed") else "equal"] += 1
    return result


def _header(info: TensorInfo) -> list[Any]:
    return [info.dtype, list(info.shape)]


def value_difference(a: Checkpoint, b: Checkpoint, info: TensorInfo, advance: Any) -> dict[str, float]:
    """`max_abs` max|b - a|, `relative` max|b - a| / max|a|, `changed` share of elements that differ.

    A NaN or infinity that the other side lacks makes both infinite; NaN on both sides counts as equal.
    """
    largest = scale = 0.0
    changed = 0
    for rows in row_runs(info, CHUNK_BYTES):
        left, right = a.read(info.name, rows), b.read(info.name, rows)
        advance(left.nbytes)
        if left.dtype == right.dtype and np.array_equal(left.view(np.uint8), right.view(np.uint8)):
            scale = max(scale, _largest(left))
            continue
        x, y = wide(left), wide(right)
        differs = (left != right if left.dtype == right.dtype else x != y) & ~(np.isnan(x) & np.isnan(y))
        changed += int(differs.sum())
        with np.errstate(invalid="ignore"):
            gap = np.abs(y[differs] - x[differs])
        largest = max(largest, float(np.nan_to_num(gap, nan=math.inf).max(initial=0.0)))
        scale = max(scale, _largest(left))
    relative = largest / scale if scale else (0.0 if largest == 0 else math.inf)
    return {"max_abs": largest, "relative": relative, "changed": changed / info.size if info.size else 0.0}


def _largest(array: np.ndarray) -> float:
    """max|x| over the finite elements."""
    values = np.abs(wide(array))
    return float(values[np.isfinite(values)].max(initial=0.0))


def _config_lines(found: dict[str, dict[str, Any]], options: Options) -> Iterator[str]:
    yield from _listing("config keys only in A", [f"{k} = {v!r}" for k, v in found["only_in_a"].items()], options)
    yield from _listing("config keys only in B", [f"{k} = {v!r}" for k, v in found["only_in_b"].items()], options)
    yield from _listing(
        "config keys changed", [f"{k}: {v[0]!r} -> {v[1]!r}" for k, v in found["changed"].items()], options
    )


def _tensor_lines(found: dict[str, Any] | None, options: Options) -> Iterator[str]:
    if found is None:
        return
    for side in ("a", "b"):
        rows = [f"{name} {dtype} {shape}" for name, (dtype, shape) in found[f"only_in_{side}"].items()]
        yield from _listing(f"tensors only in {side.upper()}", rows, options)
    rows = [f"{name}: {old[0]} {old[1]} -> {new[0]} {new[1]}" for name, (old, new) in found["reshaped"].items()]
    yield from _listing("tensors of another shape", rows, options)
    worst = sorted(found["changed"].items(), key=lambda row: -_size(row[1]))
    yield from _listing(
        "tensors changed, largest difference first", [f"{name}: {_change(change)}" for name, change in worst], options
    )
    yield f"tensors equal: {found['equal']}" + (
        f", within the tolerance: {found['within_tolerance']}" if found["within_tolerance"] else ""
    )


def _change(change: dict[str, Any]) -> str:
    parts = [f"{change['dtype'][0]} -> {change['dtype'][1]}"] if "dtype" in change else []
    if "relative" in change:
        gap = (
            "not finite"
            if change["max_abs"] is None
            else f"max abs {change['max_abs']:.3g}, relative {_size(change):.3g}"
        )
        parts.append(f"{gap}, {change['changed']:.1%} of the elements")
    return ", ".join(parts)


def _size(change: dict[str, Any]) -> float:
    """The relative difference, infinite where there is no finite one."""
    relative = change.get("relative", 0.0)
    return math.inf if relative is None else relative


def _listing(title: str, rows: list[str], options: Options) -> Iterator[str]:
    if not rows:
        return
    yield f"{title}: {len(rows)}"
    shown = rows if options.all else rows[:SHOWN]
    yield from (f"  {row}" for row in shown)
    if len(rows) > len(shown):
        yield f"  ... and {len(rows) - len(shown)} more (--all shows them)"
