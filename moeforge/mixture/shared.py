"""One decision for several sites of a block: linear maps that read one tensor, heads that are chosen by what the block is given.

A router that stands at a site reads that site's input. Where several sites of a block read the same one, a SharedInput makes the
router of one of them decide for all, when the first of them is asked. Where a method routes by what the block is given instead, the
block owns a SharedRouter, which decides before the block runs. Under gradient checkpointing the block runs again inside backward
and decides again from the same input, so nothing is kept between the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import BadInput
from .context import MixtureContext
from .router import Router
from .routing import Routing

if TYPE_CHECKING:
    from .layer import MixtureLayer


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


class SharedInput:
    """Sites of a block that read one tensor, and what the router of one of them decided about it.

    Args:
        leader: the mixture whose router it is; losses and statistics know the decision by its name, once.
        block: runs all of the sites; the decision is forgotten when it starts and when it ends, however it ends.
    """

    def __init__(self, leader: MixtureLayer, block: nn.Module) -> None:
        self.leader = leader
        self.reader = ""
        self.read: Tensor | None = None
        self.decided: Routing | None = None
        block.register_forward_pre_hook(self._forget)
        block.register_forward_hook(self._forget, always_call=True)

    @property
    def name(self) -> str:
        return self.leader.name

    def routing(self, hidden: Tensor, site: str) -> Routing:
        """The decision about what a site reads, [..., D].

        Raises:
            BadInput: another tensor than the site before it has read.
        """
        if self.decided is None:
            self.reader, self.read, self.decided = site, hidden, self.leader.decide(hidden)
        elif self.read is not hidden:
            raise BadInput(f"{self.reader} and {site} share a router (router.input = 'shared'), and read different tensors in this model; give each "
                           "its own: router.input = 'site'")  # fmt: skip
        return self.decided

    def _forget(self, *_: Any) -> None:
        self.read = self.decided = None


class Following(nn.Module):
    """Stands where a router would and repeats what is decided elsewhere; who decides is no child of this one."""

    def __init__(self, leader: SharedRouter | SharedInput) -> None:
        super().__init__()
        self._leader = (leader,)  # in a tuple, as a child would be saved twice

    @property
    def leader(self) -> SharedRouter | SharedInput:
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
