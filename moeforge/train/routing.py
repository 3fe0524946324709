"""Find the routers of any mixture model, and watch them while it runs.

Our own mixtures say what they are. Of others nothing is known but their shape: a router owns `top_k` and an [E, D] weight and
stands beside the experts that it chooses among; its outputs are recognised by theirs. Both come out as the same Routing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..mixture.always import Always
from ..mixture.context import Force, MixtureContext
from ..mixture.experts.base import Experts
from ..mixture.layer import MixtureLayer
from ..mixture.router import Router
from ..mixture.routing import Routing, routing_of_choice
from ..mixture.select import Score
from ..mixture.shared import Following, SharedInput, SharedRouter


@dataclass(frozen=True)
class Site:
    """One router and what it chooses among.

    Attributes:
        name: module path of the block that holds router and experts; for a mixture of ours, its own name.
        banks: the experts; several where sites of a block share a decision.
        experts: E; `top_k`: K.
        scoring: how logits become probabilities.
        noting: the module of ours that leaves the Routing in a context; None for anyone else's.
    """

    name: str
    router: nn.Module
    banks: tuple[nn.Module, ...]
    experts: int
    top_k: int
    scoring: Score
    noting: MixtureLayer | SharedRouter | None = None

    @property
    def scored(self) -> bool:
        """Whether there are probabilities to balance: labels choose without, and where all tokens go one way nobody chooses."""
        return not isinstance(self.router, Always) and not self.asks

    @property
    def asks(self) -> bool:
        """Whether its router wants to know what tokens are about."""
        return isinstance(self.router, Router) and self.router.config.kind == "label"

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """What belongs to an expert; not the base that some kinds share."""
        for bank in self.banks:
            adopts = isinstance(bank, Experts) and bank.adopts
            yield from (param for name, param in bank.named_parameters() if not (adopts and name.startswith("base.")))


def find_sites(model: nn.Module) -> list[Site]:
    """Every mixture layer of the model, in order; empty for a dense model."""
    modules = list(model.named_modules())
    followed: dict[SharedRouter | SharedInput, list[nn.Module]] = {}
    for _, module in modules:
        if isinstance(module, MixtureLayer) and isinstance(module.router, Following):
            followed.setdefault(module.router.leader, []).append(module.experts)
    sites = []
    for name, block in modules:
        if isinstance(block, MixtureLayer) and isinstance(block.router, Router):
            others = () if block.shared_input is None else followed.get(block.shared_input, ())
            sites.append(_ours(block, block.router, (block.experts, *others)))
        elif isinstance(block, MixtureLayer) and isinstance(block.router, Always):
            sites.append(Site(block.name, block.router, (block.experts,), block.experts.count, 1, "softmax", block))
        elif isinstance(block, SharedRouter):
            sites.append(_ours(block, block.router, tuple(followed.get(block, ()))))
        else:
            children = dict(block.named_children())
            routers = [child for child in children.values() if _is_router(child)]
            banks = _banks(children)
            if len(routers) == 1 and len(banks) == 1:
                router: Any = routers[0]
                weight = next(p for p in router.parameters(recurse=False) if p.ndim == 2)
                sites.append(Site(name, router, (banks[0],), weight.shape[0], int(router.top_k), _scoring(router)))
    names = [site.name for site in sites]
    if len(set(names)) < len(names):
        raise ValueError(f"mixture layers must have names of their own; found {', '.join(sorted(names))}")
    return sites


def _ours(noting: MixtureLayer | SharedRouter, router: Router, banks: tuple[nn.Module, ...]) -> Site:
    return Site(noting.name, router, banks, router.experts, router.config.top_k, router.config.score, noting)


def _is_router(module: nn.Module) -> bool:
    return isinstance(getattr(module, "top_k", None), int) and any(
        p.ndim == 2 for p in module.parameters(recurse=False)
    )


def _banks(children: dict[str, nn.Module]) -> list[nn.Module]:
    """Experts are stacked in parameters of three axes; where they are compressed there are none, and the name tells them."""
    stacked = [child for child in children.values() if any(p.ndim == 3 for p in child.parameters(recurse=False))]
    return stacked or [child for name, child in children.items() if name == "experts"]


def _scoring(router: nn.Module) -> Score:
    """A selection-bias buffer is the mark of DeepSeek-V3's sigmoid routing; others say so by name."""
    declared = getattr(router, "expert_selection_fn", getattr(router, "scoring_func", None))
    if isinstance(declared, str):
        return "sigmoid" if declared == "sigmoid" else "softmax"
    return "sigmoid" if hasattr(router, "e_score_correction_bias") else "softmax"


def read_output(output: Any, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [T, E], weights [T, K], chosen experts [T, K]) out of a router's output tuple.

    transformers' routers return logits, weights and indices, of which the weights always stand in the middle.

    Raises:
        TypeError: it is no such tuple.
    """
    if isinstance(output, tuple) and len(output) == 3:
        for logits, weights, chosen in (output, output[::-1]):
            if not chosen.is_floating_point() and chosen.shape[-1] == top_k and logits.is_floating_point():
                return logits.flatten(0, -2), weights.reshape(-1, top_k), chosen.flatten(0, -2)
    raise TypeError("not a router: its output is no tuple of logits, weights and indices")


def contexts_of(sites: list[Site]) -> list[MixtureContext]:
    """What the mixtures of ours among the sites share."""
    contexts: list[MixtureContext] = []
    for site in sites:
        if site.noting is not None:
            if site.noting.context is None:  # a model that was put together by hand
                site.noting.context = contexts[0] if contexts else MixtureContext()
            if not any(context is site.noting.context for context in contexts):
                contexts.append(site.noting.context)
    return contexts


@contextlib.contextmanager
def forcing(sites: list[Site], force: Force | None) -> Iterator[None]:
    """See :meth:`moeforge.mixture.context.MixtureContext.forcing`."""
    with contextlib.ExitStack() as stack:
        for context in contexts_of(sites):
            stack.enter_context(context.forcing(force))
        yield


@contextlib.contextmanager
def watch(sites: list[Site], real: Tensor | None = None) -> Iterator[dict[str, Routing]]:
    """Record the routers while the block runs; what they said is there when it ends: site name -> Routing.

    Close it before `backward`: gradient checkpointing runs the layers a second time there.

    Args:
        real: [B, T] or [T] bool, False for padding.
    """
    outputs: dict[str, Any] = {}
    seen: dict[str, Routing] = {}

    def note(site: Site, output: Any) -> None:
        # kept as it is: gradient checkpointing must find the same operations when it runs the layer without this hook
        outputs[site.name] = output

    contexts = contexts_of(sites)
    hooks = [site.router.register_forward_hook(lambda _m, _i, output, site=site: note(site, output))
             for site in sites if site.noting is None]  # fmt: skip
    try:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context.record(real))
            yield seen
    finally:
        for hook in hooks:
            hook.remove()
    noted = {name: routing for context in contexts for name, routing in context.seen.items()}
    flat = None if real is None else real.flatten()
    for site in sites:
        if site.name in outputs:
            logits, weights, chosen = read_output(outputs[site.name], site.top_k)
            seen[site.name] = routing_of_choice(logits, weights, chosen, site.experts, site.scoring, flat)
        elif site.name in noted:
            seen[site.name] = noted[site.name]
