"""One decision for several sites of a block: q, k, v and o that share a choice, heads that are chosen by what the block is given.

A router that stands at a site reads that site's input. Where a method routes by the block's input instead, the block owns a
SharedRouter, which decides before the block runs; the mixtures at its sites follow. Under gradient checkpointing the block runs
again inside backward and decides again from the same input, so nothing is kept between the two.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .context import MixtureContext
from .router import Router
from .routing import Routing


class SharedRouter(nn.Module):
    """Decides at the entrance of a block.

    Args:
        name: how losses and metrics call it: noted once, however many sites follow.
    """

    def __init__(self, router: Router, name: str = "") -> None:
        super().__init__()
        self.router, self.name = router, name
        self.context: MixtureContext | None = None
        self.decided: Routing | None = None

    def stand_before(self, block: nn.Module, child: str = "shared_router") -> None:
        """Become a child of `block` and decide from its first argument (or `hidden_states`) each time it runs."""
        block.add_module(child, self)
        block.register_forward_pre_hook(self._decide, with_kwargs=True)
        block.register_forward_hook(self._forget, always_call=True)

    def _decide(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        x = hidden.reshape(-1, hidden.shape[-1])
        context = self.context
        real, labels = (None, None) if context is None else context.of(len(x))
        decided: Routing = self.router(x, real=real, labels=labels, force=None if context is None else context.force)
        if self.context is not None:
            self.context.note(self.name, decided)
        self.decided = decided

    def _forget(self, *_: Any) -> None:
        self.decided = None


class Following(nn.Module):
    """Stands where a router would and repeats the block's decision; the SharedRouter stays the block's child, not this one's."""

    def __init__(self, leader: SharedRouter) -> None:
        super().__init__()
        self._leader = (leader,)  # in a tuple, as a child would be saved twice

    @property
    def leader(self) -> SharedRouter:
        """Who decides."""
        return self._leader[0]

    def forward(self, x: Tensor, **_: Any) -> Routing:
        decided = self._leader[0].decided
        if decided is None or decided.pairs.tokens != len(x):
            found = "nothing yet" if decided is None else f"{decided.pairs.tokens} tokens"
            raise RuntimeError(
                f"{len(x)} tokens follow {self._leader[0].name or 'a shared router'}, which has decided on {found}"
            )
        return decided
