"""How the rows of a router start: at random, or from what its tokens look like.

A router row w answers to a token x with the logit w.x, where x is the input of the feed-forward block. With R rows (one for
each expert, or for each virtual group) and D the model width, every kind here makes rows [R, D] float32.

Kinds made from data (spec: BTX routers 2403.07816, hidden-state gates of mergekit, cluster-aware upcycling 2604.13508):

- `centroid`: w_e = c_e - mean(c), c_e the mean router input of domain e.
- `ridge`: W = (X'X + lambda I)^-1 X'Y, least squares from tokens to their domain, with centred labels.
- `kmeans`: like centroid, with clusters of the tokens in place of domains.
- `prompts`: w_e = mean over positive prompts - mean over negative prompts.

Router inputs share a large common component (the mean token); left in, it would add a constant to every logit and prefer
some experts for all tokens. It is projected out of the rows. Last, one factor, the smallest that does, makes the router as
sure as asked: the mean score of the first choice.

What a score is, the layout says (`scoring`). `softmax`: the probability among all rows, from 1/R to 1. `sigmoid` (GLM-4-MoE,
dots1): each row answers for itself with sigmoid(logit), so the first choice scores from 1/2 to 1, however many rows there
are; the layout then divides by the sum over the top-k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeforge.errors import BadInput, UsageProblem
from moeforge.options import did_you_mean

from .partition import kmeans
from .recipe import LayerStats
from .router import random_rows

NEEDS: dict[str, frozenset[str]] = {
    "random": frozenset(),
    "zero": frozenset(),
    "uniform": frozenset(),
    "centroid": frozenset({"domains", "samples"}),
    "ridge": frozenset({"domains", "samples", "gram"}),
    "kmeans": frozenset({"samples"}),
    "prompts": frozenset({"domains", "samples"}),
}
"""Kind -> what must be measured first."""


TEMPERATURES = 241
"""Factors tried for a router, twenty a decade, before the first that is sure enough is made exact."""


@dataclass(frozen=True)
class Router:
    """Router rows and how they route the sampled tokens."""

    rows: np.ndarray
    """[R, D] float32."""
    top1: float | None = None
    """Mean score of the first choice; None without samples."""
    load: np.ndarray | None = None
    """[R] share of the visits that each row gets; None without samples."""

    def as_json(self) -> dict[str, Any]:
        """Figures for the manifest: `load_cv` (standard deviation over mean) and `load_max` (largest over mean)."""
        if self.load is None:
            return {}
        mean = self.load.mean()
        return {"top1": self.top1, "load_cv": float(self.load.std() / mean), "load_max": float(self.load.max() / mean)}


def chance(scoring: str, rows: int) -> float:
    """The score of the first choice when all logits are equal."""
    return 0.5 if scoring == "sigmoid" else 1 / rows


def check(
    kind: str,
    rows: int,
    texts: int | None,
    top1: float | None,
    *,
    std: float = 0.02,
    untie: float = 0.0,
    scoring: str = "softmax",
) -> None:
    """Refuse what :func:`make` would refuse, from numbers alone.

    Args:
        texts: number of calibration texts; None for the default ones.
        untie: relative noise that will be added to the rows.

    Raises:
        UsageProblem: as there.
    """
    if kind not in NEEDS:
        raise UsageProblem(f"--router-init {kind!r}: {did_you_mean(kind, NEEDS)}")
    if not math.isfinite(std) or not math.isfinite(untie):
        raise UsageProblem(f"--router-std {std:g}, --untie {untie:g}: both must be finite numbers")
    if kind == "zero" and untie:
        raise UsageProblem(
            f"--untie {untie:g} is relative to the spread of the router rows, and --router-init zero has none; use random"
        )
    if kind == "uniform" and rows == 1:
        raise UsageProblem("--router-init uniform takes the mean over the rows off, which leaves nothing of a single row; "
                           "use random, or more --experts")  # fmt: skip
    least = chance(scoring, rows)
    if NEEDS[kind] and top1 is not None and not least < top1 < 1:
        raise UsageProblem(f"--router-top1 {top1}: {rows} router rows with {scoring} scores allow more than {least:.3g} and "
                           "less than 1")  # fmt: skip
    if kind in ("centroid", "ridge") and texts != rows:
        raise UsageProblem(
            f"--router-init {kind} needs one text for each router row: {rows} rows, {texts or 'no'} --calibration texts; "
            "give as many, or use kmeans, which finds its own"
        )


def make(
    kind: str,
    rows: int,
    width: int,
    stats: LayerStats | None,
    rng: np.random.Generator,
    *,
    visits: int = 1,
    std: float = 0.02,
    top1: float | None = None,
    ridge: float = 1e-2,
    scoring: str = "softmax",
) -> Router:
    """A router.

    Args:
        kind: a key of `NEEDS`.
        rows, width: R and D.
        stats: what `NEEDS[kind]` asks for; samples, where there are any, also give the report.
        rng: for random rows and cluster seeds.
        visits: how many rows a token visits (top-k, or top-k over the group size).
        std: standard deviation of random and uniform rows.
        top1: target of the mean first-choice score for the kinds made from data, between chance and 1; default
            one half, or three quarters where chance is that: with two rows, or sigmoid scores.
        ridge: lambda, relative to the mean of the diagonal of X'X.
        scoring: `softmax` or `sigmoid`, as the layout scores its logits.

    Raises:
        UsageProblem: an unknown kind, a number of domains that does not fit the rows, an unreachable target.
        BadInput: the calibration text does not tell the rows apart.
    """
    texts = None if stats is None or stats.domain_counts is None else len(stats.domain_counts)
    check(kind, rows, texts, top1, std=std, scoring=scoring)
    if kind == "zero":
        made = np.zeros((rows, width))
    elif kind == "random":
        made = random_rows(rows, width, std, rng)
    elif kind == "uniform":
        made = _uniform(rows, width, std, rng)
    else:
        assert stats is not None, "stats as in NEEDS"
        made = _DATA[kind](stats, rows, rng, ridge)
        made = _without_mean(made, stats)
        lengths = np.linalg.norm(made, axis=1, keepdims=True)
        if not (lengths > 1e-6 * np.abs(lengths).max()).all() or lengths.max() == 0:
            raise BadInput(
                f"--router-init {kind}: the calibration text does not tell the {rows} router rows apart; give texts that differ"
            )
        # ridge rows are already to scale with each other; centroids are directions
        made = made / (lengths if kind != "ridge" else lengths.mean())
        target = max(0.5, 1.5 * chance(scoring, rows)) if top1 is None else top1
        made = made * temperature(_samples(stats) @ made.T, target, scoring)
    return measured(made.astype(np.float32), stats, visits, scoring)


def _uniform(rows: int, width: int, std: float, rng: np.random.Generator) -> np.ndarray:
    """Uniform, mean over the rows removed, scaled to `std`: the start of the Drop-Upcycling runs (2502.19261). Two rows or
    more: of one, nothing is left to scale."""
    made = rng.random((rows, width)) - 0.5
    made -= made.mean(0)
    return made * (std / made.std())


def _centroids(stats: LayerStats, rows: int, rng: np.random.Generator, ridge: float) -> np.ndarray:
    assert stats.domain_sums is not None and stats.domain_counts is not None
    means = stats.domain_sums / stats.domain_counts[:, None]
    return means - means.mean(0)


def _prompts(stats: LayerStats, rows: int, rng: np.random.Generator, ridge: float) -> np.ndarray:
    """Domains 2e and 2e + 1 are the positive and negative prompts of row e; without negatives, all other positives."""
    sums, counts = stats.domain_sums, stats.domain_counts
    assert sums is not None and counts is not None
    positive, negative = sums[0::2] / np.maximum(counts[0::2], 1)[:, None], sums[1::2]
    others = (positive.sum(0) - positive) / max(1, rows - 1)
    told = counts[1::2][:, None] > 0
    return positive - np.where(told, negative / np.maximum(counts[1::2], 1)[:, None], others)


def _ridge(stats: LayerStats, rows: int, rng: np.random.Generator, ridge: float) -> np.ndarray:
    sums = stats.domain_sums
    assert sums is not None and stats.gram is not None
    # labels Y are 1 for the token's domain and 0 elsewhere, minus 1/R: X'Y = sums - total / R
    target = sums - sums.sum(0) / rows
    gram = stats.gram + np.eye(len(stats.gram)) * (ridge * np.trace(stats.gram) / len(stats.gram))
    return np.linalg.solve(gram, target.T).T


def _kmeans(stats: LayerStats, rows: int, rng: np.random.Generator, ridge: float) -> np.ndarray:
    """Spherical: tokens are compared by direction after the common mean is taken off, as a dot product will."""
    x = _samples(stats)
    if len(x) < 4 * rows:
        raise UsageProblem(
            f"--router-init kmeans: {len(x)} sampled tokens are too few for {rows} rows; use more calibration text"
        )
    x = x - x.mean(0)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    _, centres = kmeans(x, rows, rng)
    return centres - centres.mean(0)


_DATA = {"centroid": _centroids, "ridge": _ridge, "kmeans": _kmeans, "prompts": _prompts}


def _samples(stats: LayerStats) -> np.ndarray:
    assert stats.samples is not None
    return stats.samples.astype(np.float64)


def _without_mean(rows: np.ndarray, stats: LayerStats) -> np.ndarray:
    """Rows with the direction of the mean router input projected out."""
    mean = _samples(stats).mean(0)
    length = np.linalg.norm(mean)
    if length == 0:
        return rows
    mean /= length
    return rows - np.outer(rows @ mean, mean)


def temperature(logits: np.ndarray, target: float, scoring: str = "softmax") -> float:
    """The factor s > 0 under which the scores of s * logits have a mean largest one of `target`.

    Args:
        logits: [N, R].
        target: between :func:`chance` and 1. With softmax scores the mean largest one grows from one to the other with s. With
            sigmoid scores it falls on tokens without a positive logit, so it may reach the target and fall below it
            again: the smallest s on a grid is taken, made exact by bisection.

    Raises:
        BadInput: the target cannot be reached: rows tie for the first place in too many tokens or, for sigmoid scores, too
            many tokens have no positive logit.
    """
    spread = (logits.max(1, keepdims=True) - logits).mean()
    if not spread > 0:
        raise BadInput("router logits do not differ between rows on the sampled tokens")
    grid = np.linspace(np.log(1e-6 / spread), np.log(1e6 / spread), TEMPERATURES)
    reached = (at for at in range(1, len(grid)) if mean_top1(np.exp(grid[at]) * logits, scoring) >= target)
    first = next(reached, None)
    if first is None:
        raise BadInput(f"router rows cannot be {target:.0%} sure of the first choice: on too many tokens they tie for it"
                       + (" or none answers" if scoring == "sigmoid" else ""))  # fmt: skip
    low, high = grid[first - 1], grid[first]
    for _ in range(60):
        middle = (low + high) / 2
        if mean_top1(np.exp(middle) * logits, scoring) < target:
            low = middle
        else:
            high = middle
    return float(np.exp(high))


def mean_top1(logits: np.ndarray, scoring: str = "softmax") -> float:
    """Mean over tokens of the largest score; logits [N, R]."""
    largest = logits.max(1, keepdims=True)
    if scoring == "sigmoid":
        return float((0.5 + 0.5 * np.tanh(largest / 2)).mean())
    return float((1 / np.exp(logits - largest).sum(1)).mean())


def measured(rows: np.ndarray, stats: LayerStats | None, visits: int, scoring: str = "softmax") -> Router:
    """Router rows [R, D] with what they do to the sampled tokens, if there are any."""
    if stats is None or stats.samples is None:
        return Router(rows)
    logits = _samples(stats) @ rows.T.astype(np.float64)
    # stable: among equal logits the first rows win, as torch.topk has it on a CPU
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :visits]
    load = np.bincount(chosen.ravel(), minlength=len(rows)) / chosen.size
    return Router(rows, mean_top1(logits, scoring), load)


def describe(made: Mapping[int, Router]) -> str:
    """One line on how the routers of some layers, all measured, share out the sampled tokens."""
    uneven = {
        index: router.load.max() / router.load.mean() for index, router in made.items() if router.load is not None
    }
    worst = max(uneven, key=uneven.__getitem__)
    top1 = np.mean([router.top1 for router in made.values() if router.top1 is not None])
    return (
        f"routers on the calibration text: first choice scores {top1:.2f} on average; busiest row {uneven[worst]:.1f} times "
        f"the mean load (layer {worst})"
    )


def idle(made: Mapping[int, Router]) -> str | None:
    """One line on router rows that no sampled token visits; None when there are none."""
    found = [(index, row) for index, router in made.items() if router.load is not None
             for row in np.flatnonzero(router.load == 0)]  # fmt: skip
    if not found:
        return None
    index, row = found[0]
    others = f" and {len(found) - 1} more rows" if len(found) > 1 else ""
    return f"router row {row} of layer {index}{others} got none of the calibration text's tokens, so its experts may not train"
