"""What a router says about a batch of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moeforge_kernels.pairs import Pairs, pairs_from_slots

from .select import Score, score


class Routing(NamedTuple):
    """The choice, and what it was made from (for losses and statistics).

    Attributes:
        pairs: who goes where, with what weight.
        logits: [T, E'] float32 (float64 stays), before noise, bias and temperature; E' counts null experts too, which come last.
            -inf where a token's label forbids an expert. None where there are none.
        probabilities: [T, E'] float32, what the selection saw: they sum to 1 for softmax. None where there are none.
        real: [T] bool, the tokens that were routed; None: all.
        by_label: sizes of the groups of experts that labels choose among; empty: no groups.
        input_scale: [T], what every token is multiplied by before its expert sees it; None: nothing.
    """

    pairs: Pairs
    logits: Tensor | None
    probabilities: Tensor | None
    real: Tensor | None = None
    by_label: tuple[int, ...] = ()
    input_scale: Tensor | None = None

    def scaling_inputs(self) -> Routing:
        """The same choice with the weights on what experts are given, not on what they answer; each token has one slot."""
        pairs = self.pairs
        ones = (pairs.expert < pairs.experts).to(pairs.weight.dtype)
        # a token without an expert is not read
        return self._replace(pairs=pairs._replace(weight=ones), input_scale=pairs.weight[pairs.by_token])

    def scaled(self, x: Tensor) -> Tensor:
        """[T, ...] as experts are given them."""
        if self.input_scale is None:
            return x
        scale = self.input_scale.view(-1, *[1] * (x.ndim - 1))
        return (x.to(torch.promote_types(x.dtype, scale.dtype)) * scale).to(x.dtype)


def routing_of_choice(
    logits: Tensor, weights: Tensor, chosen: Tensor, experts: int, scoring: Score, real: Tensor | None = None
) -> Routing:
    """What a router that is not ours decided, said as ours say it.

    Args:
        logits: [T, E]. weights, chosen: [T, K].
        real: [T] bool; padding is taken out of the choice.
    """
    if real is not None:
        chosen = chosen.masked_fill(~real.unsqueeze(-1), experts)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return Routing(pairs_from_slots(chosen, weights.to(wide), experts), logits, score(logits.to(wide), scoring), real)
