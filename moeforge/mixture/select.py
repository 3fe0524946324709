"""Logits -> who goes where: pure functions, one an idea, that a Router puts together.

Every answer has a shape that follows from the configuration and T alone: what is not chosen is marked, never left out, so
nothing waits for a device and a compiled graph stays whole.

    preference   [T, E] what is compared: scores, or logits; -inf where an expert may not be chosen
    index        [T, S] experts in the order in which they were chosen
    chosen       [T, S] bool: whether that slot counts

Ties go to the lowest index (of the expert; in expert choice, of the token), on every device: `torch.topk` leaves that open.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEVER = float("-inf")
GateScale = Literal["prob", "none", "straight_through"]
Score = Literal["softmax", "sigmoid", "sparsegen"]


def best(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, index) of the k largest along the last dimension, the largest first, equal ones by index."""
    ordered, index = torch.sort(values, dim=-1, descending=True, stable=True)
    return ordered[..., :k], index[..., :k]


def score(logits: Tensor, kind: Score, sparsity: float = 0.0) -> Tensor:
    """[T, E] -> [T, E]; 0 where a logit is -inf. `sparsity` is for :func:`sparsegen` only."""
    if kind == "sparsegen":
        return sparsegen(logits, sparsity)
    return logits.softmax(-1) if kind == "softmax" else logits.sigmoid()


def sparsegen(logits: Tensor, sparsity: float) -> Tensor:
    """The point of the simplex that is nearest to the logits, most of its corners at exactly 0: ((z - tau) / (1 - sparsity))_+ with
    the tau at which they sum to 1 (sparsegen-lin, arXiv:1810.11975, equation 10; 0 is sparsemax, arXiv:1602.02068; as a router LD-MoLE,
    arXiv:2509.25684).

    Args:
        logits: [T, E].
        sparsity: below 1; the higher, the fewer are not 0.
    """
    ordered = logits.sort(-1, descending=True).values
    summed = ordered.cumsum(-1)
    count = torch.arange(1, logits.shape[-1] + 1, device=logits.device, dtype=logits.dtype)
    support = (1 - sparsity + count * ordered > summed).sum(-1, keepdim=True)
    tau = (summed.gather(-1, support - 1) - (1 - sparsity)) / support
    return ((logits - tau) / (1 - sparsity)).clamp_min(0)


