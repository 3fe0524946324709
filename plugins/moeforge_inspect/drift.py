"""How far weights went: every layer and expert from the parent's, and the experts of a layer from each other. Streamed, in numpy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.expert_adapter import ExpertAdapter
from moeforge.checkpoint.expert_names import dense_name
from moeforge.checkpoint.roles import place_of, role_of
from moeforge.checkpoint.tensor import FLOATS, TensorInfo
from moeforge.pipeline.context import Context

from .values import row_runs, wide

CHUNK_BYTES = 8 << 20
"""Of one tensor at once."""
BLOCK_BYTES = 256 << 20
"""Of one piece of all experts of a layer, in float32."""
DENSE = {
    "block_sparse_moe.w1.": "mlp.gate_proj.",
    "block_sparse_moe.w2.": "mlp.down_proj.",
    "block_sparse_moe.w3.": "mlp.up_proj.",
}
"""Mixtral's words for what the dense families around it call otherwise."""

Place = tuple[int, int]
"""(layer, experts there)."""


def tensors_of(checkpoint: Checkpoint) -> Mapping[str, TensorInfo]:
    """What is the artifact's own: of an adapter of LoRA experts not its base."""
    found = checkpoint.tensors
    if isinstance(checkpoint, ExpertAdapter):
        found = {name: found[name] for name in found if name in checkpoint.own}
    return {name: info for name, info in found.items() if info.dtype in FLOATS}


def counterpart(info: TensorInfo, parent: Mapping[str, TensorInfo]) -> str | None:
    """The parent's tensor that this one came from: of its name, or for an expert the dense tensor that it replaced; None where there is
    none of that shape."""
    dense, _ = dense_name(info.name)
    names = [info.name, dense, *(dense.replace(ours, theirs) for ours, theirs in DENSE.items() if ours in dense)]
    return next((name for name in names if name in parent and parent[name].shape == info.shape), None)


@dataclass
class Sums:
    """Of squares: of the difference and of the parent's values."""

    apart: float = 0.0
    whole: float = 0.0

    def add(self, apart: float, whole: float) -> None:
        self.apart, self.whole = self.apart + apart, self.whole + whole

    @property
    def relative(self) -> float | None:
        """||b - a|| / ||a||; None where that is no number: the parent holds only zeros, or infinities and NaN came up."""
        ratio = math.sqrt(self.apart / self.whole) if self.whole > 0 else 0.0 if self.apart == 0 else math.inf
        return ratio if math.isfinite(ratio) else None


def from_parent(child: Checkpoint, parent: Checkpoint, ctx: Context) -> dict[str, Any]:
    """||child - parent|| / ||parent|| over all tensors of a place.

    Returns:
        `layers` [L] numbers; `roles` role -> [L]; `experts` [L][E] (empty rows where a layer has none); `outside` role -> number, of what
        is in no layer; `compared` and `without` (names of tensors that have no counterpart).
    """
    mine, theirs = tensors_of(child), tensors_of(parent)
    pairs = {name: counterpart(info, theirs) for name, info in mine.items()}
    sums: dict[tuple[int | None, str], Sums] = defaultdict(Sums)
    experts: dict[tuple[int, int], Sums] = defaultdict(Sums)
    with ctx.bar("comparing", sum(mine[name].nbytes for name, other in pairs.items() if other), "B") as bar:
        for name, other in pairs.items():
            if other is None:
                continue
            info, (layer, expert) = mine[name], place_of(name)
            role = role_of(info)
            stacked = layer is not None and role == "experts" and expert is None and len(info.shape) == 3
            for rows in row_runs(info, CHUNK_BYTES):
                a, b = wide(parent.read(other, rows)), wide(child.read(name, rows))
                bar.advance(info.nbytes * len(b) / info.shape[0] if info.shape else info.nbytes)
                with np.errstate(invalid="ignore", over="ignore"):
                    apart, whole = _squares(b - a), _squares(a)
                sums[layer, role].add(float(apart.sum()), float(whole.sum()))
                if layer is not None and expert is not None:
                    experts[layer, expert].add(float(apart.sum()), float(whole.sum()))
                elif layer is not None and stacked:
                    first = rows.start if rows is not None else 0
                    for row, values in enumerate(zip(apart, whole, strict=True), first):
                        experts[layer, row].add(*map(float, values))
    layers = sorted({layer for layer, _ in sums if layer is not None})
    roles = sorted({role for layer, role in sums if layer is not None})
    most = {layer: max((e + 1 for at, e in experts if at == layer), default=0) for layer in layers}
    return {
        "layers": layers,
        "roles": {role: [_relative(sums.get((layer, role))) for layer in layers] for role in roles},
        "experts": [[_relative(experts.get((layer, e))) for e in range(most[layer])] for layer in layers],
        "outside": {role: found.relative for (layer, role), found in sums.items() if layer is None},
        "compared": sum(other is not None for other in pairs.values()),
        "without": [name for name, other in pairs.items() if other is None],
    }


