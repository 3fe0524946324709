"""`--to peft`: one plain PEFT LoRA, where that is exact; `--to peft-experts`: a LoRA for each expert."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

from moeforge.checkpoint.adapter_layout import PREFIX
from moeforge.checkpoint.lora_formats.places import LEAVES, Place

from .held import Adapter, Cut, Package

_FOLDER = re.compile(r"[\w][\w.-]*", re.ASCII)


def peft(adapter: Adapter) -> tuple[list[Package], list[str]]:
    """(the directory, warnings): what the adapter computes is one LoRA.

    Raises:
        BadInput: it is not, as a router chooses, or the first field that PEFT cannot hold.
    """
    for i in adapter.routed():
        entry, router = adapter.entries[i], adapter.entries[i].router
        if entry.experts.count > 1:
            adapter.refuse(f"experts.count of site {entry.site}", entry.experts.count,
                           "holds one LoRA without a router; --to peft-experts writes one for each expert")  # fmt: skip
        for field, neutral in (
            ("null_experts", (0,)),
            ("factor", (1.0,)),
            ("capacity_factor", (None,)),
            ("kind", ("linear", "cosine", "static")),
        ):
            if getattr(router, field) not in neutral:
                adapter.refuse(
                    f"router.{field} of site {entry.site}", getattr(router, field), "adds a LoRA with weight 1"
                )
        if router.score == "sigmoid" and not router.renormalise and router.gate_scale == "prob":
            adapter.refuse(
                f"router.score of site {entry.site}", router.score, "adds a LoRA with weight 1, and this is less"
            )
    return [_package(adapter, 0, "")], []


def peft_experts(adapter: Adapter) -> tuple[list[Package], list[str]]:
    """A directory for each expert: its own deltas and the plain LoRA that all of them share.

    Raises:
        BadInput: layers have different numbers of experts, or the first field that PEFT cannot hold.
    """
    routed = adapter.routed()
    if not routed:
        adapter.refuse("router.kind", "always", "is for experts under a router; --to peft writes the plain LoRA")
    count = adapter.same(routed, lambda i: adapter.entries[i].experts.count, "experts.count")
    names = [str(row.get("name")) for row in adapter.source.settings.get("experts") or ()]
    usable = len(names) == count and len(set(names)) == count and all(map(_FOLDER.fullmatch, names))
    folders = names if usable else [f"expert-{e}" for e in range(count)]
    warnings = ["routers are left out: PEFT has none, and each directory is one expert by itself"]
    return [_package(adapter, e, folder) for e, folder in enumerate(folders)], warnings


def _package(adapter: Adapter, expert: int, folder: str) -> Package:
    numbers = range(len(adapter.entries))
    for i in numbers:
        adapter.only(
            i, ("rank", "alpha", "rslora", "dropout", "dora", "share_a", "frozen", "ranks", "scales", "base_weight")
        )
    kept: dict[str, tuple[int, float]] = {}
    tensors: dict[str, Cut] = {}
    rslora = adapter.same(numbers, lambda i: adapter.options[i]["rslora"], "options.rslora")
    for i in numbers:
        options = adapter.options[i]
        for place in adapter.places[i]:
            if place.leaf not in LEAVES or (place.expert or 0) != (expert if place.expert is not None else 0):
                continue
            at = 0 if adapter.entries[i].experts.count == 1 else expert
            rank = options["ranks"][at] if options["ranks"] else options["rank"]
            if rank == 0:
                continue  # this LoRA does not adapt that linear map
            root = math.sqrt(rank) if rslora else rank
            kept[place.module] = (rank, options["scales"][at] * root if options["scales"] else options["alpha"])
            tensors[f"{PREFIX}{place.module}.{place.leaf}"] = Cut(place.name, _true_shape(place, rank))
    if not kept:
        adapter.refuse("options.ranks", 0, f"needs a linear map that expert {expert} adapts, and there is none")
    (rank, alpha), _ = Counter(kept.values()).most_common(1)[0]
    settings: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": adapter.base(),
        "revision": adapter.source.settings.get("revision"), "bias": "none", "inference_mode": True, "r": rank, "lora_alpha": _short(alpha),
        "rank_pattern": {path: r for path, (r, _) in kept.items() if r != rank},
        "alpha_pattern": {path: _short(a) for path, (_, a) in kept.items() if a != alpha},
        "lora_dropout": adapter.same(numbers, lambda i: float(adapter.options[i]["dropout"]), "options.dropout"),
        "use_rslora": rslora, "use_dora": adapter.same(numbers, lambda i: adapter.options[i]["dora"], "options.dora"),
        "target_modules": sorted({path.rpartition(".")[2] for path in kept}) if _all(adapter, kept) else sorted(kept),
    }  # fmt: skip
    return Package(folder, settings, tensors)


def _true_shape(place: Place, rank: int) -> tuple[int, ...]:
    """Without the zeros that pad it to the largest rank."""
    if place.leaf == "lora_A.weight":
        return (rank, place.shape[1])
    return (place.shape[0], rank) if place.leaf == "lora_B.weight" else place.shape


def _all(adapter: Adapter, kept: dict[str, Any]) -> bool:
    """Whether the last parts of the names say which linear maps are meant."""
    leaves = {path.rpartition(".")[2] for path in kept}
    return {one.path for one in adapter.maps.values() if one.path.rpartition(".")[2] in leaves} == set(kept)


def _short(number: float) -> float:
    return int(number) if number == int(number) else number
