"""Learning from another model's distributions beside the text's own tokens: distillation (Hinton, Vinyals and Dean, arXiv:1503.02531)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Batch, forward
from .estimate import PIECE
from .routing import Site, find_sites


@dataclass(frozen=True)
class Teacher:
    """A model that is asked and does not learn: frozen, in evaluation mode, with routers and contexts of its own.

    Attributes:
        sites: its mixtures of ours, which may want to know what tokens are about; what its routers say is left where it is.
    """

    model: nn.Module
    sites: list[Site]

    @classmethod
    def of(cls, model: nn.Module) -> Teacher:
        """Freezes the model."""
        model.eval().requires_grad_(False)
        return cls(model, [site for site in find_sites(model) if site.noting is not None])

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """[B, T, V] in the teacher's precision."""
        return forward(self.model, self.sites, batch)[0]


def divergence_sum(
    logits: Tensor, taught: Tensor, labels: Tensor, temperature: float = 1.0, ignore: int = -100
) -> Tensor:
    """T^2 KL(teacher || student) in nats, of distributions softmax(logits / T), summed over the tokens that have a label; computed in
    float32 (float64 stays).

    T^2 makes up for the gradient, which is T (softmax(student / T) - softmax(teacher / T)) and would shrink as 1 / T^2 without it
    (arXiv:1503.02531, section 2.1). The gradient is made along with the value, a few tokens at a time, and lies where the teacher's logits
    were: beside these [tokens, V] in the logits' own type, and their multiple in the backward pass, some 100 MB at most are held.

    Args:
        logits: [..., V], the student's.
        taught: [..., V], the teacher's; overwritten.
        labels: [...], already shifted; `ignore` where nothing is predicted.
        temperature: T, above 0: above 1 what the teacher thinks unlikely counts more.
    """
    return _Divergence.apply(logits, taught, labels, temperature, ignore)  # pyright: ignore[reportReturnType]


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, taught: Tensor, labels: Tensor, temperature: float, ignore: int) -> Tensor:
        student, teacher = (values.reshape(-1, values.shape[-1]) for values in (logits, taught))
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        pull = teacher if teacher.dtype == logits.dtype else torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        known = labels.reshape(-1) != ignore
        for rows in _some(known, student.shape[-1]):
            mine, theirs = (values[rows].to(wide).div_(temperature).log_softmax(-1) for values in (student, teacher))
            chance = theirs.exp()
            # what the teacher holds impossible adds nothing, however impossible the student holds it
            total += (chance * (theirs - mine)).masked_fill_(chance == 0, 0).sum(dtype=torch.float64)
            pull[rows] = mine.exp_().sub_(chance).mul_(temperature).to(pull.dtype)
        pull.masked_fill_(~known[:, None], 0)
        ctx.save_for_backward(pull.view_as(logits))
        return (total * temperature**2).to(wide)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (pull,) = ctx.saved_tensors
        # a number, not a tensor: that would be rounded to bfloat16 first
        return pull * float(gradients[0]), None, None, None, None


def _some(known: Tensor, vocabulary: int) -> Iterator[Tensor]:
    """The indices of the tokens that count, [n] at a time."""
    return iter(known.nonzero().flatten().split(max(1, PIECE // vocabulary)))
