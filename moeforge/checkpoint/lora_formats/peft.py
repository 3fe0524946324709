"""A PEFT LoRA: one delta for each linear map that it adapts. Nothing is merged, weights stay where they are.

    base_model.model.{module}.lora_A.weight [r, D]    .lora_B.weight [D', r]    .lora_magnitude_vector [D']

Source: LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import BadInput
from ..adapter_layout import PREFIX, Maps
from ..linear_maps import LinearMap
from ..module_pattern import matches_tail
from ..tensor import FLOATS
from .foreign import Foreign, fit
from .places import Place
from .settings import Settings
from .source import CONFIG, Source

DROPPABLE = ("modules_to_save", "bias", "embeddings")
"""What an adapter may hold that no expert can, and that the user may leave out by name."""
_SAYS_NOTHING = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version", "target_modules",
                 "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config",
                 "megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config", "lora_ga_config")  # fmt: skip
"""Keys that do not change what the tensors compute: which modules are adapted, the tensors tell."""
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's weights as they are."""


@dataclass(frozen=True)
class Delta:
    """B A of one linear map: s B A is added to it."""

    map: LinearMap
    rank: int
    alpha: float
    scale: float


@dataclass(frozen=True)
class PeftLora:
    """An adapter that fits a base.

    Attributes:
        deltas: (role, layer) -> what it adds there.
        rslora, dora, dropout: as its config says.
        left_out: name -> which of DROPPABLE it is.
    """

    source: Source
    deltas: Mapping[tuple[str, int], Delta]
    rslora: bool
    dora: bool
    dropout: float
    left_out: Mapping[str, str]

    def warnings(self) -> tuple[str, ...]:
        kinds = sorted(set(self.left_out.values()))
        return (
            (f"{self.source.ref}: left out, as asked: {', '.join(kinds)} ({len(self.left_out)} tensors)",)
            if kinds
            else ()
        )


