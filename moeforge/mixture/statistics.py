"""What the routers of a model did, over any number of batches: load, dead experts, company, sureness, by domain.

Everything is a sum kept on the device, so that adding a batch waits for nothing and sums of several processes simply add up;
numbers are read once, by `as_json`.

    statistics = Statistics(labels=2)
    with context.record() as seen:
        model(...)
    statistics.add(seen, context.labels)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .losses import entropy
from .routing import Routing
from .select import normalised


@dataclass(frozen=True)
class LayerLoad:
    """One layer's sums.

    Attributes:
        tokens: [] real tokens; `bare`: [] those that no expert took.
        visits: [E, E], tokens that visited both; on the diagonal, tokens that visited that expert.
        by_label: [labels, E] visits of the tokens with a label.
        entropy: [] nats, summed over tokens; `scored`: [] the tokens that had probabilities.
    """

    tokens: Tensor
    bare: Tensor
    visits: Tensor
    by_label: Tensor
    entropy: Tensor
    scored: Tensor

    @classmethod
    def of(cls, routing: Routing, labels: Tensor | None, known: int) -> LayerLoad:
        """The sums of one forward pass; `known` is the number of labels."""
        pairs = routing.pairs
        visited = torch.zeros(pairs.tokens, pairs.experts + 1, device=pairs.token.device)
        visited = visited.index_put((pairs.token, pairs.expert), visited.new_ones(()))[:, : pairs.experts]
        real = torch.ones_like(visited[:, 0], dtype=torch.bool) if routing.real is None else routing.real
        domains = torch.arange(known, device=visited.device)
        about = torch.zeros(known, len(visited)) if labels is None else domains.unsqueeze(-1) == labels
        total, scored = torch.zeros_like(visited[0, 0]), 0
        if routing.probabilities is not None:
            probabilities = normalised(routing.probabilities.detach())
            total, scored = entropy(probabilities).masked_fill(~real, 0).sum(), real.sum()
        sums = (real.sum(), (real & (visited.sum(-1) == 0)).sum(), visited.T @ visited, about.to(visited) @ visited, total,
                torch.as_tensor(scored, device=visited.device))  # fmt: skip
        return cls(*(value.double() for value in sums))

    def __add__(self, other: LayerLoad) -> LayerLoad:
        return self._zip(other, torch.add)

    def _zip(self, other: LayerLoad, function: Callable[[Tensor, Tensor], Tensor]) -> LayerLoad:
        return LayerLoad(*(function(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__))

    def over(self, total: Callable[[Tensor], Tensor]) -> LayerLoad:
        """The sums over processes; `total` makes the sum of one tensor."""
        return LayerLoad(*(total(getattr(self, name)) for name in self.__dataclass_fields__))

    def as_json(self) -> dict[str, Any]:
        """Shares and counts in plain numbers; None where there is nothing to divide by."""
        counts = self.visits.diagonal().tolist()
        tokens, mean = float(self.tokens), sum(counts) / len(counts)
        scored = float(self.scored)
        found: dict[str, Any] = {
            "tokens": int(tokens),
            "load": _shares(counts),
            "max_violation": max(counts) / mean - 1 if mean else None,
            "dead": [expert for expert, count in enumerate(counts) if count == 0],
            "experts_per_token": sum(counts) / tokens if tokens else None,
            "uncovered": float(self.bare) / tokens if tokens else None,
            "entropy": float(self.entropy) / scored if scored else None,
            "together": [[count / tokens if tokens else 0.0 for count in row] for row in self.visits.tolist()],
        }
        if len(self.by_label):
            found["by_label"] = [_shares(row) for row in self.by_label.tolist()]
        return found


@dataclass
class Statistics:
    """All layers of a model.

    Attributes:
        labels: how many labels (domains, modalities) tokens may have, 0.. ; 0: nobody asks.
        layers: name -> sums, in the order in which they were first seen.
    """

    labels: int = 0
    layers: dict[str, LayerLoad] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, seen: Mapping[str, Routing], labels: Tensor | None = None) -> None:
        """One forward pass.

        Args:
            seen: from :meth:`MixtureContext.record`.
            labels: [T]; a label from `self.labels` on is counted for none.
        """
        for name, routing in seen.items():
            new = LayerLoad.of(routing, labels, self.labels)
            self.layers[name] = self.layers[name] + new if name in self.layers else new

    def over(self, total: Callable[[Tensor], Tensor]) -> Statistics:
        """Those of all processes together: `total` is their sum of a tensor. Every process must have seen the same layers."""
        return Statistics(self.labels, {name: layer.over(total) for name, layer in self.layers.items()})

    def as_json(self) -> dict[str, dict[str, Any]]:
        """Layer -> what :meth:`LayerLoad.as_json` says. `load` is each expert's share of the assignments; `max_violation` the
        busiest one's load over the mean, less 1 (arXiv:2408.15664); `dead` who got nothing; `uncovered` the share of tokens
        without an expert; `entropy` nats a token; `together` [E, E] the share of tokens that two experts have in common."""
        return {name: layer.as_json() for name, layer in self.layers.items()}


def _shares(counts: list[float]) -> list[float]:
    return [count / max(sum(counts), 1.0) for count in counts]
