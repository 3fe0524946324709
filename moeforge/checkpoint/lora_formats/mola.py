"""MoLA's modified PEFT (github.com/GCYZSL/MoLA, arXiv:2402.08562).

    base_model.model.{module}.lora_A_{e}.weight    base_model.model.{module}.router.router.weight

Its config says neither how many experts a layer has, which counting tells, nor how many a token visits, which nothing tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ...errors import BadInput
from ..adapter_layout import PREFIX, Maps
from .foreign import Foreign, fit
from .places import GATE, Place
from .settings import Settings
from .source import Source

TOP_K = 2
_NUMBERED = re.compile(r"(.+)\.lora_A_(\d+)\.weight")
_IDLE = {"fan_in_fan_out": (True, False), "modules_to_save": (None, []), "layers_to_transform": None, "layers_pattern": None,
         "init_lora_weights": None, "inference_mode": None, "task_type": ("CAUSAL_LM", None), "bias": ("none",)}  # fmt: skip
"""Key -> the values that change nothing; None: any."""


def named(place: Place) -> str:
    if place.leaf == GATE:
        return f"{PREFIX}{place.module}.router.router.weight"
    half = place.leaf.removesuffix(".weight")
    return f"{PREFIX}{place.module}.{half}_{place.expert}.weight"


def holds(names: Iterable[str]) -> bool:
    """Whether these are the names of such an adapter."""
    return any(_NUMBERED.fullmatch(name) for name in names)


def read(source: Source, maps: Maps, *, top_k: int | None = None) -> Foreign:
    """The adapter on the base with those maps.

    Args:
        top_k: experts that a token visits, where the user knows.

    Raises:
        BadInput: a key, value or tensor that is unknown, missing or does not fit the base.
    """
    keys = Settings(source.settings, source.ref)
    keys.one_of("peft_type", ("LORA",))
    for key, values in _IDLE.items():
        value = keys.any(key, values[-1] if values else None)
        if values is not None and value not in values:
            keys.refuse(key, f"only {' or '.join(map(repr, values))} can be read from MoLA's adapters")
    keys.ignore("base_model_name_or_path", "revision", "target_modules")
    ranks, alpha = keys.any("r"), float(keys.number("lora_alpha", least=1e-9))
    dropout = keys.number("lora_dropout", 0.0, most=0.99)
    keys.done()
    groups: dict[tuple[str, int, int], list[int]] = {}
    for (role, layer), one in maps.items():
        at = f"{PREFIX}{one.path}"
        count = sum(f"{at}.lora_A_{e}.weight" in source.tensors for e in range(len(source.tensors)))
        if count == 0:
            continue
        rank = source.tensors[f"{at}.lora_A_0.weight"].shape[0] if f"{at}.lora_A_0.weight" in source.tensors else 0
        said = ranks[layer] if isinstance(ranks, list) and layer < len(ranks) else ranks
        if said != rank:
            raise BadInput(
                f"{source.where}: {at}.lora_A_0.weight has rank {rank}, adapter_config.json says r = {said!r} for layer {layer}"
            )
        groups.setdefault((role, count, rank), []).append(layer)
    entries: list[dict[str, Any]] = []
    for (role, count, rank), layers in groups.items():
        options: dict[str, Any] = {"rank": rank, "alpha": alpha} | ({"dropout": float(dropout)} if dropout else {})
        router = {"select": "topk", "top_k": min(top_k or TOP_K, count)}
        entries.append({"site": role, "layers": layers, "experts": {"type": "lora", "count": count, "options": options}, "router": router})  # fmt: skip
    if not entries:
        raise BadInput(
            f"{source.where}: none of its modules is one of the base's linear maps; was it trained on another base?"
        )
    said = (
        ""
        if top_k
        else f"MoLA's files do not say how many experts a token visits; read as {TOP_K}, --top-k says otherwise"
    )
    return Foreign(entries, fit(source, entries, maps, named), source.settings, (said,) if said else ())
