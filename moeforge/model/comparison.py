"""How well a model predicts tokens and how far the logits of two models are apart, summed up over many tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class Prediction:
    """Sums over the tokens that one model had to predict.

    Attributes:
        loss: cross-entropy, nats.
        right: tokens that were the model's favourite.
    """

    tokens: int = 0
    loss: float = 0.0
    right: int = 0

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """logits: [N, V]; targets: [N], the tokens that came."""
        wide = _precise(logits)
        self.tokens += len(targets)
        self.loss -= float(wide.log_softmax(1).gather(1, targets[:, None]).sum())
        self.right += int((wide.argmax(1) == targets).sum())

    def join(self, other: Prediction) -> None:
        """Count another one's tokens, too."""
        self.tokens += other.tokens
        self.loss += other.loss
        self.right += other.right


@dataclass
class Comparison:
    """Sums over the logits of two models, the first of which is the reference.

    Attributes:
        agreed: tokens on which the second model's favourite is one of the first one's.
        kl, kl_max: sum and largest of KL(first || second), nats.
        difference, scale: max|dlogit| and max|logit| of the first.
        first, second: how well each predicts, where the tokens that came are known.
    """

    tokens: int = 0
    agreed: int = 0
    kl: float = 0.0
    kl_max: float = 0.0
    difference: float = 0.0
    scale: float = 0.0
    first: Prediction = field(default_factory=Prediction)
    second: Prediction = field(default_factory=Prediction)

    @classmethod
    def joined(cls, parts: Iterable[Comparison]) -> Comparison:
        """All their tokens in one."""
        whole = cls()
        for part in parts:
            whole.tokens += part.tokens
            whole.agreed += part.agreed
            whole.kl += part.kl
            whole.kl_max = worst(whole.kl_max, part.kl_max)
            whole.difference = worst(whole.difference, part.difference)
            whole.scale = worst(whole.scale, part.scale)
            whole.first.join(part.first)
            whole.second.join(part.second)
        return whole

    def add(self, first: torch.Tensor, second: torch.Tensor, targets: torch.Tensor | None = None) -> None:
        """first, second: [N, V] (V may differ by unused ids, which are left out of what compares the two); targets: [N],
        the tokens that came, negative where none is known."""
        if targets is not None:
            known = targets >= 0
            for prediction, logits in ((self.first, first), (self.second, second)):
                prediction.add(logits[known], targets[known])
        common = min(first.shape[1], second.shape[1])
        a, b = _precise(first[:, :common]), _precise(second[:, :common])
        self.tokens += len(a)
        self.difference = worst(self.difference, float((a - b).abs().max()))
        self.scale = worst(self.scale, float(a.abs().max()))
        # an exact tie in the reference is no disagreement: either choice has the largest logit
        chosen = a.gather(1, b.argmax(1, keepdim=True))
        self.agreed += int((chosen == a.amax(1, keepdim=True)).sum())
        p, q = a.log_softmax(1), b.log_softmax(1)
        kl = (p.exp() * (p - q)).sum(1)
        self.kl += float(kl.sum())
        self.kl_max = worst(self.kl_max, float(kl.max()))

    def add_values(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """first, second: [N, D] that are no logits, so that nothing is chosen among."""
        a, b = _precise(first), _precise(second)
        self.tokens += len(a)
        self.agreed += len(a)
        self.difference = worst(self.difference, float((a - b).abs().max()))
        self.scale = worst(self.scale, float(a.abs().max()))

    @property
    def finite(self) -> bool:
        losses = (self.first.loss, self.second.loss)
        return all(map(math.isfinite, (self.difference, self.scale, self.kl, self.kl_max, *losses)))

    @property
    def relative_error(self) -> float:
        """max|dlogit| / max|logit|; infinite where one of them is not finite, or the reference is zero."""
        if not (math.isfinite(self.difference) and math.isfinite(self.scale) and self.scale > 0):
            return math.inf
        return self.difference / self.scale


def _precise(logits: torch.Tensor) -> torch.Tensor:
    """float64, so that a divergence of 1e-9 is one; float32 where the device has nothing wider."""
    return logits.float() if logits.device.type == "mps" else logits.double()


def worst(a: float, b: float) -> float:
    """The larger of two numbers, NaN if either is."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
