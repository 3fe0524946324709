"""What a mixture is trained with beside its task, from what the routers said in one forward pass.

Balance, z and entropy are means over real tokens, so that padding weighs nothing, and linear in what this process holds: the
sum over micro-batches and ranks, each times its share of the real tokens, is the loss of the whole batch. What must be known of
the whole batch first carries no gradient and is handed in: how many tokens each expert got, for balance, and for importance,
which is the square of a mean, that mean. Orthogonality does not depend on tokens.

    with context.record() as seen:
        out = model(...)
    terms = layer_losses(seen)                     # or with counts summed over micro-batches and ranks
    total = task + Weights(balance=0.01).total(terms)

Record the forward pass and leave it before `backward`: gradient checkpointing runs the layers again there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from .routing import Routing
from .select import normalised

Scope = Literal["layer", "global"]
"""Whether each layer is to be even on its own, or all layers together."""


def balance_loss(probabilities: Tensor, fraction: Tensor) -> Tensor:
    """E * sum_e f_e P_e: 1 when tokens and probability are spread evenly, E at worst (Switch Transformer,
    arXiv:2101.03961, equation 4; top-k assignments are counted as in GShard's successors, each 1/k).

    Args:
        probabilities: P [E], mean router probability over real tokens; sums to 1.
        fraction: f [E], share of assignments; sums to 1; carries no gradient.
    """
    return probabilities.shape[-1] * (probabilities * fraction.detach()).sum(-1)


def z_loss(logits: Tensor) -> Tensor:
    """logsumexp(logits)^2, summed over tokens: keeps router logits small (ST-MoE, arXiv:2202.08906, equation 5).

    Args:
        logits: [T, E] of real tokens.
    """
    return torch.logsumexp(_wide(logits), -1).square().sum()


def router_probabilities(logits: Tensor, scoring: str) -> Tensor:
    """Router probabilities [T, E] that sum to 1 for each token.

    `softmax` of the logits, or `sigmoid` scores divided by their sum (DeepSeek-V3, arXiv:2412.19437, equation 18).
    """
    logits = _wide(logits)
    return normalised(logits.sigmoid()) if scoring == "sigmoid" else logits.softmax(-1)


def entropy(probabilities: Tensor) -> Tensor:
    """-sum_e p_e log p_e in nats: [..., E] -> [...]. Low: a router that is sure of itself."""
    # the logarithm of a probability that is exactly 0 has no finite gradient, and 0 times that is no number
    return -(probabilities * probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()).sum(-1)


def importance_loss(importance: Tensor) -> Tensor:
    """(standard deviation / mean)^2 of what the experts weigh in total, [E] -> []: 0 when even (Shazeer et al., arXiv:1701.06538,
    equations 6 and 7)."""
    tiny = torch.finfo(importance.dtype).tiny
    return importance.var(correction=0) / importance.mean().square().clamp_min(tiny)


def orthogonality_loss(rows: Tensor) -> Tensor:
    """Mean squared cosine between different rows, [..., N, D] -> []: 0 when all stand at right angles, 1 when all are parallel. For
    a router's rows [E, D], or the answers of a token's experts [T, K, D]."""
    unit = torch.nn.functional.normalize(_wide(rows), dim=-1)
    count = rows.shape[-2]
    cosines = (unit @ unit.transpose(-1, -2)).square()
    off = cosines.sum((-1, -2)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (off / max(count * (count - 1), 1)).mean()


def relative_load(counts: Tensor, by_label: tuple[int, ...] = ()) -> Tensor:
    """[E] assignments -> [E] load over the mean load, 1 when even, within each group of experts: a busy image expert does not
    excuse an idle text expert."""
    bounds = [0, *accumulate(by_label)] if by_label else [0, len(counts)]
    parts = [counts[start:stop] for start, stop in pairwise(bounds)]
    return torch.cat([len(part) * part / part.sum().clamp_min(1) for part in parts])


@dataclass(frozen=True)
class Terms:
    """The losses of one forward pass, each a mean over real tokens and over layers; `layers` says how many.

    balance is 1 and importance 0 when even; z and entropy are in (nats squared and) nats a token.
    """

    balance: Tensor
    z: Tensor
    entropy: Tensor
    importance: Tensor
    orthogonality: Tensor
    layers: int


def assignments(seen: Mapping[str, Routing]) -> dict[str, Tensor]:
    """Layer -> [E] float64 tokens that each expert got: to be summed over micro-batches and ranks and handed to
    :func:`layer_losses`."""
    return {name: routing.pairs.counts().double() for name, routing in seen.items()}


def weighed(seen: Mapping[str, Routing]) -> dict[str, Tensor]:
    """Layer -> [E] float64, what each expert weighed in total: summed over micro-batches and ranks and divided by their real tokens,
    it is handed to :func:`layer_losses`."""
    return {name: routing.pairs.gates().detach().sum(0).double() for name, routing in seen.items()}


def layer_losses(seen: Mapping[str, Routing], counts: Mapping[str, Tensor] | None = None, *, scope: Scope = "layer",
                 means: Mapping[str, Tensor] | None = None, rows: Mapping[str, Tensor] | None = None) -> Terms:  # fmt: skip
    """The losses of what the routers said. Layers without probabilities (a fixed choice) have none.

    Args:
        seen: layer -> Routing, from :meth:`MixtureContext.record`.
        counts: layer -> [E] assignments so far in this step, over micro-batches and ranks: with accumulation the fractions then
            converge to those of the whole step, not of a sliver of it (arXiv:2501.11873, section 3). None: those of `seen`.
        means: layer -> [E] what each expert weighs a real token, so far in this step, likewise (:func:`weighed`). None: that of `seen`.
        scope: `global` adds the layers up before their evenness is judged; all then have the same experts.
        rows: layer -> [..., N, D] what should stand at right angles: router rows, experts' answers. None: nothing.

    Raises:
        ValueError: there is no layer with probabilities, or layers of different sizes cannot be added up.
    """
    counts = assignments(seen) if counts is None else counts
    parts = {name: _Means.of(routing) for name, routing in seen.items() if routing.probabilities is not None}
    if not parts:
        raise ValueError(
            f"no router among {', '.join(seen) or 'no layers'} has probabilities: there is nothing to balance"
        )
    loads = {name: (counts[name], seen[name].by_label) for name in parts}
    # the value is that of the whole, the gradient goes to what is here
    importance = [part.importance if means is None else part.importance + (means[name].to(part.importance) - part.importance).detach()
                  for name, part in parts.items()]  # fmt: skip
    if scope == "global":
        shapes = {name: (len(count), by_label) for name, (count, by_label) in loads.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"layers of different experts cannot be balanced together: {shapes}")
        pooled = torch.stack([count for count, _ in loads.values()]).sum(0)
        loads = {name: (pooled, by_label) for name, (_, by_label) in loads.items()}
        importance = [torch.stack(importance).sum(0)]
    balance = [
        (part.probability * relative_load(*loads[name]).to(part.probability)).sum() for name, part in parts.items()
    ]
    angles = [orthogonality_loss(matrix) for matrix in (rows or {}).values()]
    return Terms(
        balance=torch.stack(balance).mean(),
        z=torch.stack([part.z for part in parts.values()]).mean(),
        entropy=torch.stack([part.entropy for part in parts.values()]).mean(),
        importance=torch.stack([importance_loss(total) for total in importance]).mean(),
        orthogonality=torch.stack(angles).mean() if angles else balance[0].new_zeros(()),
        layers=len(parts),
    )


@dataclass(frozen=True)
class _Means:
    """Of one layer: P [E] (of real experts, summing to 1), z and entropy as means over real tokens; [E] what experts weigh, the
    same."""

    probability: Tensor
    z: Tensor
    entropy: Tensor
    importance: Tensor

    @classmethod
    def of(cls, routing: Routing) -> _Means:
        probabilities, logits, real = routing.probabilities, routing.logits, routing.real
        assert probabilities is not None and logits is not None
        experts = routing.pairs.experts
        if real is None:
            real = torch.ones(len(probabilities), dtype=torch.bool, device=probabilities.device)
        tokens = real.sum().clamp_min(1)
        # sigmoid scores do not sum to 1; null experts share no load, so evenness is among the others
        shares = normalised(probabilities[:, :experts])
        whole = normalised(probabilities)

        def mean(values: Tensor) -> Tensor:
            mask = real.view(-1, *[1] * (values.ndim - 1))
            return values.masked_fill(~mask, 0).sum(0) / tokens

        z = torch.logsumexp(_wide(logits), -1).square()
        return cls(mean(shares), mean(z), mean(entropy(whole)), routing.pairs.gates().sum(0) / tokens)


@dataclass(frozen=True)
class Weights:
    """How much each loss counts.

    Attributes:
        entropy_sign: `plus` adds the entropy, which makes routers sure of themselves; `minus` subtracts it (LoRA-Mixer,
            arXiv:2507.00029, as printed), which keeps them undecided.
    """

    balance: float = 0.0
    z: float = 0.0
    entropy: float = 0.0
    entropy_sign: Literal["plus", "minus"] = "plus"
    importance: float = 0.0
    orthogonality: float = 0.0

    def total(self, terms: Terms) -> Tensor:
        """The weighted sum; what has no weight takes no part in the backward pass."""
        sign = 1 if self.entropy_sign == "plus" else -1
        weighted = [(self.balance, terms.balance), (self.z, terms.z), (sign * self.entropy, terms.entropy),
                    (self.importance, terms.importance), (self.orthogonality, terms.orthogonality)]  # fmt: skip
        return sum((weight * term for weight, term in weighted if weight), torch.zeros_like(terms.balance))


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
