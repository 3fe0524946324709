"""How a method says what it attaches: sites, experts by layer, router. The stage turns that into entries of a mixture config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from moeforge.checkpoint.adapter_layout import FFN_ROLES
from moeforge.checkpoint.linear_maps import LinearMap
from moeforge.errors import BadInput, UsageProblem
from moeforge.mixture.config import ExpertsConfig, MixtureConfig, RouterConfig

from .options import Options
from .table import experts_by_layer, layers_of

if TYPE_CHECKING:
    from moeforge.checkpoint.base import Checkpoint

ATTENTION = ("q", "k", "v", "qkv", "o")
LINEAR = (*ATTENTION, *FFN_ROLES, "in")
Maps = Mapping[tuple[str, int], LinearMap]


@dataclass(frozen=True)
class Design:
    """What a method attaches.

    Attributes:
        expert_sites: where experts with a router stand: `ffn`, or linear maps. Those that the model lacks are left out, if any is there.
        plain_sites: where one LoRA without a router stands.
        experts: the pattern of experts by layer.
        router: RouterConfig's fields.
        share_a: see LowRank.
    """

    expert_sites: tuple[str, ...]
    plain_sites: tuple[str, ...] = ()
    experts: str = "8"
    rank: int = 16
    alpha: float = 32
    router: Mapping[str, Any] = field(default_factory=dict)
    share_a: bool = False


class AttachMethod(Protocol):
    """What `moeforge attach --method NAME` needs, beside moeforge.pipeline.stage.Method."""

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    api_version: ClassVar[int]
    Options: ClassVar[type]

    def design(self, stage: Options, options: Any) -> Design: ...


def settle(design: Design, options: Options) -> Design:
    """The method's design with what the user said in its place.

    Raises:
        UsageProblem: what was asked has no meaning together.
    """
    router = dict(design.router)
    select = options.select or router.get("select", "topk")
    if select == "label":
        router = {"kind": "label", "select": "fixed", "top_k": 1}
    else:
        router |= {
            "kind": options.router if options.router != "linear" else router.get("kind", "linear"),
            "select": select,
        }
        given = {
            "top_k": options.top_k,
            "renormalise": options.renormalise,
            "gate_scale": options.gate_scale,
            "train_select": options.train_select,
        }
        router |= {key: value for key, value in given.items() if value is not None}
        router |= {
            "temperature": options.temperature,
            "init_std": options.router_std,
            "null_experts": options.null_experts,
        }
        if select == "topp":
            router["top_p"] = options.top_p
        if select == "threshold":
            router |= {"threshold": options.threshold, "fallback": "argmax"}
        if select == "sparsegen":
            router |= {"select": "threshold", "threshold": 0.0, "score": "sparsegen", "sparsity": options.sparsity}
        if options.jitter:
            router |= {"noise": "jitter", "noise_scale": options.jitter}
    router["input"] = options.router_input
    if design.share_a and options.dora:
        raise UsageProblem("--share-a and --dora: a magnitude needs the expert's own A")
    return replace(design, experts=options.experts or design.experts, rank=options.rank or design.rank,
                   alpha=options.alpha if options.alpha is not None else (2 * options.rank if options.rank else design.alpha), router=router)  # fmt: skip


def entries(design: Design, options: Options, maps: Maps, ref: str) -> list[MixtureConfig]:
    """One entry for each site and number of experts.

    Raises:
        BadInput, UsageProblem: the base has none of the sites, or the router cannot do with so few experts.
    """
    depth = 1 + max(layer for _, layer in maps)
    layers = layers_of(options.layers, depth)
    counts = experts_by_layer(design.experts, depth)
    found: list[MixtureConfig] = []
    for site in design.expert_sites:
        by_count: dict[int, list[int]] = {}
        for layer in layers:
            if _has(maps, site, layer):
                by_count.setdefault(counts[layer], []).append(layer)
        for count, where in sorted(by_count.items()):
            found += _site(design, options, maps, site, where, count)
    if not found:
        there = ", ".join(sorted({role for role, _ in maps}))
        raise BadInput(f"{ref}: none of the sites {', '.join(design.expert_sites)}; its layers have the linear maps {there}; --method custom --sites "
                       "names any of them")  # fmt: skip
    for site in design.plain_sites:
        where = [layer for layer in layers if _has(maps, site, layer)]
        found += _plain(design, options, site, where) if where else []
    for entry in found:
        entry.check()
    return found


def _has(maps: Maps, site: str, layer: int) -> bool:
    if site == "ffn":
        return ("down", layer) in maps and any((role, layer) in maps for role in ("up", "gate_up"))
    return (site, layer) in maps


def _site(
    design: Design, options: Options, maps: Maps, site: str, layers: Sequence[int], count: int
) -> list[MixtureConfig]:
    roles = [role for role in FFN_ROLES if (role, layers[0]) in maps]
    if count == 1:  # nothing to choose among: plain LoRA
        return [one for role in (roles if site == "ffn" else [site]) for one in _plain(design, options, role, layers)]
    router = dict(design.router)
    if router.get("select", "topk") == "topk":
        top_k = router.get("top_k", 2)
        if (
            options.top_k is not None
            and top_k > count
            and options.experts is not None
            and options.experts.isdecimal()
            and len(options.experts) < 4
        ):
            raise UsageProblem(f"--top-k {top_k} is more than --experts {count}")
        router["top_k"] = min(top_k, count)
    shape: dict[str, Any] = {"type": "lora", "count": count, "options": _options(design, options)}
    if site == "ffn":
        down = maps["down", layers[0]]
        shape |= {
            "type": "lora_ffn",
            "options": _options(design, options) | {"base_weight": options.base_weight, "targets": roles},
        }
        shape |= {"gated": "gate_up" in roles or "gate" in roles, "bias": down.bias}
    elif design.share_a:
        shape["options"] |= {"share_a": True}
    return [
        MixtureConfig(site=site, layers=tuple(layers), experts=ExpertsConfig(**shape), router=RouterConfig(**router))
    ]


def _plain(design: Design, options: Options, site: str, layers: Sequence[int]) -> list[MixtureConfig]:
    experts = ExpertsConfig(type="lora", count=1, options=_options(design, options))
    return [
        MixtureConfig(
            site=site, layers=tuple(layers), experts=experts, router=RouterConfig(kind="always", select="all", top_k=1)
        )
    ]


def _options(design: Design, options: Options) -> dict[str, Any]:
    found: dict[str, Any] = {"rank": design.rank, "alpha": float(design.alpha)}
    for key in ("rslora", "dora", "dropout"):
        if getattr(options, key):
            found[key] = getattr(options, key)
    return found


@dataclass(frozen=True)
class Content:
    """What a method brings along instead of declaring it: adapters of other programs, LoRAs as frozen experts.

    Attributes:
        entries: the mixtures.
        tensors: name (as moeforge.checkpoint.adapter_layout has it) -> its values; what is missing starts anew.
        experts: where each expert came from: name, source, revision, license, sha256.
        parents: provenance of what was read.
        warnings: what a careful person would want to know.
        table: what was found, a row for each imported LoRA; told before weights are read.
    """

    entries: list[MixtureConfig]
    tensors: Mapping[str, Callable[[], np.ndarray]]
    experts: tuple[dict[str, Any], ...] = ()
    parents: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    table: tuple[dict[str, Any], ...] = ()


class Bringing(AttachMethod, Protocol):
    """What a method needs besides when it brings content."""

    def content(
        self, base: Checkpoint, maps: Maps, design: Design, stage: Options, options: Any, refs: Sequence[str]
    ) -> Content | None:
        """None: nothing was asked to be brought.

        Args:
            design: settled with the user's options.
            refs: what the method's `parents` named, pinned.
        """
        ...