def open_lora(source: Source, maps: Maps, *, drop: frozenset[str] = frozenset()) -> PeftLora:
    """Config and headers, checked against the base's linear maps.

    Args:
        drop: some of :data:`DROPPABLE`, to be left out where the adapter has them.

    Raises:
        BadInput: another kind of adapter, a variant that no low-rank expert is, an unknown key, or tensors that do not fit the base.
    """
    keys = Settings(source.settings, source.ref)
    keys.one_of("peft_type", ("LORA",))
    keys.ignore(*_SAYS_NOTHING)
    if keys.any("init_lora_weights", True) not in _KEEPS_BASE:
        keys.refuse("init_lora_weights", "it changed the base's weights when training began; merge it with peft first")
    rslora, dora = keys.flag("use_rslora"), keys.flag("use_dora")
    rank, alpha, dropout = keys.natural("r", 8), keys.any("lora_alpha", 8), keys.number("lora_dropout", 0.0, most=0.99)
    patterns = {key: keys.any(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, found in patterns.items():
        if not isinstance(found, Mapping):
            keys.refuse(key, "an object is needed")
    for key, neutral, name in (("modules_to_save", (None, []), "modules_to_save"), ("bias", ("none", None), "bias")):
        if keys.any(key) not in neutral and name not in drop:
            keys.refuse(key, f"no expert can hold that; --drop {name} leaves it out")
    for key, value in source.settings.items():
        if value in (None, False, {}, []):
            keys.ignore(key)  # a variant that is off
    keys.done()
    deltas: dict[tuple[str, int], Delta] = {}
    used: set[str] = set()
    for place, one in maps.items():
        a, b, m = (f"{PREFIX}{one.path}.{leaf}" for leaf in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))
        have = {name for name in (a, b, m) if name in source.tensors}
        used |= have
        if not have:
            continue
        needed = (a, b, m) if dora else (a, b)
        if lost := [name for name in needed if name not in have]:
            raise BadInput(f"{source.where}: {lost[0]} is missing beside {min(have)}; the adapter is incomplete")
        if not dora and m in have:
            raise BadInput(f"{source.where}: {m} is of DoRA, which {CONFIG} does not say; use_dora = true is missing")
        said = _of(patterns["rank_pattern"], one.path, rank, source.ref)
        scaled = _of(patterns["alpha_pattern"], one.path, alpha, source.ref)
        if type(scaled) not in (int, float) or not math.isfinite(scaled):
            raise BadInput(f"{source.ref}: {CONFIG}: lora_alpha = {scaled!r} for {one.path}: a number is needed")
        for name, shape in ((a, (said, one.inputs)), (b, (one.outputs, said)), (m, (one.outputs,)))[: len(needed)]:
            info = source.tensors[name]
            if info.shape != shape or info.dtype not in FLOATS:
                raise BadInput(f"{source.where}: {name} is {info.dtype} {list(info.shape)}, {CONFIG} and the base ask for floating-point "
                               f"{list(shape)}; was it trained on another base?")  # fmt: skip
        deltas[place] = Delta(one, said, float(scaled), scaled / (math.sqrt(said) if rslora else said))
    left_out = _left_over(source, used, drop)
    if not deltas:
        raise BadInput(f"{source.where}: adapts none of the base's linear maps; was it trained on another base?")
    _all_there(source, deltas)
    return PeftLora(source, deltas, rslora, dora, float(dropout), left_out)


def read(source: Source, maps: Maps, *, drop: frozenset[str] = frozenset()) -> Foreign:
    """The LoRA by itself, without a router: what PEFT computes with it.

    Raises:
        BadInput: see :func:`open_lora`.
    """
    lora = open_lora(source, maps, drop=drop)
    groups: dict[tuple[str, int, float], list[int]] = {}
    for (role, layer), delta in lora.deltas.items():
        groups.setdefault((role, delta.rank, delta.alpha), []).append(layer)
    entries: list[dict[str, Any]] = []
    for (role, rank, alpha), layers in groups.items():
        options: dict[str, Any] = {"rank": rank, "alpha": alpha}
        if alpha <= 0:
            raise BadInput(f"{source.ref}: {CONFIG}: lora_alpha = {alpha:g} for {role}: a positive number is needed")
        for key, value in (("rslora", lora.rslora), ("dora", lora.dora), ("dropout", lora.dropout)):
            if value:
                options[key] = value
        entries.append({"site": role, "layers": layers, "experts": {"type": "lora", "count": 1, "options": options},
                        "router": {"kind": "always", "select": "all", "top_k": 1}})  # fmt: skip
    tensors = fit(source, entries, maps, named, besides=lora.left_out)
    return Foreign(entries, tensors, source.settings, lora.warnings())


def named(place: Place) -> str:
    return PREFIX + place.name


def _of(patterns: Mapping[str, Any], module: str, default: Any, ref: str) -> Any:
    """peft's rule: the first pattern that matches a tail of the module's name."""
    for pattern, value in patterns.items():
        if matches_tail(pattern, module, f"{ref}: {CONFIG}: rank_pattern or alpha_pattern {pattern!r}"):
            return value
    return default


def _left_over(source: Source, used: set[str], drop: frozenset[str]) -> dict[str, str]:
    """Name -> which of DROPPABLE it is, of the tensors that no delta used.

    Raises:
        BadInput: one that the user did not name, or that has no place in the base.
    """
    found: dict[str, str] = {}
    for name in sorted(set(source.tensors) - used):
        if "embed" in name:
            kind = "embeddings"
        elif ".lora_" in name or not name.startswith(PREFIX):
            raise BadInput(
                f"{source.where}: {name} has no place in the base; was it trained on another base, or another variant of LoRA?"
            )
        else:
            kind = "bias" if name.endswith(".bias") else "modules_to_save"
        if kind not in drop:
            raise BadInput(f"{source.where}: {name}: no expert can hold that; --drop {kind} leaves it out")
        found[name] = kind
    return found


def _all_there(source: Source, deltas: Mapping[tuple[str, int], Delta]) -> None:
    """Every module that the config lists has a delta: a file that lost all of one kind is not taken for a smaller adapter."""
    listed = source.settings.get("target_modules")
    paths = [delta.map.path for delta in deltas.values()]
    for target in listed if isinstance(listed, list) else ():
        if not any(path == target or path.endswith(f".{target}") for path in paths):
            raise BadInput(
                f"{source.where}: {CONFIG} lists the target module {target!r}, of which there is no tensor that fits the base"
            )
