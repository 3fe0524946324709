"""LoRA experts in torch's own products: all ranks side by side, or one product an expert over the rows that chose it."""

from __future__ import annotations

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
    low = shrink_grouped(x, pairs, lora_a)
    weight = pairs.weight * scale[pairs.expert.clamp_max(pairs.experts - 1)]
    made = grouped_gemm((low * weight.unsqueeze(-1).to(low.dtype)).contiguous(), lora_b, pairs, gather=False)
    return combine(made, pairs._replace(weight=(pairs.expert < pairs.experts).to(pairs.weight.dtype)))


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