def _relative(sums: Sums | None) -> float | None:
    return None if sums is None else sums.relative


def _squares(values: np.ndarray) -> np.ndarray:
    """[rows] of a [rows, ...] array, [1] of a scalar: sums of squares, in float64 over rows."""
    flat = values.reshape(len(values), -1) if values.ndim else values.reshape(1, 1)
    return np.einsum("ij,ij->i", flat, flat).astype(np.float64)


def between_experts(checkpoint: Checkpoint, ctx: Context) -> dict[str, Any] | None:
    """How far the experts of each layer are from each other: ||a - b|| over the root mean square of ||a|| and ||b||, all their stored
    tensors together. 0: equal; about 1.41: unrelated.

    Returns:
        `layers` [L] numbers, `pairs` [L][E][E], `mean` [L][E] (to the others of its layer); None where no layer has two experts.
    """
    tensors = tensors_of(checkpoint)
    places = _expert_tensors(tensors)
    gathered: dict[Place, tuple[np.ndarray, np.ndarray]] = {}
    names = {name for groups in places.values() for group in groups for name in group}
    with ctx.bar("comparing experts", sum(tensors[name].nbytes for name in names), "B") as bar:
        for place, groups in sorted(places.items()):
            gram, norms = np.zeros((place[1], place[1])), np.zeros(place[1])
            for group in groups:
                for block in _blocks(checkpoint, tensors, group, place[1], bar.advance):
                    norms += _squares(block)
                    # around the mean expert: what nearly equal experts differ by would drown in what they share
                    block = block - block.mean(0)
                    gram += block @ block.T
            gathered[place] = gram, norms
    if not gathered:
        return None
    pairs = [_distances(gram, norms) for gram, norms in gathered.values()]
    means = [matrix.sum(1) / (len(matrix) - 1) for matrix in pairs]
    return {
        "layers": [layer for layer, _ in gathered],
        "pairs": [[[_finite(value) for value in row] for row in matrix] for matrix in pairs],
        "mean": [[_finite(value) for value in row] for row in means],
    }


def _finite(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None


def _distances(gram: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """[E, E], the diagonal exactly 0."""
    own = np.diag(gram)
    squared = np.maximum(own[:, None] + own - 2 * gram, 0)
    scale = (norms[:, None] + norms) / 2
    found = np.sqrt(squared / np.where(scale > 0, scale, 1))
    np.fill_diagonal(found, 0)
    return found


def _expert_tensors(tensors: Mapping[str, TensorInfo]) -> dict[Place, list[tuple[str, ...]]]:
    """(layer, E) -> what its experts consist of: the tensor of each expert in order, or the one that stacks them all."""
    families: dict[tuple[int, str], dict[int, str]] = defaultdict(dict)
    found: dict[Place, list[tuple[str, ...]]] = defaultdict(list)
    for name, info in tensors.items():
        layer, expert = place_of(name)
        if layer is None or role_of(info) not in ("experts", "norms and biases"):
            continue
        if expert is not None:
            families[layer, name.replace(f"experts.{expert}.", "experts.*.")][expert] = name
        elif len(info.shape) == 3 and info.shape[0] > 1:
            found[layer, info.shape[0]].append((name,))
    for (layer, _), members in families.items():
        shapes = {tensors[name].shape for name in members.values()}
        if len(members) > 1 and len(shapes) == 1 and sorted(members) == list(range(len(members))):
            found[layer, len(members)].append(tuple(members[expert] for expert in sorted(members)))
    return found


def _blocks(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], group: tuple[str, ...], experts: int,
            advance: Callable[[float], Any]) -> Iterator[np.ndarray]:  # fmt: skip
    """[E, n] pieces of the experts' tensors side by side."""
    stack, info = group[0], tensors[group[0]]
    if len(group) > 1:
        for rows in row_runs(info, BLOCK_BYTES // (2 * experts)):
            block = np.stack([wide(checkpoint.read(name, rows)).ravel() for name in group])
            advance(experts * info.nbytes * block.shape[1] / max(info.size, 1))
            yield block
        return
    size = info.size // experts
    step = max(1, BLOCK_BYTES // (4 * experts))
    for start in range(0, size, step):  # the file holds expert after expert: each is read again for every piece
        block = [
            wide(checkpoint.read(stack, slice(e, e + 1)).reshape(-1)[start : start + step]) for e in range(experts)
        ]
        advance(info.nbytes * len(block[0]) / size)
        yield np.stack(block)
