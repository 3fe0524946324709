"""The losses, as plain torch functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def token_loss_sum(logits: Tensor, labels: Tensor, ignore: int = -100) -> Tensor:
    """Cross-entropy in nats, summed over the tokens that have a label; computed in float32 (float64 stays).

    Args:
        logits: [..., V].
        labels: [...], already shifted; `ignore` where nothing is predicted.
    """
    logits = logits.reshape(-1, logits.shape[-1])
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, labels.reshape(-1), ignore_index=ignore, reduction="sum")


def balance_loss(probabilities: Tensor, fraction: Tensor) -> Tensor:
    """E * sum_e f_e P_e: 1 when tokens and probability are spread evenly, E at worst (Switch Transformer,
    arXiv:2101.03961, equation 4; top-k assignments are counted as in GShard's successors, each 1/k).

    Args:
        probabilities: P [E], mean router probability over real tokens.
        fraction: f [E], share of assignments; sums to 1; carries no gradient.
    """
    return probabilities.shape[-1] * (probabilities * fraction.detach()).sum(-1)


def z_loss(logits: Tensor) -> Tensor:
    """logsumexp(logits)^2, summed over tokens: keeps router logits small (ST-MoE, arXiv:2202.08906, equation 5).

    Args:
        logits: [T, E] of real tokens.
    """
    return torch.logsumexp(logits.float() if logits.dtype != torch.float64 else logits, -1).square().sum()


def router_probabilities(logits: Tensor, scoring: str) -> Tensor:
    """Router probabilities [T, E] that sum to 1 for each token.

    `softmax` of the logits, or `sigmoid` scores divided by their sum (DeepSeek-V3, arXiv:2412.19437, equation 18).
    """
    logits = logits.float() if logits.dtype != torch.float64 else logits
    if scoring == "sigmoid":
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    return logits.softmax(-1)


def router_losses(logits: Sequence[Tensor], counts: Sequence[Tensor], real: Tensor,
                  scoring: Sequence[str]) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Balance loss and z-loss, each a sum over layers of a mean over real tokens.

    Args:
        logits: per layer [B*T, E].
        counts: per layer [E], assignments of real tokens to experts so far in this step, over micro-batches and ranks:
            with accumulation the fractions then converge to those of the whole step, not of a sliver of it
            (arXiv:2501.11873, section 3).
        real: [B*T] bool; padding is left out of every mean.
        scoring: per layer, see :func:`router_probabilities`.
    """
    balance = z = logits[0].new_zeros(())
    for layer, count, kind in zip(logits, counts, scoring, strict=True):
        layer = layer[real]
        probabilities = router_probabilities(layer, kind).mean(0)
        fraction = count.to(probabilities.dtype) / count.sum().clamp_min(1)
        balance = balance + balance_loss(probabilities, fraction)
        z = z + z_loss(layer) / max(len(layer), 1)
    return balance, z
