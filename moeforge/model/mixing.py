"""Put mixtures at the sites of a model, and tell their routers which tokens are real."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import registry
from ..checkpoint.adapter_layout import deciders
from ..errors import BadInput
from ..mixture.always import Always
from ..mixture.config import MixtureConfig, RouterConfig
from ..mixture.context import MixtureContext
from ..mixture.experts import KINDS
from ..mixture.experts.base import Experts, Place
from ..mixture.experts.feed_forward import FeedForward
from ..mixture.joined import KIND as JOINED
from ..mixture.joined import Joined
from ..mixture.layer import MixtureLayer
from ..mixture.router import Router
from ..mixture.shared import Following, SharedInput
from .sites import FFN, Site, common_path, find_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LABELS = "mixture_labels"
"""The keyword argument of a model with mixtures that says what every token is about: [B, T] integers, or [B, 1]
where all tokens of a row are about one thing, which `generate` hands on to every step."""


def experts_class(kind: str) -> type[Experts]:
    """The class of a type of experts, ours or a package's.

    Raises:
        UsageProblem: nobody or more than one provides it.
    """
    if kind in KINDS:
        return registry.load_object(KINDS[kind])
    return registry.find(registry.MIXTURES, kind, "type of experts").load()


def find_all(
    model: PreTrainedModel, entries: Sequence[MixtureConfig], *, nested: bool = False
) -> list[tuple[MixtureConfig, Site]]:
    """The site of every mixture, in the order in which they are put in.

    Args:
        nested: a mixture may stand at a linear map of a network that another one is built on, which then takes that mixture for
            the map. Nothing in memory tells their tensors apart by name, so such a model is not for saving.

    Raises:
        BadInput: a site that is not there, or two mixtures in one place.
    """
    found = [(entry, site) for entry in entries for site in find_sites(model, entry.site, entry.layers)]
    if nested:
        return sorted(found, key=lambda item: len(item[1].projections))
    taken: dict[str, Site] = {}
    for _, site in found:
        inside = next((other for path, other in taken.items() if _overlap(path, site.mount)), None)
        if inside is not None:
            raise BadInput(
                f"mixtures: {site.name} and {inside.name} of layer {site.layer} would stand in one place, {site.mount}"
            )
        taken |= dict.fromkeys((site.mount, *site.silenced), site)
    return found


def install(model: Any, found: Sequence[tuple[MixtureConfig, Site]], *, copy: bool = False) -> None:
    """Replace modules by mixtures. Afterwards `model.mixtures` maps where they stand to (site, layer).

    Args:
        copy: experts start as copies of what stood there; otherwise they, and what the dense model does not know, start at random.
    """
    contexts: dict[str, MixtureContext] = {}
    model.mixtures = {}
    for entry, site in found:
        stood = _Stood(model, site)
        layer = _layer(entry, site)
        layer.kept = stood.kept() if entry.keep else None
        std = float(getattr(model.config, "initializer_range", 0.02))
        layer.experts.reset_parameters(std)
        for shared in [] if layer.shared is None else layer.shared.parameters():
            nn.init.normal_(shared, std=std) if shared.ndim > 1 else nn.init.zeros_(shared)
        if copy and not layer.experts.adopts:
            stood.copy_into(layer.experts)
        # a map whose weights are packed computes in the model's own type
        dtype = stood.weight.dtype if stood.weight.is_floating_point() else model.dtype
        layer.to(device=stood.weight.device, dtype=dtype).train(model.training)
        layer.experts.adopt(stood.linear_maps(), site.activation)
        layer.context = contexts.setdefault(site.tower, MixtureContext())
        if isinstance(layer.router, Joined):
            layer.router.context = layer.context
        for path in site.silenced:
            _replace(model, path, nn.Identity())
        _replace(model, site.mount, layer)
        model.mixtures[site.mount] = (site, layer)
    _share_routers(model, found)
    main = next((context for tower, context in contexts.items() if tower in ("", "text")), None)
    model.mixture_context = main
    if main is not None:
        feeder = _Feeder(main, model)
        model.register_forward_pre_hook(feeder.begin, with_kwargs=True)


def _share_routers(model: Any, found: Sequence[tuple[MixtureConfig, Site]]) -> None:
    """Sites of a layer that read one tensor, where their entries say so, get one router: that of the first."""
    followed = deciders([entry.as_json() for entry, _ in found], type(model).__name__)
    at = {(entry.site, site.layer): site for entry, site in found}
    inputs: dict[str, SharedInput] = {}
    for (kind, number), first in followed.items():
        leader: MixtureLayer = model.mixtures[at[first, number].mount][1]
        if leader.name not in inputs:
            block = common_path(
                at[role, n].mount for (role, n) in at if n == number and followed.get((role, n), role) == first
            )
            inputs[leader.name] = leader.shared_input = SharedInput(leader, model.get_submodule(block))
        follower: MixtureLayer = model.mixtures[at[kind, number].mount][1]
        follower.shared_input = inputs[leader.name]
        follower.router = Following(inputs[leader.name])


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def stand_in(model: nn.Module, entry: MixtureConfig, site: Site) -> MixtureLayer:
    """The layer of an entry at a site, built on what stands there and not put in its place; values are not set.

    Raises:
        BadInput: the entry and the site do not suit each other.
    """
    stood = _Stood(model, site)
    layer = _layer(entry, site)
    layer.experts.adopt(stood.linear_maps(), site.activation)
    return layer


def _layer(entry: MixtureConfig, site: Site) -> MixtureLayer:
    place = Place(site.width, site.out_width, {role: site.below(role) for role in site.projections},
                  any(p.transposed for p in site.projections.values()), site.root)  # fmt: skip
    kind = experts_class(entry.experts.type)
    if kind.adopts and site.kind == FFN and entry.experts.width != site.ffn_width:
        raise BadInput(f"experts of type {entry.experts.type!r} at {site.root}: width = {entry.experts.width}: they are built on the network "
                       f"there, which is {site.ffn_width} wide")  # fmt: skip
    experts = kind.at(place, entry.experts)
    shared = None if entry.shared is None else FeedForward.at(place, entry.shared)
    return MixtureLayer(_router(entry.router, site.width, entry.experts.count), experts, shared=shared, name=site.root)


def _router(config: RouterConfig, width: int, experts: int) -> Always | Joined | Router:
    if config.kind == "always":
        return Always()
    return (Joined if config.kind == JOINED else Router)(config, width, experts)


class _Stood:
    """What stands at a site before the mixture does."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        self.site = site
        self.module = model.get_submodule(site.mount)
        self.maps = {role: model.get_submodule(p.path) for role, p in site.projections.items()}
        self.weight: Tensor = next(next(iter(self.maps.values())).parameters())

    def kept(self) -> nn.Module:
        """The module to keep: itself, or the network that its linear maps make where they lie in several modules."""
        if self.site.kind != FFN or self.site.mount == self.site.root:
            return self.module
        assert self.site.activation is not None
        return FeedForward(self.linear_maps(), self.site.activation)

    def linear_maps(self) -> dict[str, tuple[str, nn.Module]]:
        """Role -> (path below the site's root, module)."""
        return {role: (self.site.below(role), module) for role, module in self.maps.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name below the site's root -> value."""
        for role, module in self.maps.items():
            for leaf, value in module.named_parameters():
                yield ".".join(filter(None, (self.site.below(role), leaf))), value

    @torch.no_grad()
    def copy_into(self, experts: Experts) -> None:
        """Every expert gets what the dense model holds under the names of its parts; parts that it lacks stay as they are.

        Raises:
            BadInput: experts of another shape.
        """
        dense = dict(self.tensors())
        for name, stored in experts.stored().items():
            if not all(part in dense for part in stored.parts):
                continue
            parts = [dense[part].T if stored.transposed else dense[part] for part in stored.parts]
            target = experts.get_parameter(name)
            value = torch.cat(parts)
            if value.shape != target.shape[0 if stored.shared else 1 :]:
                raise BadInput(
                    f"{self.site.root}: copies of {' and '.join(stored.parts)} are {list(value.shape)}, an expert has "
                    f"{list(target.shape[1:])}; give experts the dense width, or copy = False"
                )
            target.copy_(value.expand_as(target))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    owner = model.get_submodule(holder)
    owner.__dict__.pop(name, None)  # an activation may be a plain function
    setattr(owner, name, module)


class _Feeder:
    """Tells a model's routers about the tokens of a forward pass before it starts.

    Nothing is undone after it: gradient checkpointing runs layers again inside `backward` and must find the same mask.
    """

    def __init__(self, context: MixtureContext, model: nn.Module) -> None:
        self.context = context
        names = list(inspect.signature(model.forward).parameters)
        self.tokens = [
            (name, names.index(name)) for name in ("input_ids", "inputs_embeds", "pixel_values") if name in names
        ]
        self.mask = [("attention_mask", names.index("attention_mask"))] if "attention_mask" in names else []

    def begin(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        labels = kwargs.get(LABELS)
        if LABELS in kwargs:
            kwargs = {name: value for name, value in kwargs.items() if name != LABELS}
        mask = _argument(self.mask, args, kwargs)
        tokens = _argument(self.tokens, args, kwargs)
        if isinstance(labels, Tensor) and labels.ndim == 2 and labels.shape[1] == 1 and tokens is not None:
            labels = labels.expand(-1, tokens.shape[1])
        if not isinstance(mask, Tensor) or mask.ndim != 2 or tokens is None:
            mask = None  # masks of other shapes say who sees whom, not who is real
        elif mask.shape[1] >= tokens.shape[1]:
            mask = mask[:, mask.shape[1] - tokens.shape[1] :]  # with a cache, it covers what was read before as well
        self.context.begin(mask, labels)
        return args, kwargs


def _argument(places: Sequence[tuple[str, int]], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    for name, position in places:
        value = args[position] if position < len(args) else kwargs.get(name)
        if value is not None:
            return value
    return None


def complete(entry: MixtureConfig, model: PreTrainedModel) -> MixtureConfig:
    """An entry with what it leaves open taken from the sites: all layers, experts of the dense width, activation, gate and biases."""
    sites = find_sites(model, entry.site, entry.layers or None)
    entry = dataclasses.replace(entry, layers=tuple(site.layer for site in sites))
    if entry.experts.width == 0 and entry.site.rpartition(".")[2] == FFN:
        shape = {(s.ffn_width, s.activation, s.gated, s.bias) for s in sites}
        if len(shape) != 1:
            raise BadInput(
                f"mixtures: the {entry.site} of the layers differ, {sorted(shape)}: name layers that are alike"
            )
        width, activation, gated, bias = shape.pop()
        experts = dataclasses.replace(entry.experts, width=width, activation=activation or "", gated=gated, bias=bias)
        entry = dataclasses.replace(entry, experts=experts)
    entry.check()
    return entry
