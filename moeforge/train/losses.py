"""The task's loss; what routers are trained with beside it is in moeforge.mixture.losses."""

from __future__ import annotations

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
