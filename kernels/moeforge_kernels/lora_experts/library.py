"""LoRA experts in torch's own products: all ranks side by side, one product an expert over the rows that chose it, or one a pair."""

from __future__ import annotations

import torch
from torch import Tensor

from ..combine import combine
from ..grouped_gemm import grouped_gemm
from ..pairs import Pairs


def concat(x: Tensor, pairs: Pairs, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> Tensor:
    """B_cat (G * (A_cat x)): two dense products for every token, no sort, no gather, no wait for the device."""
    experts, _, rank = lora_b.shape
    gates = pairs.gates() * scale
    low = (x @ lora_a.flatten(0, 1).T).unflatten(-1, (-1, rank))  # [T, E or 1, r]
    chosen = (low * gates.unsqueeze(-1).to(x.dtype)).flatten(1)  # [T, E r]
    assert chosen.shape[1] == experts * rank
    return chosen @ lora_b.transpose(1, 2).flatten(0, 1)


def grouped(x: Tensor, pairs: Pairs, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> Tensor:
    """B_e (w s A_e x) for each pair, then the sum over a token's pairs; weights act where rows are r wide."""
    return expand_grouped(shrink_grouped(x, pairs, lora_a), pairs, lora_b, scale)


def few(x: Tensor, pairs: Pairs, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> Tensor:
    """Every A in one product, and only those B that pairs chose: laying all of them side by side would copy them for one token."""
    return expand_few(shrink_concat(x, pairs, lora_a), pairs, lora_b, scale)


def shrink_concat(x: Tensor, pairs: Pairs, lora_a: Tensor) -> Tensor:
    """Every A for every token in one product that reads x once, then the rows that are wanted."""
    rank = lora_a.shape[1]
    made = (x @ lora_a.flatten(0, 1).T).unflatten(-1, (-1, rank))
    expert = pairs.expert.clamp_max(pairs.experts - 1) if len(lora_a) > 1 else pairs.expert * 0
    return made[pairs.token, expert].masked_fill((pairs.expert == pairs.experts).unsqueeze(-1), 0)


def shrink_grouped(x: Tensor, pairs: Pairs, lora_a: Tensor) -> Tensor:
    """A_e of the rows that chose e."""
    if len(lora_a) < pairs.experts:  # one for all
        return shrink_concat(x, pairs, lora_a)
    return grouped_gemm(x, lora_a, pairs)


def expand_concat(low: Tensor, pairs: Pairs, lora_b: Tensor, scale: Tensor) -> Tensor:
    """Weighted where rows are r wide, scattered to [T, E r], then one product over all ranks."""
    experts, _, rank = lora_b.shape
    spread = low.new_zeros(pairs.tokens, experts, rank)
    spread = spread.index_put((pairs.token, _own(pairs)), _weighed(low, pairs, scale), accumulate=True)
    return spread.flatten(1) @ lora_b.transpose(1, 2).flatten(0, 1)


def expand_grouped(low: Tensor, pairs: Pairs, lora_b: Tensor, scale: Tensor) -> Tensor:
    """One product an expert over its rows, then the sum over a token's pairs."""
    made = grouped_gemm(_weighed(low, pairs, scale), lora_b, pairs, gather=False)
    return combine(made, pairs._replace(weight=(pairs.expert < pairs.experts).to(pairs.weight.dtype)))


def expand_few(low: Tensor, pairs: Pairs, lora_b: Tensor, scale: Tensor) -> Tensor:
    """One product a pair, then the sum over a token's pairs in float32."""
    made = torch.bmm(lora_b[_own(pairs)], _weighed(low, pairs, scale).unsqueeze(-1)).squeeze(-1)
    wide = torch.promote_types(made.dtype, torch.float32)
    summed = made.new_zeros(pairs.tokens, made.shape[1], dtype=wide).index_add(0, pairs.token, made.to(wide))
    return summed.to(low.dtype)


def _own(pairs: Pairs) -> Tensor:
    """[P] an expert that exists, for empty pairs too."""
    return pairs.expert.clamp_max(pairs.experts - 1)


def _weighed(low: Tensor, pairs: Pairs, scale: Tensor) -> Tensor:
    """[P, r] w s low; zero where a pair is empty, whatever stands there."""
    real = pairs.expert < pairs.experts
    weight = (pairs.weight * scale[_own(pairs)]).masked_fill(~real, 0)
    rows = torch.where(real.unsqueeze(-1), low, torch.zeros((), dtype=low.dtype, device=low.device))
    return rows * weight.unsqueeze(-1).to(low.dtype)
