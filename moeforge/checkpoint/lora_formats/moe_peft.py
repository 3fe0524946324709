"""MoE-PEFT's other adapters (github.com/TUDB-Labs/MoE-PEFT 2.0.2): MOLA, and LORAMOE (arXiv:2312.09979).

    mola.layers.{i}.self_attn.q_proj.moe_gate.weight            a router [E, D] for each linear map
    mola.layers.{i}.self_attn.q_proj.experts.{e}.lora_A.weight

LORAMOE has experts, all of them weighted, at the FFN's linear maps and plain LoRA at attention.
"""

from __future__ import annotations

from typing import Any

from ..adapter_layout import FFN_ROLES, Maps
from .foreign import Foreign, fit
from .mixlora import common, low_rank, prefixed
from .places import layers_with, leaves, listed
from .settings import Settings
from .source import Source

PREFIX = {"MOLA": "mola", "LORAMOE": "loramoe"}
"""peft_type -> what the names begin with; routing_strategy says the same."""


def read(source: Source, maps: Maps) -> Foreign:
    """The adapter on the base with those maps.

    Raises:
        BadInput: a key, value or tensor that is unknown, missing or does not fit the base.
    """
    keys = Settings(source.settings, source.ref)
    kind = keys.one_of("peft_type", tuple(PREFIX))
    keys.one_of("routing_strategy", (PREFIX[kind],), PREFIX[kind])
    keys.ignore("base_model_name_or_path", "router_init_range", "router_aux_loss_coef", "router_loss", "lora_init")
    common(keys)
    options, count = low_rank(keys), keys.natural("num_experts")
    router: dict[str, Any] = {"select": "all", "top_k": 1, "renormalise": False}
    if kind == "MOLA":
        router = {"select": "topk", "top_k": keys.natural("top_k", 2)}
        if router["top_k"] > count:
            keys.refuse("top_k", f"there are only {count} experts")
    known = leaves(maps)
    entries: list[dict[str, Any]] = []
    for name in keys.targets():
        if len(known.get(name, ())) != 1:
            keys.refuse("target_modules", f"{name!r} is none of the base's linear maps; it has {listed(known)}")
        (role,) = known[name]
        routed = kind == "MOLA" or role in FFN_ROLES
        experts = {"type": "lora", "count": count if routed else 1, "options": dict(options)}
        entries.append({"site": role, "layers": layers_with(role, maps), "experts": experts,
                        "router": dict(router) if routed else {"kind": "always", "select": "all", "top_k": 1}})  # fmt: skip
    keys.done()
    return Foreign(entries, fit(source, entries, maps, prefixed(PREFIX[kind])), source.settings)
