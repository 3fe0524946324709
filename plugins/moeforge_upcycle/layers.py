"""Which layers become sparse, and which sets of sparse layers a target can express."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from moeforge.errors import UsageProblem


def select(spec: str, count: int) -> tuple[int, ...]:
    """The layers named by `spec` of a model with `count` layers, ascending.

    `all`; `every:N` (layers N-1, 2N-1, ...: the last of each N); `last-half`; `first:N`; or a list `0,3,5-7`.

    Raises:
        UsageProblem: not understood, empty, or outside 0 .. count - 1.
    """
    kind, _, number = spec.strip().partition(":")
    try:
        if kind == "all" and not number:
            chosen = range(count)
        elif kind == "every":
            chosen = range(int(number) - 1, count, int(number))
        elif kind == "last-half" and not number:
            chosen = range(count // 2, count)
        elif kind == "first":
            chosen = range(min(int(number), count))
        else:
            chosen = [layer for part in spec.split(",") for layer in _span(part)]
    except ValueError:
        raise UsageProblem(f"--layers {spec!r} is not understood; "
                           "write all, every:N, last-half, first:N, or a list such as 0,3,5-7") from None  # fmt: skip
    layers = tuple(sorted(set(chosen)))
    if not layers or layers[0] < 0 or layers[-1] >= count:
        raise UsageProblem(f"--layers {spec!r} names layers {list(layers)}, the model has layers 0 to {count - 1}")
    return layers


def _span(text: str) -> range:
    first, dash, last = text.strip().partition("-")
    return range(int(first), int(last if dash else first) + 1)


def why_not(kind: str, layers: Sequence[int], count: int) -> str | None:
    """Why a target whose sparse layers are of `kind` cannot have exactly `layers` sparse; None when it can.

    Kinds: `all` (every layer), `any`, `suffix` (dense layers first), `interval` (start, end and every n-th).
    """
    if kind == "any" or len(layers) == count:
        return None
    if kind == "suffix":
        return None if layers[-1] == count - 1 and _regular(layers) == 1 else "its dense layers can only come first"
    if kind == "interval":
        step = _regular(layers)
        if step is not None and (layers[0] + 1) % step == 0:
            return None
        return "its sparse layers must be every n-th layer, counted from the first layer"
    return "all of its layers are sparse"


def settings(layers: Sequence[int], count: int) -> dict[str, Any]:
    """What the config templates may say about the sparse layers."""
    sparse = set(layers)
    return {
        "dense_layers": [layer for layer in range(count) if layer not in sparse],
        "first_sparse": layers[0],
        "last_sparse": layers[-1],
        "interval": _regular(layers) or 1,
        "last_is_dense": layers[-1] < count - 1,
        "mlp_layer_types": ["sparse" if layer in sparse else "dense" for layer in range(count)],
    }


def _regular(layers: Sequence[int]) -> int | None:
    """The one distance between neighbours, 1 for a single layer, None when they differ."""
    steps = {b - a for a, b in itertools.pairwise(layers)} or {1}
    return steps.pop() if len(steps) == 1 else None
