"""The experts of an adapter of LoRA experts, each written out as the whole FFN that it makes of the frozen one, under the adapter's
own routers: expert e is (G + s B_e A_e, U + s B'_e A'_e, W + s B''_e A''_e), in float32, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeforge.checkpoint.adapter_layout import maps_of, root_of
from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.expert_adapter import ExpertAdapter
from moeforge.checkpoint.expert_names import ROUTER
from moeforge.checkpoint.linear_maps import linear_maps
from moeforge.errors import BadInput, UsageProblem
from moeforge.mixture.config import MixtureConfig
from moeforge.mixture.low_rank import LowRank
from moeforge.model.merged_experts import MergedExperts, constant, entries_of

from ..options import DTYPES
from ..recipe import Brought, ExpertRecipe, Layer, LayerRecipe, MixtureShape

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "kind": ("linear",),
    "select": ("topk", "all"),
    "score": ("softmax", "sigmoid"),
    "factor": (1.0,),
    "capacity_factor": (None,),
    "groups": (1,),
    "bias": (False,),
    "logit_bias": (False,),
    "null_experts": (0,),
    "by_label": ((),),
    "scale_at": ("output",),
}
"""What a router of whole experts may say: field -> values. The others are about training, or looked at one by one."""
DECIDED = {"layers": "all", "router_init": "random", "untie": 0.0, "scale": "down", "norm_topk": True}
"""Options of the stage that the adapter decides -> what they are when nobody said anything."""


@dataclass(frozen=True)
class Options:
    """None of its own."""


class LoRA:
    name = "lora"
    summary = (
        "SRC is an adapter of LoRA experts: each written out as a whole FFN, under its own routers; the same function"
    )
    reference = "MixLoRA, arXiv:2404.15159, and LLaVA-MoLE, arXiv:2401.16160: what they train, as a mixture that every engine serves"
    api_version = 1
    Options = Options

    def bring(self, source: Checkpoint, stage: Any, options: Options) -> Brought:
        if not isinstance(source, ExpertAdapter):
            raise BadInput(f"{source.ref}: --method lora is for adapters of LoRA experts, as `moeforge attach` writes them; a dense checkpoint "
                           "becomes a mixture by --method copy")  # fmt: skip
        entries = entries_of(source)
        routed = {
            number: entry for number, entry in enumerate(entries) if entry.experts.count > 1 and entry.site == "ffn"
        }
        if not routed:
            raise BadInput(f"{source.ref}: no site ffn with several experts; whole experts are FFNs. `moeforge export --to hf --merge` writes "
                           "what needs no router as a dense checkpoint")  # fmt: skip
        self._only_ffn(source.ref, entries)
        first, *others = routed.values()
        policy = _policy(source.ref, first)
        for entry in others:
            if (found := _policy(source.ref, entry)) != policy:
                raise BadInput(f"{source.ref}: layers {list(entry.layers)} have {found}, layers {list(first.layers)} {policy}; a native mixture has "
                               "one for all layers")  # fmt: skip
        layers = sorted(layer for entry in routed.values() for layer in entry.layers)
        settled = replace(stage, experts=policy.experts, top_k=policy.top_k, norm_topk=policy.renormalise,
                          layers=",".join(map(str, layers)))  # fmt: skip
        _agree(source.ref, stage, settled)
        parents = tuple(
            MergedExperts(source, dict.fromkeys(routed, e), DTYPES.get(stage.dtype)) for e in range(policy.experts)
        )
        return Brought(parents, settled, policy.scoring, _rows(source, routed))

    def _only_ffn(self, ref: str, entries: list[MixtureConfig]) -> None:
        for entry in entries:
            if entry.site != "ffn" and not constant(entry):
                raise BadInput(f"{ref}: site {entry.site!r} of layers {list(entry.layers)}: {entry.experts.count} experts under a router beside a linear "
                               "map, and experts of a native mixture are whole FFNs; `moeforge export --to hf --merge --expert N` writes one")  # fmt: skip

    def shape(self, ffn_width: int, stage: Any, options: Options) -> MixtureShape:
        return MixtureShape(stage.experts, stage.top_k, ffn_width)

    def needs(self, stage: Any, options: Options) -> frozenset[str]:
        return frozenset()

    def recipe(self, layer: Layer, shape: MixtureShape, stage: Any, options: Options) -> LayerRecipe:
        assert layer.router is not None
        return LayerRecipe(tuple(map(ExpertRecipe, range(shape.experts))), router=layer.router())


@dataclass(frozen=True)
class _Policy:
    """What of a routed site becomes the config of a mixture."""

    experts: int
    top_k: int
    renormalise: bool
    scoring: str

    def __str__(self) -> str:
        normal = "weights that sum to one" if self.renormalise else "weights as they are"
        return f"{self.top_k} of {self.experts} experts, {self.scoring} scores, {normal}"


def _policy(ref: str, entry: MixtureConfig) -> _Policy:
    """
    Raises:
        BadInput: a router that no native mixture has, naming field and value.
    """
    router, count = entry.router, entry.experts.count
    where = f"{ref}: layers {list(entry.layers)}: router."
    for field, values in NEUTRAL.items():
        if (found := getattr(router, field)) not in values:
            said = " or ".join(map(repr, values))
            raise BadInput(f"{where}{field} = {found!r}: a mixture of whole experts has {said}; "
                           "`moeforge export --to hf` writes the adapter's own function")  # fmt: skip
    top_k = count if router.select == "all" else router.top_k
    alone = top_k == 1 and router.gate_scale != "prob"  # one expert with weight 1
    by_choice = router.order == "select_score" and router.score == "softmax"
    if alone or (router.gate_scale == "prob" and (router.renormalise or by_choice)):
        return _Policy(count, top_k, True, router.score)
    if router.gate_scale != "prob":
        raise BadInput(
            f"{where}gate_scale = {router.gate_scale!r} with {top_k} experts a token: their weights sum to {top_k}, and no native "
            "mixture does that; `moeforge export --to hf` writes the adapter's own function"
        )
    if LowRank.read(entry.experts).base_weight == "one":
        raise BadInput(f"{where}renormalise = false with base_weight = 'one': the frozen FFN counts once whatever the weights sum to, and whole "
                       "experts count as their weights say; `moeforge export --to hf` writes the adapter's own function")  # fmt: skip
    return _Policy(count, top_k, False, router.score)


def _agree(ref: str, stage: Any, settled: Any) -> None:
    """
    Raises:
        UsageProblem: an option says other than the adapter.
    """
    if stage.experts not in (None, settled.experts):
        raise UsageProblem(f"--experts {stage.experts}, but {ref} has {settled.experts} in a layer; leave it out")
    if stage.top_k not in (type(stage).top_k, settled.top_k):
        raise UsageProblem(f"--top-k {stage.top_k}, but in {ref} a token visits {settled.top_k} experts; leave it out")
    for name, default in DECIDED.items():
        if (value := getattr(stage, name)) != default:
            raise UsageProblem(f"--{name.replace('_', '-')} {value}: {ref} decides that; leave it out")


def _rows(source: ExpertAdapter, routed: dict[int, MixtureConfig]) -> Callable[[int], np.ndarray]:
    """Layer -> router rows, with the temperature in them."""
    maps = linear_maps(source.base.config, source.base.tensors, source.base.ref)
    names, temperatures = {}, {}
    for number, entry in routed.items():
        for layer in entry.layers:
            root = root_of(maps_of(source.entries[number], layer, maps, source.ref))
            names[layer], temperatures[layer] = f"{root}.{ROUTER}.weight", entry.router.temperature
    return lambda layer: source.read(names[layer]).astype(np.float32) / np.float32(temperatures[layer])
