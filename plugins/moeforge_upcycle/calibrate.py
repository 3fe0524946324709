"""One streaming pass over a dense model that measures, layer by layer, what methods and routers ask for.

Everything is taken at the true router input: what the feed-forward block is given, after attention, residual and norm.
The first token of a sequence is left out: it serves attention as a sink, and its activations are outliers of hundreds of times
the usual size (2309.17453). Callers put a start token there, so that no word is lost (see measure.starting_encoder).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moeforge.checkpoint.base import Checkpoint
from moeforge.errors import BadInput

from .recipe import LayerStats

if TYPE_CHECKING:
    import torch

    from moeforge.pipeline.context import Context

ACTIVE = 0.1
"""A neuron is active in a token when it is among this share of the largest |activations| (CMoE, 2502.04416)."""
SAMPLES = 2048
"""Tokens that are kept whole."""
FIELDS = frozenset({"activation", "rate", "samples", "domains", "gram", "activations"})
"""What can be asked for. `samples` brings `labels`; `domains` brings `domain_sums` and `domain_counts`."""


def calibrate(
    checkpoint: Checkpoint,
    layers: Collection[int],
    needs: Collection[str],
    domains: Sequence[Sequence[Sequence[int]]],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    ctx: Context | None = None,
) -> Iterator[tuple[int, LayerStats]]:
    """Statistics of the given layers, in ascending order, one at a time: what is not kept is gone.

    Weights are read once, one decoder layer in memory; the model stops after the last layer asked for.

    Args:
        checkpoint: a dense model of text.
        layers: which layers to measure.
        needs: names out of `FIELDS`, or of the LayerStats fields themselves.
        domains: for each domain its sequences of token ids, unpadded.
        samples: N, how many tokens (the same ones in every layer, spread over the domains) are kept whole.
        seed: of the choice of these tokens.

    Raises:
        BadInput: the model cannot be run, ids are outside its vocabulary, or activations are not finite.
        ValueError: an unknown need.
    """
    wanted = _fields(needs)
    if not wanted or not layers:
        return
    import torch

    from moeforge.model.streaming import StreamedModel

    model = StreamedModel(checkpoint)
    vocabulary = model.module.config.get_text_config().vocab_size
    sequences = [(label, ids) for label, texts in enumerate(domains) for ids in texts if len(ids) > 1]
    if not sequences:
        raise BadInput("no calibration text: every sequence is shorter than two tokens")
    for label, ids in sequences:
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise BadInput(f"domain {label} holds token ids outside {checkpoint.ref}'s vocabulary of {vocabulary}")
    picks = _choose([(label, len(ids) - 1) for label, ids in sequences], samples, seed)
    states = model.start([torch.tensor([list(ids)]) for _, ids in sequences])
    last = max(layers) + 1
    with contextlib.nullcontext() if ctx is None else ctx.bar("calibrating", last, "layers") as bar:
        for index in range(last):
            with model.layer(index) as layer:
                meter = _Meter(layer, wanted, len(domains)) if index in layers else None
                for state, (label, _), rows in zip(states, sequences, picks, strict=True):
                    if meter is not None:
                        meter.expect(label, rows)
                    model.advance(state, layer)
                if meter is not None:
                    meter.remove()
            if meter is not None:
                yield index, meter.result(f"{checkpoint.ref}, layer {index}")
            if bar is not None:
                bar.advance(1)


def _fields(needs: Collection[str]) -> frozenset[str]:
    alias = {"labels": "samples", "domain_sums": "domains", "domain_counts": "domains"}
    wanted = frozenset(alias.get(name, name) for name in needs)
    unknown = wanted - FIELDS
    if unknown:
        raise ValueError(f"calibration cannot measure {sorted(unknown)}; it measures {sorted(FIELDS)}")
    return wanted


def _choose(sequences: Sequence[tuple[int, int]], count: int, seed: int) -> list[np.ndarray]:
    """For sequences of (domain, length): which tokens of each to keep, `count` in all, equally many from each domain
    where it has so many."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.full(length, label) for label, length in sequences])
    kept = np.zeros(len(labels), bool)
    kinds = np.unique(labels)
    for kind in kinds:
        where = np.flatnonzero(labels == kind)
        kept[rng.choice(where, size=min(max(1, count // len(kinds)), len(where)), replace=False)] = True
    bounds = np.cumsum([length for _, length in sequences])[:-1]
    return [np.flatnonzero(part) for part in np.split(kept, bounds)]


class _Meter:
    """Hooks on one dense decoder layer; adds up what is wanted while sequences run through it one at a time."""

    def __init__(self, layer: torch.nn.Module, wanted: frozenset[str], domains: int) -> None:
        from moeforge.model.build import ffn_modules, is_sparse
        from moeforge.model.streaming import ffn_ends

        parts = ffn_modules(layer)
        if is_sparse(parts):
            raise BadInput("calibration measures dense layers, and this one holds experts already")
        self._wanted, self._domains = wanted, domains
        self._label, self._rows = 0, np.empty(0, np.int64)
        self._tokens = 0
        self._sums: dict[str, Any] = {}
        self._kept: dict[str, list[np.ndarray]] = {"samples": [], "labels": [], "activations": []}
        entrance, exit = ffn_ends(layer)[0]
        self._handles = [entrance.register_forward_pre_hook(lambda _, args: self._inputs(args[0]))]
        if wanted & {"activation", "rate", "activations"}:
            self._handles.append(_down(exit).register_forward_pre_hook(lambda _, args: self._hidden(args[0])))

    def expect(self, label: int, rows: np.ndarray) -> None:
        """The next sequence is of domain `label`, and its tokens `rows` (the first token not counted) are kept."""
        self._label, self._rows = label, rows

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, name: str, value: Any) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _inputs(self, x: torch.Tensor) -> None:
        """x: [1, T, D], the router input."""
        x = x[0, 1:].float()
        self._tokens += len(x)
        if "samples" in self._wanted:
            self._kept["samples"].append(x[self._rows].numpy())
            self._kept["labels"].append(np.full(len(self._rows), self._label))
        if "domains" in self._wanted:
            mine = np.arange(self._domains) == self._label
            self._add("domain_sums", np.outer(mine, x.double().sum(0).numpy()))
            self._add("domain_counts", mine * len(x))
        if "gram" in self._wanted:
            exact = x.double()
            self._add("gram", (exact.T @ exact).numpy())

    def _hidden(self, h: torch.Tensor) -> None:
        """h: [1, T, F], what the down projection is given."""
        size = h[0, 1:].float().abs()
        if "activation" in self._wanted:
            self._add("activation", size.double().sum(0).numpy())
        if "rate" in self._wanted:
            active = size.topk(math.ceil(ACTIVE * size.shape[1]), dim=1).indices.flatten().numpy()
            self._add("rate", np.bincount(active, minlength=size.shape[1]).astype(np.float64))
        if "activations" in self._wanted:
            self._kept["activations"].append(h[0, 1:].float()[self._rows].numpy())

    def result(self, where: str) -> LayerStats:
        """What was measured.

        Raises:
            BadInput: some of it is not finite.
        """
        found = dict(self._sums)
        for name in ("activation", "rate"):
            if name in found:
                found[name] = found[name] / self._tokens
        for name, parts in self._kept.items():
            if parts:
                found[name] = np.concatenate(parts)
        for name, value in found.items():
            if not np.isfinite(value).all():
                raise BadInput(
                    f"{where}: {name} of the calibration text is not finite; the model or its dtype is broken"
                )
        return LayerStats(**found)


def _down(ffn: torch.nn.Module) -> torch.nn.Module:
    """The down projection of a dense FFN: the last module with a matrix of its own, whatever it is called."""
    return [module for module in ffn.modules() if any(p.ndim == 2 for p in module.parameters(recurse=False))][-1]
