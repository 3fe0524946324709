"""Mixture layouts as data: `targets/<model_type>.json`.

like           a layout to start from; tables are merged over its tables, null removes an entry
class          the transformers class
tensors, layer, layer_tensors    as in moeforge.checkpoint.architectures: role -> name
router         name of the router below the layer prefix: [E, D]
experts        [{"name", "of"}]: tensors of the experts; {expert} in the name: one tensor an expert, else stacked [E, ...];
               `of` names the matrices that lie in it, one after the other along the rows
dense_ffn      names of the FFN in layers that stay dense
shared         {"tensors", "required", "multiple", "gate"}: the always-active expert; `required`: there is no config
               without it; `multiple`: its width is a multiple of the routed width; `gate`: sigmoid(gate . x) weighs it
extras         tensors of zeros that the layout needs beside the router: name -> {"dtype", "shape"}
scoring        how router logits become weights: softmax (the default) or sigmoid
renormalises   true: top-k weights always sum to one; a config key: they do when that key is true
routed_factor  the config key that multiplies the routed sum, if there is one
sparse         which sets of sparse layers the layout can express (see layers.why_not)
copies         config keys that are copied from the dense model
config         config keys and their values; $name is a setting (see predicates.fill)
portability    runtime -> rules {"verdict", "when", "because"}; the first whose conditions hold on the output config counts

A third party adds a layout under the entry-point group `moeforge.upcycle_targets` (see moeforge_upcycle.described).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moeforge.errors import UsageProblem
from moeforge.options import did_you_mean

from . import described
from .recipe import Matrix


@dataclass(frozen=True)
class Slot:
    """One tensor of the layout that holds one or more matrices of one expert, or of all of them stacked."""

    name: str
    of: tuple[Matrix, ...]

    @property
    def stacked(self) -> bool:
        return "{expert}" not in self.name


@dataclass(frozen=True)
class Shared:
    """The always-active expert of a layout."""

    tensors: tuple[Slot, ...]
    required: bool = False
    multiple: bool = False
    gate: str | None = None


@dataclass(frozen=True)
class Target:
    """One mixture layout; see the module's description."""

    model_type: str
    architecture: str
    tensors: Mapping[str, str]
    layer: str
    layer_tensors: Mapping[str, str]
    router: str
    experts: tuple[Slot, ...]
    copies: tuple[str, ...]
    config: Mapping[str, Any]
    renormalises: bool | str
    scoring: str = "softmax"
    zero_router_weight: float | None = None
    dense_ffn: Mapping[str, str] = field(default_factory=dict)
    shared: Shared | None = None
    extras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    keeps_names: bool = False
    """Everything outside the experts keeps the dense model's names, whatever they are."""
    routed_factor: str | None = None
    sparse: str = "all"
    portability: Mapping[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    portability_first: Mapping[str, list[Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def matrices(self) -> frozenset[Matrix]:
        """What the experts hold."""
        return frozenset(matrix for slot in self.experts for matrix in slot.of)

    def name(self, role: str, layer: int | None) -> str | None:
        """The name of a tensor outside the FFNs; None when the layout has no home for that role."""
        if layer is None:
            return self.tensors.get(role)
        name = self.layer_tensors.get(role)
        return None if name is None else self.at(layer, name)

    def at(self, layer: int, name: str) -> str:
        """`name` with the layer's prefix."""
        return self.layer.format(layer=layer) + name


def _slots(raw: list[Mapping[str, Any]]) -> tuple[Slot, ...]:
    return tuple(Slot(item["name"], tuple(item["of"])) for item in raw)


@functools.cache
def load(model_type: str) -> Target:
    """The layout of that name.

    Raises:
        UsageProblem: there is none.
    """
    with described.parsing("targets", model_type):
        raw = _table(model_type)
        shared = raw.get("shared")
        if shared is not None:
            shared = Shared(**{**shared, "tensors": _slots(shared["tensors"])})
        fields = {key: raw[key] for key in Target.__dataclass_fields__ if key in raw}
        return Target(**{**fields, "architecture": raw["class"], "experts": _slots(raw["experts"]), "shared": shared,
                         "copies": tuple(raw["copies"])})  # fmt: skip


def known() -> list[str]:
    """The names of all layouts."""
    return described.names("targets")


def _table(model_type: str) -> dict[str, Any]:
    found = described.find("targets", model_type)
    if not found:
        raise UsageProblem(f"--target {model_type!r}: no such layout: {did_you_mean(model_type, known())}")
    raw = found[0]
    if "like" not in raw:
        return raw
    merged = dict(_table(raw["like"]))
    for key, value in raw.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "portability":
            keep_null = key == "config"  # null is a value there
            both = {**merged[key], **value}
            merged[key] = both if keep_null else {name: item for name, item in both.items() if item is not None}
        else:
            merged[key] = value
    return merged
