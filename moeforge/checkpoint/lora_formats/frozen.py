"""LoRAs that were trained apart, as the frozen experts of one router (LoRA-Mixer, arXiv:2507.00029, its second mode).

Ranks that differ are padded with zeros, which is exact; every expert keeps its own scale; where one does not adapt a linear map that
another does, its delta there is zero and its weight is spent on nothing, as that LoRA alone would have it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import BadInput
from ..adapter_layout import PREFIX, Maps
from .foreign import Held
from .peft import Delta, PeftLora, open_lora
from .places import LEAVES, places
from .source import Source


@dataclass(frozen=True)
class Imported:
    """One LoRA: what the user calls it, where it lies, what its deltas are multiplied by."""

    name: str
    source: Source
    weight: float = 1.0


@dataclass(frozen=True)
class Frozen:
    """See the module.

    Attributes:
        entries: one for each site and set of ranks and scales, with the router that was asked for.
        tensors: our name -> values; the routers' are not among them.
        experts: where each came from: name, source, revision, license, sha256, weight.
        table: a row for each expert: name, rank, scale, sites, layers, parameters.
        warnings: what was left out.
    """

    entries: list[dict[str, Any]]
    tensors: Mapping[str, Held]
    experts: list[dict[str, Any]]
    table: list[dict[str, Any]]
    warnings: tuple[str, ...]


def experts(imports: Sequence[Imported], maps: Maps, router: Mapping[str, Any], *, drop: frozenset[str] = frozenset(), share_a: bool = False) -> Frozen:  # fmt: skip
    """Config and headers of every LoRA, and the entries that hold them; weights are read when they are asked for.

    Args:
        router: RouterConfig's fields for every site.
        drop: see moeforge.checkpoint.lora_formats.peft.

    Raises:
        BadInput: one of them is no expert for this base, two have one name, or an A was to be shared.
    """
    names = [one.name for one in imports]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BadInput(f"two of the imported LoRAs are called {twice!r}; every expert has a name of its own")
    if share_a:
        raise BadInput(
            f"one A for all experts, but {' and '.join(names[:2])} were trained with an A each; leave --share-a out"
        )
    loras = [open_lora(one.source, maps, drop=drop) for one in imports]
    for one, lora in zip(imports, loras, strict=True):
        if lora.dora:
            raise BadInput(
                f"{one.source.ref}: use_dora = True: a magnitude is no sum of deltas; attach it by itself with --method import"
            )
    groups: dict[tuple[Any, ...], list[int]] = {}
    for role, layer in maps:
        found = [lora.deltas.get((role, layer)) for lora in loras]
        if not any(found):
            continue
        ranks = tuple(delta.rank if delta else 0 for delta in found)
        scales = tuple(delta.scale * one.weight if delta else 0.0 for delta, one in zip(found, imports, strict=True))
        groups.setdefault((role, ranks, scales), []).append(layer)
    entries = [
        {"site": role, "layers": layers, "router": dict(router), "experts": {"type": "lora", "count": len(loras), "options": {
            "rank": max(ranks), "ranks": list(ranks), "scales": list(scales), "frozen": True}}}
        for (role, ranks, scales), layers in groups.items()
    ]  # fmt: skip
    held = _held(loras, entries, maps)
    origins = [{"name": one.name, **one.source.origin(), "weight": one.weight} for one in imports]
    warnings = tuple(said for lora in loras for said in lora.warnings())
    return Frozen(entries, held, origins, [_row(*pair) for pair in zip(imports, loras, strict=True)], warnings)


def _held(loras: Sequence[PeftLora], entries: list[dict[str, Any]], maps: Maps) -> dict[str, Held]:
    held: dict[str, Held] = {}
    for place in places(entries, maps, "imported LoRAs"):
        if place.leaf not in LEAVES:
            continue
        lora = loras[place.expert or 0]
        held[place.name] = Held(_padded(lora, lora.deltas.get((place.role, place.layer)), place.leaf, place.shape), place.shape, "F32")  # fmt: skip
    return held


def _padded(lora: PeftLora, delta: Delta | None, leaf: str, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        values = np.zeros(shape, np.float32)
        if delta is not None:
            stored = lora.source.read(f"{PREFIX}{delta.map.path}.{leaf}")
            values[tuple(slice(n) for n in stored.shape)] = stored
        return values

    return make


def _row(one: Imported, lora: PeftLora) -> dict[str, Any]:
    deltas = lora.deltas
    return {
        "name": one.name, "source": one.source.ref, "rank": sorted({delta.rank for delta in deltas.values()}),
        "scale": sorted({delta.scale * one.weight for delta in deltas.values()}), "sites": sorted({role for role, _ in deltas}),
        "layers": sorted({layer for _, layer in deltas}),
        "parameters": sum(d.rank * (d.map.inputs + d.map.outputs) for d in deltas.values()),
    }  # fmt: skip
