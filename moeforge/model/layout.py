"""How the tensors of a model with mixtures are called and lie on disk: one set of rules, for reading and writing.

They are transformers' own kind of rules, so its `from_pretrained` and `save_pretrained` follow them as our streaming reader does
(moeforge.model.weights). Outside the mixtures the dense model's rules hold; inside, names follow from the dense ones
(moeforge.checkpoint.expert_names) and every parameter of the experts says how it lies (Experts.stored).

Three forms of a name: *on disk* (`vit.encoder.layer.0.experts.3.intermediate.dense.weight`), *half way* after the dense model's
own renamings (`vit.layers.0.experts.3.mlp.fc1.weight`), *in memory* (`vit.layers.0.mlp.fc1.experts.up_proj`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from ..checkpoint import expert_names
from ..errors import BadInput
from ..mixture.experts.base import Stored
from .sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..mixture.layer import MixtureLayer


_NUMBER = "7350"
"""Stands for every expert's number while renamings, which look for digits, act on a name."""


class Moved(WeightRenaming):
    """Tensors that have another name in memory, name by name. One rule for all of them."""

    __slots__ = ("base_prefix", "names")

    def __init__(self, names: Mapping[str, str], base_prefix: str) -> None:
        super().__init__("never matched as a pattern", "never matched as a pattern")
        self.names, self.base_prefix = dict(names), base_prefix

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        for key in _spellings(source_key, self.base_prefix):
            if key in self.names:
                self._was_used = True
                return self.names[key], self.source_patterns[0]
        return source_key, None

    def reverse_transform(self) -> Moved:
        return Moved({there: here for here, there in self.names.items()}, "")


class Stacked(WeightConverter):
    """One parameter of a mixture's experts.

    Attributes:
        target: its name in memory.
        half_way, disk: names of its parts, with `{e}` for the expert's number where they have an expert axis.
        rows: sizes of the parts.
        transposed: see :class:`Stored`.
    """

    __slots__ = ("base_prefix", "disk", "half_way", "marks", "rows", "target", "transposed")

    def __init__(self, target: str, half_way: list[str], disk: list[str], stored: Stored, base_prefix: str) -> None:
        first = 0 if stored.shared else 1
        operations: list[Any] = [] if stored.shared else [MergeModulelist(0)]
        if len(disk) > 1 or stored.shared:
            operations.append(Concatenate(first + 1 if stored.transposed else first))
        if stored.transposed:
            operations.append(Transpose(first, first + 1))
        super().__init__([name.replace("{e}", "*") for name in half_way], [target], operations)
        self.target, self.half_way, self.disk = target, half_way, disk
        self.rows, self.transposed, self.base_prefix = stored.rows, stored.transposed, base_prefix
        self.marks = set(name.partition("{e}")[0].removeprefix(base_prefix) for name in half_way)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if not any(mark in source_key for mark in self.marks):  # a model of many experts asks a million times
            return source_key, None
        for key in _spellings(source_key, self.base_prefix):
            for pattern, name in zip(self.source_patterns, self.half_way, strict=True):
                if _fits(key, name):
                    self._was_used = True
                    return self.target, pattern
        return source_key, None

    def reverse_transform(self) -> Unstacked:
        return Unstacked(self)


class Unstacked(WeightConverter):
    """The way back: a parameter -> its tensors on disk, views where that is possible."""

    __slots__ = ("rule",)

    def __init__(self, rule: Stacked) -> None:
        super().__init__([rule.target], [rule.disk[0].replace("{e}", "*")], [Transpose(0, 0)])
        self.rule = rule

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key != self.rule.target:
            return source_key, None
        self._was_used = True
        return self.rule.disk[0], self.source_patterns[0]

    @torch.no_grad()
    def convert(self, layer_name: str, *_: Any, **__: Any) -> dict[str, Tensor]:
        value = self.materialize_tensors()[self.source_patterns[0]][0]
        found: dict[str, Tensor] = {}
        for number, expert in enumerate(value if "{e}" in self.rule.disk[0] else [value]):
            for name, part in zip(self.rule.disk, expert.split(self.rule.rows), strict=True):
                found[name.replace("{e}", str(number))] = part.T.contiguous() if self.rule.transposed else part
        return found


class Written(WeightRenaming):
    """A renaming of the dense model's on the way to disk. Some versions of transformers also rename what a converter has written,
    others do not: experts have their final names then, and are left alone."""

    __slots__ = ("final", "rule")

    def __init__(self, rule: WeightTransform, final: tuple[str, ...]) -> None:
        super().__init__("never matched as a pattern", "never matched as a pattern")
        self.rule, self.final = rule, final

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key.startswith(self.final):
            return source_key, None
        return self.rule.rename_source_key(source_key)


