"""Find the routers of any mixture model, and watch them while it runs.

Nothing is known of model types: a router is recognised by its shape (owns `top_k` and an [E, D] weight, stands beside the
experts that it chooses among), and its outputs by theirs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """One mixture layer.

    Attributes:
        name: module path of the block that holds router and experts.
        experts: E; `top_k`: K.
        scoring: how logits become probabilities, `softmax` or `sigmoid`.
    """

    name: str
    router: nn.Module
    bank: nn.Module
    experts: int
    top_k: int
    scoring: str


def find_sites(model: nn.Module) -> list[Site]:
    """Every mixture layer of the model, in order; empty for a dense model."""
    sites = []
    for name, block in model.named_modules():
        children = dict(block.named_children())
        routers = [child for child in children.values() if _is_router(child)]
        banks = [child for child in children.values() if any(p.ndim == 3 for p in child.parameters(recurse=False))]
        if len(routers) == 1 and len(banks) == 1:
            router: Any = routers[0]
            weight = next(p for p in router.parameters(recurse=False) if p.ndim == 2)
            sites.append(Site(name, router, banks[0], weight.shape[0], int(router.top_k), _scoring(router)))
    return sites


def _is_router(module: nn.Module) -> bool:
    return isinstance(getattr(module, "top_k", None), int) and any(
        p.ndim == 2 for p in module.parameters(recurse=False)
    )


def _scoring(router: nn.Module) -> str:
    """A selection-bias buffer is the mark of DeepSeek-V3's sigmoid routing; others say so by name."""
    declared = getattr(router, "expert_selection_fn", getattr(router, "scoring_func", None))
    if isinstance(declared, str):
        return declared
    return "sigmoid" if hasattr(router, "e_score_correction_bias") else "softmax"


def read_output(output: Any, top_k: int) -> tuple[Tensor, Tensor]:
    """(logits [T, E], chosen experts [T, K]) out of a router's output tuple.

    transformers' routers return logits, weights and indices, of which the weights always stand in the middle.

    Raises:
        TypeError: it is no such tuple.
    """
    if isinstance(output, tuple) and len(output) == 3:
        for logits, _, chosen in (output, output[::-1]):
            if not chosen.is_floating_point() and chosen.shape[-1] == top_k and logits.is_floating_point():
                return logits.flatten(0, -2), chosen.flatten(0, -2)
    raise TypeError("not a router: its output is no tuple of logits, weights and indices")


@dataclass
class Watch:
    """What the routers said during one forward pass: per layer logits [B*T, E] and chosen experts [B*T, K]."""

    sites: list[Site]
    logits: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)

    def counts(self, real: Tensor) -> list[Tensor]:
        """Assignments to each expert, per layer [E] float64, over the tokens where `real` [B*T] is set."""
        return [torch.bincount(chosen[real].flatten(), minlength=site.experts).double()
                for site, chosen in zip(self.sites, self.chosen, strict=True)]  # fmt: skip


@contextlib.contextmanager
def watch(sites: list[Site]) -> Iterator[Watch]:
    """Record the routers while the block runs.

    Close it before `backward`: gradient checkpointing runs the layers a second time there.
    """
    seen = Watch(sites)

    def note(site: Site, output: Any) -> None:
        logits, chosen = read_output(output, site.top_k)
        seen.logits.append(logits)
        seen.chosen.append(chosen)

    hooks = [site.router.register_forward_hook(lambda _m, _i, output, site=site: note(site, output)) for site in sites]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
