"""Ways to cut the neurons of one FFN into equal parts.

Which neurons sit together never changes a sum over all parts, so for virtual groups every partition is exact; it matters
for what training and routing can make of the parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from moeforge.errors import UsageProblem

from .calibrate import SAMPLES
from .recipe import Layer, LayerStats

Kind = Literal["contiguous", "random", "kmeans", "activation", "coactivation"]

NEEDS: dict[str, frozenset[str]] = {
    "contiguous": frozenset(),
    "random": frozenset(),
    "kmeans": frozenset(),
    "activation": frozenset({"activation"}),
    "coactivation": frozenset({"activations"}),
}
"""Kind -> what calibration must measure first."""
assert set(NEEDS) == set(get_args(Kind))


def work_bytes(kind: str, model_width: int, ffn_width: int) -> int:
    """Bytes that :func:`partition` and the ranking of neurons hold beside the statistics, for one layer."""
    arrays = {"kmeans": 68 * model_width, "coactivation": 40 * SAMPLES}
    return ffn_width * max(arrays.get(kind, 0), 24 * model_width)


def partition(
    kind: str, layer: Layer, parts: int, *, neurons: np.ndarray | None = None, parent: int = 0
) -> list[np.ndarray]:
    """The neurons of a layer's FFN in `parts` sets of equal size, each ascending.

    - `contiguous`: as stored.
    - `random`: a shuffle keyed by seed and layer (LLaMA-MoE's best after training, 2406.16554).
    - `kmeans`: balanced k-means on the neurons' gate and up rows together.
    - `activation`: dealt out by activation rank, so that every part gets as many busy neurons.
    - `coactivation`: balanced k-means on which tokens neurons answer to.

    Args:
        neurons: only these are cut up (the rest is a shared expert's); default all.
        parent: whose weights and statistics.

    Raises:
        UsageProblem: an unknown kind, or a number of neurons that `parts` does not divide.
    """
    if kind not in NEEDS:
        raise UsageProblem(f"--partition {kind!r}: choose from {', '.join(NEEDS)}")
    pool = np.arange(layer.ffn_width) if neurons is None else np.sort(neurons)
    if parts < 1 or len(pool) % parts:
        raise UsageProblem(f"layer {layer.index}: {len(pool)} neurons do not divide into {parts} equal parts")
    rng = layer.rng("partition")
    if kind == "contiguous":
        labels = np.repeat(np.arange(parts), len(pool) // parts)
    elif kind == "random":
        labels = rng.permutation(np.repeat(np.arange(parts), len(pool) // parts))
    elif kind == "activation":
        labels = np.empty(len(pool), np.int64)
        labels[np.argsort(-importance(layer, parent)[pool], kind="stable")] = _dealt(len(pool), parts)
    else:
        points = _weights(layer, parent) if kind == "kmeans" else _answers(layer, parent)
        labels = balanced_kmeans(points[pool], parts, rng)
    return [pool[labels == part] for part in range(parts)]


def importance(layer: Layer, parent: int = 0) -> np.ndarray:
    """[F] float64: mean |activation| of every neuron times the length of what it writes (its column of down)."""
    activation = _stats(layer, parent).activation
    assert activation is not None
    return activation * np.linalg.norm(layer.read("down", parent).astype(np.float64), axis=0)


def _dealt(count: int, parts: int) -> np.ndarray:
    """0 1 2 2 1 0 0 1 2 ...: dealt there and back, so that no part gets the better neuron of every round."""
    rounds = np.arange(count) // parts
    place = np.arange(count) % parts
    return np.where(rounds % 2 == 0, place, parts - 1 - place)


def _stats(layer: Layer, parent: int) -> LayerStats:
    found = layer.stats[parent]
    assert found is not None, "stats as in NEEDS"
    return found


def _weights(layer: Layer, parent: int) -> np.ndarray:
    """[F, 2D], or [F, D] without a gate: what makes a neuron fire, each half at unit length."""
    return np.concatenate([_unit(layer.read(matrix, parent)) for matrix in layer.matrices[:-1]], axis=1)


def _answers(layer: Layer, parent: int) -> np.ndarray:
    """[F, N]: how strongly each neuron answers to each sampled token, at unit length."""
    activations = _stats(layer, parent).activations
    assert activations is not None
    return _unit(np.abs(activations.T))


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def balanced_kmeans(points: np.ndarray, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Labels [N] of k-means clusters that all have N / parts members."""
    return kmeans(points, parts, rng, balanced_assignment, rounds=10)[0]


def kmeans(
    points: np.ndarray,
    parts: int,
    rng: np.random.Generator,
    assign: Callable[[np.ndarray], np.ndarray] = lambda cost: cost.argmin(1),
    rounds: int = 30,
) -> tuple[np.ndarray, np.ndarray]:
    """Labels [N] and centres [parts, D]: Lloyd's alternation from k-means++ seeds, until the labels repeat.

    Args:
        points: [N, D].
        assign: from costs [N, parts] to labels; default the cheapest. A centre that nobody takes stays where it is.
    """
    points = points.astype(np.float64)
    centres = _seeds(points, parts, rng)
    labels = np.full(len(points), -1)
    for _ in range(rounds):
        # |p - c|^2 without |p|^2, which is the same for every centre
        new = assign((centres**2).sum(1) - 2 * points @ centres.T)
        if np.array_equal(new, labels):
            break
        labels = new
        for part in np.unique(labels):
            centres[part] = points[labels == part].mean(0)
    return labels, centres


def _seeds(points: np.ndarray, parts: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii, SODA 2007): each next centre is drawn with the squared distance to the others."""
    chosen = [int(rng.integers(len(points)))]
    distance = np.full(len(points), np.inf)
    while len(chosen) < parts:
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(1))
        total = distance.sum()
        chosen.append(int(rng.choice(len(points), p=distance / total if total > 0 else None)))
    return points[chosen].copy()


def balanced_assignment(cost: np.ndarray) -> np.ndarray:
    """Labels [N] of low total cost under which each of the P columns of `cost` [N, P] gets N / P rows.

    Every row first wants its cheapest column. A column that too many want keeps those that would lose most by their
    second choice, and closes; the others choose again among the open ones. At most P rounds of array operations: the exact
    assignment is cubic in N, and N is the width of an FFN.
    """
    count, parts = cost.shape
    if count % parts:
        raise ValueError(f"{count} rows do not divide among {parts} columns")
    capacity = count // parts
    labels = np.full(count, -1)
    waiting, columns = np.arange(count), np.arange(parts)
    while len(columns) > 1:
        here = cost[np.ix_(waiting, columns)]
        order = np.argsort(here, axis=1, kind="stable")[:, :2]
        best = order[:, 0]
        sizes = np.bincount(best, minlength=len(columns))
        # the fullest column closes; when none is over its capacity, all are exactly full
        column = int(sizes.argmax())
        wanting = np.flatnonzero(best == column)
        loss = here[wanting, order[wanting, 1]] - here[wanting, column]
        kept = wanting[np.argsort(-loss, kind="stable")[:capacity]]
        labels[waiting[kept]] = columns[column]
        waiting = np.delete(waiting, kept)
        columns = np.delete(columns, column)
    labels[waiting] = columns[0]
    return labels