class Dense(WeightRenaming):
    """A renaming of the dense model's, which knows what it must leave alone on the way back."""

    __slots__ = ("final", "rule")

    def __init__(self, rule: WeightTransform, final: tuple[str, ...]) -> None:
        super().__init__("never matched as a pattern", "never matched as a pattern")
        self.rule, self.final = rule, final

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        renamed, pattern = self.rule.rename_source_key(source_key)
        self._was_used = self._was_used or pattern is not None
        return renamed, pattern

    def reverse_transform(self) -> Written:
        return Written(self.rule.reverse_transform(), self.final)


def weight_rules(model: PreTrainedModel, *, quantizer: Any = None, loading: bool = True) -> list[Any]:
    """transformers' conversion rules for a model, in the order in which they act on a name that is read.

    Args:
        loading: False leaves out what a model that came from no checkpoint has no use for when it is saved.
    """
    if not hasattr(model, "mixtures"):
        return get_model_conversion_mapping(model, hf_quantizer=quantizer)
    dense = _dense_rules(model, quantizer, loading)
    # legacy names are read, never written: ours are those that the dense model is written with
    moved, *stacked = _mixture_rules(model, _dense_rules(model, None, loading=False))
    final = tuple(name.partition("{e}")[0] for rule in stacked for name in rule.disk)
    # the first converter that fits a name takes it, and a quantiser's fits every weight: ours come first. Renamings all act, the
    # dense model's before ours.
    return [*stacked, *(_guarded(rule, final) for rule in dense), moved]


def _guarded(rule: Any, final: tuple[str, ...]) -> Any:
    return Dense(rule, final) if isinstance(rule, WeightRenaming) else rule


def stored_site(model: PreTrainedModel, site: Site) -> tuple[str, dict[str, str]]:
    """(root, role -> path below it) of a site as a checkpoint calls them."""
    return _Names(model, site, _dense_rules(model, None, loading=False)).on_disk()


def _dense_rules(model: PreTrainedModel, quantizer: Any, loading: bool) -> list[Any]:
    """The rules of the dense class: they are found by the names of class and config, so the model shows those meanwhile."""
    kind, config = type(model), model.config
    base = getattr(kind, "base_class", kind)
    model.__class__, model.config = base, getattr(config, "base_config", config)
    try:
        rules = get_model_conversion_mapping(model, hf_quantizer=quantizer, add_legacy=loading)
    finally:
        model.__class__, model.config = kind, config
    return rules if loading else [rule for rule in rules if not isinstance(rule, PrefixChange)]


def _mixture_rules(model: Any, dense: list[Any]) -> tuple[Any, ...]:
    moved: dict[str, str] = {}
    stacked: list[Stacked] = []
    base = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    for site, layer in model.mixtures.values():
        names = _Names(model, site, dense)
        moved |= _moves(site, layer, names)
        for parameter, stored in layer.experts.stored().items():
            member = None if stored.shared else f"{expert_names.EXPERTS}.{{e}}"
            disk = [names.member(part, member) for part in stored.parts]
            half_way = [names.half_way(name) for name in disk]
            stacked.append(Stacked(f"{site.mount}.experts.{parameter}", half_way, disk, stored, base))
    return Moved({here: there for here, there in moved.items() if here != there}, base), *stacked


def _moves(site: Site, layer: MixtureLayer, names: _Names) -> dict[str, str]:
    """Half way -> in memory, for everything in a mixture but its experts."""
    found: dict[str, str] = {}
    for leaf in layer.router.state_dict():
        found[names.half_way(names.member(f"{expert_names.ROUTER}.{leaf}", None))] = f"{site.mount}.router.{leaf}"
    for leaf in () if layer.shared is None else layer.shared.state_dict():
        found[names.half_way(names.member(leaf, expert_names.SHARED))] = f"{site.mount}.shared.{leaf}"
    for leaf in () if layer.kept is None else layer.kept.state_dict():
        found[f"{site.root}.{leaf}"] = f"{site.mount}.kept.{leaf}"
    return found


