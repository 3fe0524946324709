"""Adapters of other programs as what a method brings along: one whole adapter, or several LoRAs as frozen experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from moeforge.checkpoint import lora_formats
from moeforge.checkpoint.lora_formats import frozen
from moeforge.checkpoint.lora_formats.foreign import Held
from moeforge.checkpoint.lora_formats.locate import locate
from moeforge.checkpoint.lora_formats.peft import DROPPABLE
from moeforge.errors import UsageProblem
from moeforge.mixture.config import MixtureConfig

from .design import Content, Design, Maps
from .options import Options


class Imports(Protocol):
    """The options of a method that takes LoRAs as frozen experts."""

    @property
    def experts_from(self) -> tuple[str, ...]: ...

    @property
    def drop(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Named:
    """One `NAME=REF[*WEIGHT]`."""

    name: str
    ref: str
    weight: float

    @classmethod
    def parse(cls, text: str) -> Named:
        """Raises:
        UsageProblem: of another form."""
        name, equals, rest = text.partition("=")
        ref, star, weight = rest.rpartition("*") if "*" in rest else (rest, "", "1")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not name or not equals or not ref or not math.isfinite(value):
            raise UsageProblem(
                f"--experts-from {text}: expected NAME=REF or NAME=REF*WEIGHT, such as math=loras/math*0.5"
            )
        return cls(name, ref, value)


def droppable(drop: Sequence[str]) -> frozenset[str]:
    """Raises:
    UsageProblem: names what cannot be left out."""
    for name in drop:
        if name not in DROPPABLE:
            raise UsageProblem(f"--drop {name}: what can be left out of a LoRA is {', '.join(DROPPABLE)}")
    return frozenset(drop)


def identities(refs: Sequence[str], stage: Options) -> list[str]:
    """Digests of the adapters, for the run's key."""
    return [locate(ref, allow_pickle=stage.allow_pickle).provenance()["digest"] for ref in refs]


def whole(ref: str, maps: Maps, config: Mapping[str, Any], stage: Options, drop: frozenset[str]) -> Content:
    """An adapter with its own sites, experts and routers.

    Raises:
        BadInput: of no known format, or it does not fit the base.
    """
    source = locate(ref, allow_pickle=stage.allow_pickle)
    found = lora_formats.read(source, maps, config, top_k=stage.top_k, drop=drop)
    origin = {"name": source.settings["peft_type"].lower(), **source.origin()}
    return Content([MixtureConfig.from_json(entry) for entry in found.entries], _makers(found.tensors), (origin,),
                   (source.provenance(),), (*found.warnings, *found.notes))  # fmt: skip


def frozen_experts(maps: Maps, design: Design, stage: Options, options: Imports) -> Content | None:
    """LoRAs under the design's router; None where none was named.

    Raises:
        BadInput: one of them does not fit, see moeforge.checkpoint.lora_formats.frozen.
        UsageProblem: more active experts were asked for than there are.
    """
    if not options.experts_from:
        return None
    named = [Named.parse(text) for text in options.experts_from]
    router = dict(design.router)
    count = len(named)
    if router.get("select", "topk") == "topk":
        total = count + router.get("null_experts", 0)
        if stage.top_k is not None and stage.top_k > total:
            raise UsageProblem(
                f"--top-k {stage.top_k} is more than the {total} experts of --experts-from and --null-experts"
            )
        router["top_k"] = min(router.get("top_k", 2), total)
    if stage.experts is not None and stage.experts != str(count):
        raise UsageProblem(f"--experts {stage.experts}: --experts-from names {count}, which are all there are")
    imports = [frozen.Imported(one.name, locate(one.ref, allow_pickle=stage.allow_pickle), one.weight) for one in named]
    found = frozen.experts(imports, maps, router, drop=droppable(options.drop), share_a=design.share_a)
    return Content([MixtureConfig.from_json(entry) for entry in found.entries], _makers(found.tensors), tuple(found.experts),
                   tuple(one.source.provenance() for one in imports), found.warnings, tuple(found.table))  # fmt: skip


def _makers(tensors: Mapping[str, Held]) -> dict[str, Callable[[], np.ndarray]]:
    return {name: held.read for name, held in tensors.items()}
