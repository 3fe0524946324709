"""The module that stands at a site: router, experts, and what every token visits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .context import MixtureContext
from .experts.base import Experts
from .router import Router


class MixtureLayer(nn.Module):
    """y = sum_e w_e(x) expert_e(x) + shared(x) + kept(x), each term where it exists.

    Args:
        name: how losses and metrics call this layer.
        kept: the module that stood at the site, if it stays.
    """

    def __init__(self, router: Router, experts: Experts, *, shared: nn.Module | None = None, kept: nn.Module | None = None,
                 name: str = "") -> None:  # fmt: skip
        super().__init__()
        self.router, self.experts, self.shared, self.kept = router, experts, shared, kept
        self.name = name
        self.context: MixtureContext | None = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., D] -> [..., D]; further arguments go to the module that stood here, if it stays."""
        x = hidden.reshape(-1, hidden.shape[-1])
        context = self.context
        real = context.real if context is not None and _fits(context.real, x) else None
        labels = context.labels if context is not None and _fits(context.labels, x) else None
        routing = self.router(x, real=real, labels=labels)
        if context is not None:
            context.note(self.name, routing)
        made = self.experts(x, routing.pairs).view_as(hidden)
        if self.shared is not None:
            made = made + self.shared(hidden)
        if self.kept is not None:
            made = made + self.kept(hidden, *args, **kwargs)
        return made


def _fits(values: Tensor | None, x: Tensor) -> bool:
    """A mask of the whole prompt does not describe the one token of a decoding step."""
    return values is not None and values.shape[0] == x.shape[0]
