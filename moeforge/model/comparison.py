"""How far the logits of two models are apart, summed up over many tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

POSITIONS = 8
"""Tokens whose float64 distributions are held at once."""


class Comparison:
    """Sums over the logits of two models, in float64."""

    def __init__(self) -> None:
        self.tokens = self.disagreements = self.text_tokens = self.predicted = 0
        self.kl_sum = self.kl_max = self.text_kl = self.difference = self.scale = 0.0
        self.loss = [0.0, 0.0]

    def add(self, first: torch.Tensor, second: torch.Tensor, targets: torch.Tensor | None) -> float:
        """first, second: [B, t, V]; `targets` [B, t] holds the next tokens of real text, -1 where there is none. Returns
        max|dlogit|."""
        vocabulary = min(first.shape[-1], second.shape[-1])
        flat = [side.flatten(0, 1)[:, :vocabulary] for side in (first, second)]
        known = None if targets is None else targets.flatten()
        largest = 0.0
        for start in range(0, len(flat[0]), POSITIONS):
            rows = slice(start, start + POSITIONS)
            a, b = (side[rows].double() for side in flat)
            largest = worst(largest, self._rows(a, b, None if known is None else known[rows]))
        return largest

    def _rows(self, a: torch.Tensor, b: torch.Tensor, targets: torch.Tensor | None) -> float:
        difference = float((a - b).abs().max())
        self.difference = worst(self.difference, difference)
        self.scale = worst(self.scale, float(a.abs().max()))
        # an exact tie in the reference is no disagreement: either choice has the largest logit
        chosen = a.gather(1, b.argmax(1, keepdim=True))
        self.disagreements += int((~(chosen == a.amax(1, keepdim=True))).sum())
        p, q = a.log_softmax(1), b.log_softmax(1)
        kl = (p.exp() * (p - q)).sum(1)
        self.tokens += len(a)
        self.kl_sum += float(kl.sum())
        self.kl_max = worst(self.kl_max, float(kl.max()))
        if targets is not None:
            self.text_tokens += len(a)
            self.text_kl += float(kl.sum())
            known = targets >= 0
            self.predicted += int(known.sum())
            for i, logp in enumerate((p, q)):
                self.loss[i] -= float(logp[known].gather(1, targets[known, None]).sum())
        return difference

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.difference, self.scale, self.kl_sum, self.kl_max, *self.loss)))

    @property
    def relative_error(self) -> float:
        if not (math.isfinite(self.difference) and math.isfinite(self.scale) and self.scale > 0):
            return math.inf
        return self.difference / self.scale


def worst(a: float, b: float) -> float:
    """The larger of two numbers, NaN if either is."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
