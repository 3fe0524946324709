"""Low-rank experts beside a linear map; see README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Backend, Op, always
from ..pairs import Pairs
from .cpu import PAIRS
from .cpu import why_not as _cpu_lacks

RANKS = 256
"""E r up to which all ranks are computed for every token: the product with x then takes no longer than reading x (spec: the intensity of
E r rows stays below what a processor needs), and nothing is sorted or gathered."""
TOKENS = 64
"""T below which the same holds whatever the ranks: small products cost their launches."""
FEW = 2
"""Pairs times this up to E: so few that each is a product by itself, and the B of no other expert is touched."""


def plan(tokens: int, experts: int, rank: int) -> str:
    """`concat` or `grouped`: which of torch's ways is the faster one for many pairs."""
    return "concat" if experts * rank <= RANKS or tokens < TOKENS else "grouped"


def are_few(pairs: Pairs) -> bool:
    """Whether there are so few pairs: those of a decoding step."""
    return FEW * len(pairs.token) <= pairs.experts


OP = Op(
    "lora_experts",
    Backend("concat", "lora_experts.library:concat", always),
    Backend("grouped", "lora_experts.library:grouped", always),
    Backend("few", "lora_experts.library:few", always),
    Backend("cpu", "lora_experts.cpu:lora_experts", _cpu_lacks),
    Backend("reference", "lora_experts.reference:lora_experts", always),
)
SHRINK = Op(
    "lora_shrink",
    Backend("concat", "lora_experts.library:shrink_concat", always),
    Backend("grouped", "lora_experts.library:shrink_grouped", always),
    Backend("reference", "lora_experts.reference:lora_shrink", always),
)
EXPAND = Op(
    "lora_expand",
    Backend("concat", "lora_experts.library:expand_concat", always),
    Backend("grouped", "lora_experts.library:expand_grouped", always),
    Backend("few", "lora_experts.library:expand_few", always),
    Backend("reference", "lora_experts.reference:lora_expand", always),
)


def lora_experts(
    x: Tensor, pairs: Pairs, lora_a: Tensor, lora_b: Tensor, scale: Tensor, *, backend: str | None = None
) -> Tensor:
    """out_t = sum over pairs (t, e, w) of w * scale_e * B_e A_e x_t.

    Args:
        x: [T, D].
        lora_a: [E, r, D], or [1, r, D]: one for all experts.
        lora_b: [E, D', r].
        scale: [E] float32, without gradient.
        backend: `concat`, `grouped`, `few`, `cpu` (which has no way back) or `reference`; default: `cpu` for the few pairs of a
            decoding step, where it can, else what :func:`plan` says.

    Returns:
        [T, D'] in x's dtype. Differentiable in x, lora_a, lora_b and the pairs' weights.
    """
    if (
        not torch.compiler.is_compiling()
        and len(pairs.token) <= PAIRS
        and _cpu_lacks(x, pairs, lora_a, lora_b, scale) is None
    ):
        default = "cpu"
    else:
        default = "few" if are_few(pairs) else plan(len(x), pairs.experts, lora_a.shape[1])
    return OP.run(backend, x, pairs, lora_a, lora_b, scale, default=default)


def lora_shrink(x: Tensor, pairs: Pairs, lora_a: Tensor, *, backend: str | None = None) -> Tensor:
    """A_e x_t of each pair (t, e): [T, D] -> [P, r] in x's dtype; rows of empty pairs are zero. See :func:`lora_experts`."""
    return SHRINK.run(backend, x, pairs, lora_a, default=plan(len(x), pairs.experts, lora_a.shape[1]))


def lora_expand(low: Tensor, pairs: Pairs, lora_b: Tensor, scale: Tensor, *, backend: str | None = None) -> Tensor:
    """out_t = sum over pairs (t, e, w) of w * scale_e * B_e low of the pair: the second half of :func:`lora_experts`.

    Args:
        low: [P, r]; rows of empty pairs are not read.
        lora_b: [E, D', r].
        scale: [E] float32, without gradient.
        backend: `concat`, `grouped`, `few` or `reference`; default: `few` for few pairs, else `concat`.

    Returns:
        [T, D'] in low's dtype. Differentiable in low, lora_b and the pairs' weights.

    Raises:
        ValueError: there is no such back end.
    """
    # the product of all ranks accumulates onto few rows whatever E r is, so it is never grouped unasked
    return EXPAND.run(backend, low, pairs, lora_b, scale, default="few" if are_few(pairs) else "concat")
