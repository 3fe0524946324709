"""What a tensor is for, told from its name: whole name components are compared, never substrings.

`gate` is a router and `gate_proj` is not; a rule that looked for "gate" anywhere would take the one for the other. Works on
checkpoints of any family, mixtures included, without knowing the family.
"""

from __future__ import annotations

import re
from typing import Literal

from .tensor import TensorInfo

Role = Literal[
    "attention",
    "feed-forward",
    "experts",
    "shared experts",
    "routers",
    "norms and biases",
    "embeddings",
    "lm_head",
    "other",
]

_FFN = frozenset({"mlp", "feed_forward", "ffn", "block_sparse_moe", "moe"})
_BY_COMPONENT: tuple[tuple[Role, frozenset[str]], ...] = (
    ("embeddings", frozenset({"embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "embed_positions", "position_embeddings"})),
    ("lm_head", frozenset({"lm_head", "embed_out"})),
    ("routers", frozenset({"gate", "router", "shared_expert_gate", "e_score_correction_bias"})),
    ("shared experts", frozenset({"shared_expert", "shared_experts", "shared_mlp"})),
    ("experts", frozenset({"experts"})),
    ("attention", frozenset({"self_attn", "attn", "attention", "self_attention", "linear_attn", "cross_attn"})),
    ("feed-forward", _FFN),
)  # fmt: skip
_PLACE = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.(?:(?:.*\.)?experts\.(\d+)\.)?")


def role_of(info: TensorInfo) -> Role:
    """The role of one tensor; the first rule that fits wins, in the order embeddings, head, routers, norms, experts, ..."""
    parts = set(info.name.split("."))
    small = len(info.shape) < 2 or _is_bias(info.name)
    for role, names in _BY_COMPONENT:
        if role == "shared experts" and small and "experts" not in parts:
            return "norms and biases"
        if parts & names:
            # some families stack experts without saying so: [E, out, in] straight below the feed-forward block
            return "experts" if role == "feed-forward" and len(info.shape) == 3 else role
    return "other"


def is_matrix(info: TensorInfo) -> bool:
    """True for what a linear layer multiplies with: `[out, in]`, or `[E, ...]` where experts are stored fused."""
    if _is_bias(info.name):
        return False
    return len(info.shape) == 2 or (len(info.shape) == 3 and role_of(info) == "experts")


def _is_bias(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf == "bias" or leaf.endswith("_bias")


def place_of(name: str) -> tuple[int | None, int | None]:
    """(layer, expert) that a tensor's name says it belongs to; None for what the name does not say."""
    match = _PLACE.search(name)
    if match is None:
        return None, None
    return int(match[1]), int(match[2]) if match[2] is not None else None
