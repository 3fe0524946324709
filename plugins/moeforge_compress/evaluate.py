"""What compression costs: perplexity before and after, and the KL divergence from the parent, on real text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from moeforge.checkpoint.base import Checkpoint
from moeforge.pipeline.context import Context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 256
"""Tokens of one sequence of the text."""


def windows(tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[list[int]]:
    """About `tokens` token ids of CPython's own reference prose (`pydoc_data.topics`), in windows spread evenly over it."""
    from pydoc_data.topics import topics

    count = max(1, tokens // WINDOW)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    step = len(text) // count
    # 16 characters a token is far more than any tokenizer needs, so a window is never short
    pieces = [text[i * step : i * step + 16 * WINDOW] for i in range(count)]
    return [tokenizer.encode(piece, add_special_tokens=False)[:WINDOW] for piece in pieces]


def evaluate(parent: Checkpoint, child: Checkpoint, tokens: int, ctx: Context) -> dict[str, Any]:
    """Both models in float32, one decoder layer in memory at a time.

    Args:
        child: the compressed checkpoint, decoded on read.

    Returns:
        perplexity of both, mean KL(parent || child) in nats a token, and the share of tokens with the same favourite.
    """
    from moeforge.model.proof import prove
    from moeforge.model.tokenizer import load_tokenizer

    text = windows(load_tokenizer(parent), tokens)
    proof = prove(parent, child, tokens=4, text=text, ctx=ctx)
    assert proof.cross_entropy is not None and proof.text_kl is not None
    before, after = (math.exp(loss) for loss in proof.cross_entropy)
    return {
        "perplexity": after, "perplexity_parent": before, "kl_to_parent": proof.text_kl,
        "top1_agreement": proof.argmax_equal, "eval_tokens": sum(map(len, text)), "eval_text": "pydoc_data.topics",
    }  # fmt: skip
