"""Several adapters beside one base, in one model: each row of a batch goes through its own.

    model = join(base, {"math": adapter, "law": other})
    model.generate(ids, attention_mask=mask, mixture_labels=labels_of(model, ["math", None, "law"]))

At every site the experts of all adapters that have some there are one stack, which the kernels see as one mixture; routers of one
policy are one router. Nothing is computed twice for a batch, and a row gets what it would get from its adapter alone. Only where
sites of an adapter share a router does each of them ask a copy of it, since others may have routers of their own there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..checkpoint.adapter_layout import deciders
from ..checkpoint.base import Checkpoint
from ..checkpoint.expert_adapter import ExpertAdapter
from ..errors import BadInput, UsageProblem
from ..mixture.config import ExpertsConfig, MixtureConfig, RouterConfig
from ..mixture.experts.lora import LoraExperts
from ..mixture.experts.lora_ffn import LoraFFNExperts
from ..mixture.joined import Joined, Part, joined_config
from ..mixture.layer import MixtureLayer
from .adapters import fitting, read_own
from .layout import own_tensors
from .mixing import find_all, stand_in
from .runtime import mix
from .sites import FFN, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BY_ROW = frozenset({"linear", "cosine", "static"})
"""Kinds of routers whose parameters have one row an expert, and so are joined by laying the rows of several together."""


def join(
    base: Checkpoint | PreTrainedModel, adapters: Mapping[str, ExpertAdapter], *, dtype: Any = None, device: Any = "cpu",
    attention: str | None = None,
) -> Any:  # fmt: skip
    """One model of a base and many adapters, in evaluation mode, for generation: `model.adapters` holds their names in the order of
    their labels, and every forward pass needs `mixture_labels` (:func:`labels_of`). Sites, counts, ranks and policies may differ.

    Args:
        base: an open checkpoint, or the dense model itself, which is changed in place; the other arguments are for loading the
            former, as in :func:`moeforge.model.load.load`.
        adapters: name -> adapter, left open.

    Raises:
        BadInput: an adapter of another base, or one whose answer for a token depends on more than that token and its adapter.
    """
    from .load import load

    if not adapters:
        raise UsageProblem("join: no adapters; load the base itself")
    if isinstance(base, Checkpoint):
        _require_one_base(base, adapters)
        model: Any = load(base, dtype=dtype, device=device, attention=attention)
    else:
        model = base
    held: dict[str, list[_Held]] = {}
    for number, (name, adapter) in enumerate(adapters.items()):
        for item in _held(model, number, name, adapter):
            held.setdefault(item.site.root, []).append(item)
    _refuse_magnitudes_around(held)
    joints = {root: _Joint(root, items) for root, items in held.items()}
    model.requires_grad_(False)
    mix(model, _entries(joints.values()), copy=False, nested=True)
    layers = {module.name: module for module in model.modules() if isinstance(module, MixtureLayer)}
    # inner ones first: what a magnitude is measured by is the map below it
    for root, joint in joints.items():
        joint.fill(layers[root])
    model.adapters = tuple(adapters)
    return model.requires_grad_(False).eval()


def labels_of(model: Any, names: Sequence[str | None]) -> Tensor:
    """[B, 1] the `mixture_labels` of a batch whose rows are for these adapters, None: for the base alone.

    Raises:
        UsageProblem: an adapter that is not in the model.
    """
    for name in names:
        if name is not None and name not in model.adapters:
            raise UsageProblem(f"no adapter is called {name!r}; there are {', '.join(model.adapters)}")
    numbers = [-1 if name is None else model.adapters.index(name) for name in names]
    return torch.tensor(numbers, device=model.device).unsqueeze(-1)


def _require_one_base(base: Checkpoint, adapters: Mapping[str, ExpertAdapter]) -> None:
    wanted = base.provenance()["digest"]
    for name, adapter in adapters.items():
        found = adapter.base.provenance()
        if found["digest"] != wanted:
            raise BadInput(
                f"adapter {name!r}: {adapter.ref} is made for {found['ref']}, not for {base.ref}, beside which the others stand; "
                "adapters of one model have one base, at one path or revision"
            )


@dataclass(frozen=True)
class _Held:
    """What one adapter has at one site.

    Attributes:
        number, name: of the adapter.
        layer: experts and router as it has them, without values.
        values: parameter name below the layer -> value.
    """

    number: int
    name: str
    entry: MixtureConfig
    site: Site
    layer: MixtureLayer
    values: Mapping[str, Tensor]

    @property
    def experts(self) -> LoraExperts | LoraFFNExperts:
        return cast(Any, self.layer.experts)

    def stacked(self, leaf: str) -> Tensor | None:
        """A parameter of the experts, [E, ...] however it is held; None: it has none such."""
        value = self.values.get(f"experts.{leaf}")
        if value is None:
            return None
        if isinstance(self.layer.experts, LoraExperts) and value.ndim < (2 if leaf == "magnitude" else 3):
            value = value.expand(self.experts.count, *value.shape)  # one expert, or one A for all
        return value


def _held(model: Any, number: int, name: str, adapter: ExpertAdapter) -> Iterator[_Held]:
    entries = [MixtureConfig.from_json(entry) for entry in adapter.entries]
    for entry in entries:
        if reason := _why_not(entry):
            raise BadInput(f"adapter {name!r}: {adapter.ref}: mixture at {entry.site}: {reason}; load it by itself")
    found = find_all(model, entries)
    with torch.device("meta"):
        layers = {site.mount: (site, stand_in(model, entry, site)) for entry, site in found}
    at = {(entry.site, site.layer): site.mount for entry, site in found}
    followed = {at[key]: at[leader, key[1]] for key, leader in deciders(adapter.entries, adapter.ref).items()}
    stored = [
        item for item in own_tensors(model, layers)
        if not any(item.parameter.startswith(f"{mount}.router.") for mount in followed)
    ]  # fmt: skip
    values: dict[str, dict[str, Tensor]] = {mount: {} for mount in layers}
    for item in fitting(stored, adapter):
        mount = max((m for m in layers if item.parameter.startswith(f"{m}.")), key=len)
        values[mount][item.parameter.removeprefix(f"{mount}.")] = read_own(adapter, item)
    for mount, leader in followed.items():
        values[mount] |= {leaf: value for leaf, value in values[leader].items() if leaf.startswith("router.")}
    for entry, site in found:
        yield _Held(number, name, entry, site, layers[site.mount][1], values[site.mount])


def _why_not(entry: MixtureConfig) -> str | None:
    """Why an entry cannot be one of several, None if it can."""
    router, options = entry.router, entry.experts.options
    if entry.experts.type not in ("lora", "lora_ffn"):
        return f"experts.type = {entry.experts.type!r}: only lora and lora_ffn stand side by side"
    if router.kind == "label" or router.by_label:
        return "its router reads labels, which name the adapters here"
    if not router.causal:
        return "router.causal = false: its choice depends on what else is in the batch"
    if router.scale_at == "input":
        return "router.scale_at = 'input' would scale what the base sees"
    if options.get("base_weight") == "paper" and not _sums_to_one(router):
        return "options.base_weight = 'paper': the base would count what the gates sum to, also for tokens of other adapters"
    return None


def _sums_to_one(router: RouterConfig) -> bool:
    """Whether the weights of a token always do."""
    if router.kind == "always":
        return True
    if router.factor != 1 or router.null_experts or (router.select == "threshold" and router.fallback == "none"):
        return False
    if router.gate_scale != "prob":
        return router.select == "topk" and router.top_k == 1
    return router.renormalise or (router.order == "select_score" and router.score == "softmax")


def _policy(router: RouterConfig) -> RouterConfig:
    """A router's without what matters in training only, or says where else it decides; that of plain LoRA is to take the expert of
    the label."""
    if router.kind == "always":
        return RouterConfig(kind="label", select="fixed")
    plain = RouterConfig()
    return dataclasses.replace(
        router,
        noise=plain.noise,
        noise_scale=plain.noise_scale,
        train_select=None,
        init_std=plain.init_std,
        input=plain.input,
    )


def _parts(items: Sequence[_Held]) -> list[tuple[Part, list[_Held]]]:
    """Adapters by policy, in the order of their numbers within one."""
    groups: dict[str, tuple[RouterConfig, list[_Held]]] = {}
    for item in items:
        policy = _policy(item.entry.router)
        splits = policy.select == "fixed" or (
            policy.kind in BY_ROW and policy.groups == 1 and not policy.null_experts and policy.capacity_factor is None
        )
        key = json.dumps([policy.as_json(), None if splits else item.number], sort_keys=True)
        groups.setdefault(key, (policy, []))[1].append(item)
    found = []
    for policy, members in groups.values():
        counts = tuple(item.experts.count for item in members)
        if len(members) > 1 and policy.select != "fixed":
            policy = dataclasses.replace(policy, by_label=counts)
        found.append((Part(tuple(item.number for item in members), counts, policy), members))
    return found


class _Joint:
    """One site and what all adapters have there, in the order in which their experts are stacked."""

    def __init__(self, root: str, items: Sequence[_Held]) -> None:
        self.root, self.parts = root, _parts(items)
        self.items = [item for _, members in self.parts for item in members]

    def entry(self) -> MixtureConfig:
        """The mixture, at this layer."""
        first = self.items[0]
        options: dict[str, Any] = {
            "rank": max(item.experts.options.rank for item in self.items),
            "scales": [scale for item in self.items for scale in item.experts.scales],
            "dora": any(item.experts.options.dora for item in self.items),
            "frozen": True,
        }
        if isinstance(first.layer.experts, LoraFFNExperts):
            targets = {role for item in self.items for role in cast(LoraFFNExperts, item.experts).targets}
            options |= {"targets": sorted(targets), "base_weight": "one"}
        experts: ExpertsConfig = dataclasses.replace(
            first.entry.experts, count=sum(item.experts.count for item in self.items), options=options
        )
        return MixtureConfig(
            first.entry.site, (first.site.layer,), experts, joined_config([part for part, _ in self.parts])
        )

    @torch.no_grad()
    def fill(self, layer: MixtureLayer) -> None:
        """Set every parameter."""
        experts, router = cast("LoraExperts | LoraFFNExperts", layer.experts), cast(Joined, layer.router)
        parameters = dict(experts.named_parameters(recurse=False))
        magnitudes = [leaf for leaf in parameters if leaf.endswith("magnitude")]
        for leaf in parameters.keys() - set(magnitudes):
            self._stack(parameters[leaf], leaf)
        for leaf in magnitudes:
            # as precise as the norms that it is divided by: an adapter without magnitudes must get a ratio of 1
            parameters[leaf].data = parameters[leaf].data.float()
        if magnitudes:
            experts.start_magnitudes()
        for leaf in magnitudes:
            self._stack(parameters[leaf], leaf)
        for module, (_, members) in zip(router.parts, self.parts, strict=True):
            for leaf, target in module.state_dict().items():
                target.copy_(torch.cat([item.values[f"router.{leaf}"] for item in members]))

    def _stack(self, target: Tensor, leaf: str) -> None:
        """Adapters' values one after the other along the experts. Smaller ranks are padded with zeros, as is what an adapter does
        not have, but for magnitudes: those stay as they are."""
        magnitude = leaf.endswith("magnitude")
        target = target if target.ndim == (2 if magnitude else 3) else target.unsqueeze(0)
        if not magnitude:
            target.zero_()
        start = 0
        for item in self.items:
            own = target[start : start + item.experts.count]
            start += item.experts.count
            value = item.stacked(leaf)
            if value is not None:
                own[tuple(slice(size) for size in value.shape)].copy_(value)


def _entries(joints: Iterable[_Joint]) -> list[MixtureConfig]:
    """One a site and layer, those of layers that are alike as one."""
    found: dict[str, MixtureConfig] = {}
    for joint in joints:
        entry = joint.entry()
        key = json.dumps(dataclasses.replace(entry, layers=()).as_json(), sort_keys=True)
        found[key] = dataclasses.replace(entry, layers=(*(found[key].layers if key in found else ()), *entry.layers))
    return list(found.values())


def _refuse_magnitudes_around(held: Mapping[str, Sequence[_Held]]) -> None:
    """Experts of a whole network with magnitudes ask its maps about pairs, not tokens, and need the maps' weights: nothing else may
    stand at those maps."""
    for root, items in held.items():
        dora = next((item for item in items if item.site.kind == FFN and item.experts.options.dora), None)
        inner = next((other for path, others in held.items() if path.startswith(f"{root}.") for other in others), None)
        if dora is not None and inner is not None:
            raise BadInput(
                f"adapter {dora.name!r} has experts with magnitudes (dora) around {root}, adapter {inner.name!r} has experts at "
                f"{inner.site.root} inside it; they cannot be joined"
            )
