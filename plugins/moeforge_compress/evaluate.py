"""What compression costs: perplexity before and after, and the KL divergence from the parent, on real text."""

from __future__ import annotations

from typing import Any

from moeforge.checkpoint.base import Checkpoint
from moeforge.pipeline.context import Context

TEXT = "builtin:prose"
WINDOW = 256
"""Tokens of one window of the text."""


def evaluate(parent: Checkpoint, child: Checkpoint, tokens: int, ctx: Context) -> dict[str, Any]:
    """Both models in float32, one decoder layer in memory at a time.

    Args:
        child: the compressed checkpoint, decoded on read.

    Returns:
        perplexity of both, mean KL(parent || child) in nats a token, and the share of tokens with the same favourite.
    """
    from moeforge.train.data import find_documents
    from moeforge.train.evaluation import Setting, measure

    setting = Setting(WINDOW, tokens, rows=4, memory="layers", dtype="float32")
    found = measure(find_documents([TEXT]), child, parent, setting, ctx).values
    return {
        "perplexity": found["perplexity"], "perplexity_parent": found["against_perplexity"], "kl_to_parent": found["kl"],
        "top1_agreement": found["agreement"], "eval_tokens": found["tokens"], "eval_text": TEXT,
    }  # fmt: skip