def limit_to_groups(preference: Tensor, groups: int, top_groups: int) -> Tensor:
    """Only the `top_groups` groups of neighbouring experts whose two best experts add up to most remain (DeepSeek-V3,
    arXiv:2412.19437, section 2.1.2)."""
    grouped = preference.unflatten(-1, (groups, preference.shape[-1] // groups))
    worth = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
    _, index = best(worth, top_groups)
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, index, True)
    return grouped.masked_fill(~kept.unsqueeze(-1), NEVER).flatten(-2)


# which experts: preference -> index, chosen


def top_k(preference: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best; fewer where fewer may be chosen."""
    values, index = best(preference, k)
    return index, values != NEVER  # what is no number is chosen, so that it is seen


def top_p(preference: Tensor, probabilities: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The fewest, taken in order of preference, whose probability exceeds p; always one, and for p = 1 all (MixLoRA,
    arXiv:2404.15159)."""
    values, index = best(preference, preference.shape[-1])
    before = F.pad(probabilities.gather(-1, index).cumsum(-1)[..., :-1], (1, 0))
    within = before <= p if p < 1 else torch.ones_like(before, dtype=torch.bool)
    return index, within & (values != NEVER)


def above(preference: Tensor, threshold: float | Tensor, *, fallback: bool) -> tuple[Tensor, Tensor]:
    """All above the threshold (a number, or one an expert); with `fallback`, the best one of a token that would have none."""
    chosen = preference > threshold
    if fallback:
        first = F.one_hot(preference.argmax(-1), preference.shape[-1]).bool()
        chosen = chosen | (first & ~chosen.any(-1, keepdim=True) & (preference > NEVER))
    return _every_index(preference), chosen


def everyone(preference: Tensor) -> tuple[Tensor, Tensor]:
    """All that may be chosen."""
    return _every_index(preference), preference != NEVER


def _every_index(preference: Tensor) -> Tensor:
    return torch.arange(preference.shape[-1], device=preference.device).expand(preference.shape)


# with what weight


def weigh(index: Tensor, chosen: Tensor, scores: Tensor, logits: Tensor | None, *, renormalise: bool) -> Tensor:
    """[T, S] weights, 0 where not chosen.

    Args:
        scores: [T, E].
        logits: [T, E] to take a softmax over the chosen ones only; None: the chosen scores as they are.
        renormalise: divide by their sum.
    """
    if logits is not None:
        # the least number and not -inf: a token without any expert would be 0 / 0
        picked = logits.gather(-1, index).masked_fill(~chosen, torch.finfo(logits.dtype).min)
        return picked.softmax(-1).masked_fill(~chosen, 0)
    weight = scores.gather(-1, index).masked_fill(~chosen, 0)
    return normalised(weight) if renormalise else weight


def normalised(weight: Tensor) -> Tensor:
    """Divided by the sum along the last dimension; what is all zero stays so."""
    return weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)


def gate(weight: Tensor, chosen: Tensor, kind: GateScale, factor: float) -> Tensor:
    """The weight; 1; or 1 with the weight's gradient. All times `factor`."""
    if kind == "none":
        weight = chosen.to(weight.dtype)
    elif kind == "straight_through":
        weight = (weight - weight.detach()) + chosen
    return weight * factor if factor != 1 else weight


# capacity


class Share(NamedTuple):
    """What part of the tokens an expert may take, as a fraction: counted in integers, it is the same on every device."""

    over: int
    under: int

    @classmethod
    def of(cls, factor: float | None, top_k: int, experts: int) -> Share:
        """factor * K / E; no factor is 1."""
        exact = Fraction(repr(1.0 if factor is None else factor)).limit_denominator(10**6) * top_k / experts
        return cls(exact.numerator, exact.denominator)

    def quota(self, tokens: int) -> int:
        """ceil(share * tokens), at least 1 and at most all."""
        return min(max(-(-tokens * self.over // self.under), 1), tokens)

    def quota_of(self, tokens: Tensor) -> Tensor:
        """The same of a count that only the device knows."""
        return torch.minimum(((tokens * self.over + self.under - 1) // self.under).clamp_min(1), tokens)


def within_capacity(index: Tensor, chosen: Tensor, experts: int, quota: int | Tensor) -> Tensor:
    """`chosen` without what exceeds an expert's quota: all first choices go before any second one, and earlier tokens before
    later ones (GShard, arXiv:2006.16668, algorithm 1). What is dropped is lost, not handed to another expert.

    Args:
        experts: E; an index from E on is a null expert, which has room for all.
        quota: the most tokens an expert takes.
    """
    tokens, slots = index.shape
    limited = chosen & (index < experts)
    flat = index.masked_fill(~limited, experts).T.reshape(-1)
    ordered, order = torch.sort(flat, stable=True)
    place = torch.arange(len(flat), device=flat.device) - torch.searchsorted(ordered, ordered)
    fits = torch.empty_like(chosen.reshape(-1)).scatter(0, order, place < quota)
    return chosen & (fits.view(slots, tokens).T | ~limited)


# expert choice


class Listed(NamedTuple):
    """Pairs in no particular order, [P] each; token = T where a place is empty."""

    token: Tensor
    expert: Tensor
    weight: Tensor


def expert_choice(scores: Tensor, eligible: Tensor, spans: Sequence[tuple[int, int]], shares: Sequence[Share], *,
                  renormalise: bool, fallback: bool) -> Listed:  # fmt: skip
    """Every expert takes its best tokens among those it may choose from (Zhou et al., arXiv:2202.09368; by modality: MoMa,
    arXiv:2407.21770). With `renormalise` and `fallback` every token's weights add up to 1, so identical experts change nothing.

    Args:
        scores: [T, E].
        eligible: [T, E] bool: whether the expert may see the token at all.
        spans: (first, behind the last) expert of each group; the experts of a group see the same tokens.
        shares: a group's share of its tokens for each of its experts.
        renormalise: divide a token's weights by their sum over the experts that took it.
        fallback: a token that nobody took goes to the expert that scores it highest.
    """
    tokens, experts = scores.shape
    device = scores.device
    token_lists, expert_lists = [], []
    for (start, stop), share in zip(spans, shares, strict=True):
        seen = eligible[:, start]
        values, token = best(scores[:, start:stop].T.masked_fill(~seen, NEVER), share.quota(tokens))
        taken = torch.arange(token.shape[1], device=device) < share.quota_of(seen.sum())
        token_lists.append(token.masked_fill(~(taken & (values > NEVER)), tokens).reshape(-1))
        expert_lists.append(torch.arange(start, stop, device=device).repeat_interleave(token.shape[1]))
    visits = torch.zeros(tokens + 1, experts, dtype=torch.bool, device=device)
    visits = visits.index_put(
        (torch.cat(token_lists), torch.cat(expert_lists)), torch.ones((), dtype=torch.bool, device=device)
    )[:tokens]
    if fallback:
        first = scores.masked_fill(~eligible, NEVER).argmax(-1)
        missed = eligible.any(-1) & ~visits.any(-1)
        token_lists.append(torch.arange(tokens, device=device).masked_fill(~missed, tokens))
        expert_lists.append(first)
        visits = visits | (F.one_hot(first, experts).bool() & missed.unsqueeze(-1))
    weight = scores * visits
    if renormalise:
        weight = normalised(weight)
    token, expert = torch.cat(token_lists), torch.cat(expert_lists)
    return Listed(token, expert, F.pad(weight, (0, 0, 0, 1))[token, expert])
