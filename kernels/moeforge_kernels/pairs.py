"""The one dispatch format: which tokens go to which experts, and with what weight.

Every routing policy ends here, and every projection at a site reads the same list. A policy says its choice in one of two ways:

    slots    [T, S] expert ids, E where a slot is empty (a null expert, a dropped token, padding, a top-p that stopped early)
    experts  [E, C] token ids, T where a place is empty (expert choice)

Shapes never depend on the data, so the list can be built without waiting for a GPU and inside a captured graph: empty slots
become pairs of expert E, which sort behind all others; only the first `offsets[-1]` pairs are real.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """(token, expert, weight) sorted by expert, and by token within an expert.

    Pairs past `offsets[-1]` are empty: expert E, weight 0, a token id in range. Ops never read their rows.
    """

    token: Tensor
    """[P] int64: the row of the input."""
    expert: Tensor
    """[P] int64: 0..E-1, or E where the pair is empty."""
    weight: Tensor
    """[P] float32 (or float64), differentiable: what the expert's answer is multiplied by."""
    offsets: Tensor
    """[E] int32: inclusive cumulative counts. Expert e owns pairs offsets[e-1]..offsets[e]."""
    by_token: Tensor
    """[P] int64: positions in this list, token by token: the order in which a token's answers are summed."""
    tokens: int
    """T."""
    slots: int | None
    """S when every token has the same number of pairs (empty ones included): `by_token` is then a [T, S] table. None otherwise."""

    @property
    def experts(self) -> int:
        return self.offsets.shape[0]

    def counts(self) -> Tensor:
        """[E] int32: tokens that each expert receives."""
        return torch.diff(self.offsets, prepend=self.offsets.new_zeros(1))

    def lengths(self) -> Tensor:
        """[T] int64: pairs of each token, as they stand in `by_token`; empty pairs of an expert choice count as the last token's."""
        tokens = torch.arange(self.tokens, device=self.token.device)
        ends = torch.searchsorted(self.token[self.by_token], tokens, right=True)
        return torch.diff(ends, prepend=ends.new_zeros(1))

    def gates(self) -> Tensor:
        """[T, E] the weights as a dense matrix, zero where a token does not visit an expert: for experts that are cheaper computed
        for every token (low rank, heads) than gathered. Differentiable."""
        dense = self.weight.new_zeros(self.tokens, self.experts + 1)
        return dense.index_put((self.token, self.expert), self.weight, accumulate=True)[:, : self.experts]

    def token_order(self) -> tuple[Tensor, Tensor]:
        """(expert [P], weight [P]) token by token; the list before it was sorted."""
        return self.expert[self.by_token], self.weight[self.by_token]


def pairs_from_slots(index: Tensor, weight: Tensor, experts: int) -> Pairs:
    """The list of a policy in which tokens choose experts.

    Args:
        index: [T, S] integer expert ids; `experts` marks an empty slot.
        weight: [T, S]; what stands at empty slots is ignored (no gradient reaches it).
        experts: E.
    """
    tokens, slots = index.shape
    flat = index.reshape(-1).long()
    # stable: within an expert the tokens ascend, so sums are taken in one order whatever the device
    sorted_expert, order = torch.sort(flat, stable=True)
    by_token = torch.empty_like(order)
    by_token[order] = torch.arange(len(order), device=order.device)
    gates = weight.reshape(-1)[order].masked_fill(sorted_expert == experts, 0)
    return Pairs(order // slots, sorted_expert, gates, _offsets(sorted_expert, experts), by_token, tokens, slots)


def pairs_from_experts(index: Tensor, weight: Tensor, tokens: int) -> Pairs:
    """The list of a policy in which experts choose tokens.

    Args:
        index: [E, C] integer token ids; `tokens` marks an empty place.
        weight: [E, C].
        tokens: T.
    """
    experts, places = index.shape
    expert = torch.arange(experts, device=index.device).repeat_interleave(places)
    return pairs_from_list(index.reshape(-1), expert, weight.reshape(-1), tokens, experts)


def pairs_from_list(token: Tensor, expert: Tensor, weight: Tensor, tokens: int, experts: int) -> Pairs:
    """The list of a policy that joins several choices: experts that choose, and a last resort for tokens that nobody chose.

    Args:
        token, expert, weight: [P], in any order; token `tokens` marks an empty place. No pair stands there twice.
        tokens, experts: T, E.
    """
    token = token.long()
    expert = torch.where(token == tokens, experts, expert)
    # by expert, then by token: one key, so one sort
    order = torch.argsort(expert * (tokens + 1) + token, stable=True)
    token, expert = token[order], expert[order]
    gates = weight[order].masked_fill(expert == experts, 0)
    by_token = torch.argsort(token, stable=True)
    return Pairs(token.clamp_max(max(tokens - 1, 0)), expert, gates, _offsets(expert, experts), by_token, tokens, None)


def _offsets(sorted_expert: Tensor, experts: int) -> Tensor:
    """[E] int32 inclusive cumulative counts. searchsorted, as bincount waits for the device and histc wants floats on a CPU."""
    ids = torch.arange(experts, device=sorted_expert.device)
    return torch.searchsorted(sorted_expert, ids, right=True).to(torch.int32)
