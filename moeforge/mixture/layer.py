"""The module that stands at a site: router, experts, and what every token visits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .always import Always
from .context import MixtureContext
from .experts.base import Experts
from .joined import Joined
from .router import Router
from .routing import Routing
from .shared import Following, SharedInput


class MixtureLayer(nn.Module):
    """y = sum_e w_e(x) expert_e(x) + shared(x) + kept(x), each term where it exists.

    Args:
        router: decides here, or follows a decision made elsewhere in the block (moeforge.mixture.shared).
        name: how losses and metrics call this layer.
        kept: the module that stood at the site, if it stays.

    Attributes:
        shared_input: who else reads what this layer reads and goes where its tokens go; None: nobody.
    """

    def __init__(self, router: Router | Following | Always | Joined, experts: Experts, *, shared: nn.Module | None = None, kept: nn.Module | None = None,
                 name: str = "") -> None:  # fmt: skip
        super().__init__()
        self.router, self.experts, self.shared, self.kept = router, experts, shared, kept
        self.name = name
        self.context: MixtureContext | None = None
        self.shared_input: SharedInput | None = None

    def decide(self, hidden: Tensor) -> Routing:
        """What the router says of [..., D], noted in the context."""
        x = hidden.reshape(-1, hidden.shape[-1])
        context = self.context
        real, labels = (None, None) if context is None else context.of(len(x))
        routing = self.router(x, real=real, labels=labels, force=None if context is None else context.force)
        if context is not None and isinstance(self.router, Router):
            context.note(self.name, routing)
        return routing

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., D] -> [..., D'] (D' is D unless the site is one linear map); further arguments go to the module that stood here,
        if it stays."""
        routing = self.decide(hidden) if self.shared_input is None else self.shared_input.routing(hidden, self.name)
        made = self.experts(routing.scaled(self.experts.prepare(hidden)), routing.pairs)
        made = made.view(*hidden.shape[:-1], made.shape[-1])
        if self.shared is not None:
            made = made + self.shared(hidden)
        if self.kept is not None:
            made = made + self.kept(hidden, *args, **kwargs)
        return made