@dataclass(frozen=True)
class OwnTensor:
    """A parameter that mixtures added to a dense model, and its tensors on disk.

    Attributes:
        parameter: its name in memory.
        disk: names of its parts, in the order in which they lie along its rows, with `{e}` where they have an expert axis.
        rows: sizes of the parts; empty where the parameter is one tensor as it is.
        experts: E, or None without that axis.
        shape: of the parameter.
    """

    parameter: str
    disk: tuple[str, ...]
    rows: tuple[int, ...]
    experts: int | None
    shape: tuple[int, ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name on disk -> shape."""
        if not self.rows:
            return {self.disk[0]: self.shape}
        rest = self.shape[1:] if self.experts is None else self.shape[2:]
        numbers = [None] if self.experts is None else range(self.experts)
        return {
            name.replace("{e}", str(e)): (rows, *rest)
            for e in numbers
            for name, rows in zip(self.disk, self.rows, strict=True)
        }

    def split(self, value: Tensor) -> dict[str, Tensor]:
        """Name on disk -> view of the parameter's value."""
        if not self.rows:
            return {self.disk[0]: value}
        found = {}
        for number, expert in enumerate([value] if self.experts is None else value):
            for name, part in zip(self.disk, expert.split(self.rows), strict=True):
                found[name.replace("{e}", str(number))] = part
        return found


def own_tensors(model: Any, mixtures: Mapping[str, tuple[Site, MixtureLayer]] | None = None) -> list[OwnTensor]:
    """Everything that the mixtures of a model added to its dense one: experts that are built on what stood at their site, routers.

    Args:
        mixtures: some that do not stand in the model, in the form of its attribute of that name; default: its own.

    Raises:
        BadInput: experts that took the place of the dense network's weights, so that the model is no longer that one and something.
    """
    dense = _dense_rules(model, None, loading=False)
    found: list[OwnTensor] = []
    for site, layer in (model.mixtures if mixtures is None else mixtures).values():
        if not layer.experts.adopts or layer.shared is not None or layer.kept is not None:
            raise BadInput(
                f"{site.root}: {type(layer.experts).__name__} replace the dense network; only what stands beside it is an adapter"
            )
        names = _Names(model, site, dense)
        for parameter, stored in layer.experts.stored().items():
            if parameter.startswith("base."):
                continue
            value = layer.experts.get_parameter(parameter)
            member = None if stored.shared else f"{expert_names.EXPERTS}.{{e}}"
            found.append(OwnTensor(f"{site.mount}.experts.{parameter}", tuple(names.member(part, member) for part in stored.parts),
                                   stored.rows, None if stored.shared else len(value), tuple(value.shape)))  # fmt: skip
        for leaf, value in layer.router.state_dict().items():
            disk = names.member(f"{expert_names.ROUTER}.{leaf}", None)
            found.append(OwnTensor(f"{site.mount}.router.{leaf}", (disk,), (), None, tuple(value.shape)))
    return found


class _Names:
    """The names of one site."""

    def __init__(self, model: PreTrainedModel, site: Site, dense: list[Any]) -> None:
        self.site = site
        self.forward = [rule for rule in dense if isinstance(rule, WeightRenaming)]
        self.backward = [rule.reverse_transform() for rule in reversed(self.forward)]
        self.where = f"{type(model).__name__}, {site.root}"
        written = {role: _renamed(f"{p.path}.weight", self.backward) for role, p in site.projections.items()}
        if not written:
            raise BadInput(
                f"{self.where}: a mixture at {site.kind!r} has no tensors of the dense model to be named after"
            )
        alone = len(written) == 1
        self.root = (
            next(iter(written.values())).removesuffix(".weight") if alone else expert_names.root(written.values())
        )
        self.paths = {
            role: name[len(self.root) + 1 :].removesuffix("weight").rstrip(".") for role, name in written.items()
        }

    def on_disk(self) -> tuple[str, dict[str, str]]:
        return self.root, self.paths

    def member(self, part: str, member: str | None) -> str:
        """The name on disk of a part that experts call by its path below the site's root in memory."""
        for role, path in self.paths.items():
            below = self.site.below(role)
            if below and part.startswith(f"{below}."):
                part = f"{path}{part[len(below) :]}"
                break
        return expert_names.below(self.root, part if member is None else f"{member}.{part}")

    def half_way(self, name: str) -> str:
        """A name on disk after the dense model's renamings.

        Raises:
            BadInput: they do not lead back.
        """
        half = _renamed(name, self.forward)
        if _renamed(half, self.backward) != name:
            raise BadInput(
                f"{self.where}: transformers renames {name} when it is written; this family's names hold no experts"
            )
        return half


def _renamed(name: str, renamings: list[Any]) -> str:
    name = name.replace("{e}", _NUMBER)
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name.replace(_NUMBER, "{e}")


def _fits(key: str, name: str) -> bool:
    head, between, tail = name.partition("{e}")
    if not between:
        return key == name
    return key.startswith(head) and key.endswith(tail) and key[len(head) : len(key) - len(tail)].isdigit()


def _spellings(key: str, base: str) -> tuple[str, ...]:
    """A name that is read may have the base model's prefix or not, depending on the head that it was saved with."""
    if not base:
        return (key,)
    return (key, key[len(base) :]) if key.startswith(base) else (key, base + key)
