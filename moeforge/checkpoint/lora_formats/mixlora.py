"""MixLoRA's directory (github.com/TUDB-Labs/MixLoRA 0.2.3, arXiv:2404.15159), today's names and those of its first adapters.

    mixlora.layers.{i}.self_attn.q_proj.lora_A.weight           plain LoRA of attention
    mixlora.layers.{i}.mlp.moe_gate.weight                      the router [E, D]
    mixlora.layers.{i}.mlp.gate_proj.experts.{e}.lora_A.weight

The first adapters (routing_strategy "mixtral") say `gate.weight`, `experts.{e}.w1_proj` for gate_proj, `w2_proj` for down, `w3_proj` for up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..adapter_layout import FFN_ROLES, Maps
from .foreign import Foreign, Naming, fit
from .places import GATE, Place, layers_with, leaves, listed, tail
from .settings import Settings
from .source import Source

PEFT_TYPE = "MIXLORA"
LEGACY = "mixtral"
TASKS = ("CAUSAL_LM", "QUESTION_ANS")
W = {"w1_proj": "gate", "w3_proj": "up", "w2_proj": "down"}
_TRAINING = ("router_aux_loss_coef", "router_init_range", "router_loss", "router_z_loss_coef", "router_dyn_loss_coef", "entropy_index",
             "entropy_type", "entropy_eps", "sparse_step", "lora_init")  # fmt: skip
"""Losses and first values: what was asked of the training that is over."""


def prefixed(prefix: str) -> Naming:
    """Today's names, of MixLoRA and MoE-PEFT."""

    def name(place: Place) -> str:
        number = "" if place.expert is None else f"experts.{place.expert}."
        leaf = "moe_gate.weight" if place.leaf == GATE else number + place.leaf
        return f"{prefix}.{tail(place)}.{leaf}"

    return name


named = prefixed("mixlora")


def named_first(place: Place) -> str:
    """The name in the first adapters."""
    if place.leaf == GATE:
        return f"mixlora.layers.{place.layer}.gate.weight"
    if place.expert is None:
        return named(place)
    projection = next(name for name, role in W.items() if role == place.role)
    return f"mixlora.layers.{place.layer}.experts.{place.expert}.{projection}.{place.leaf}"


def read(source: Source, maps: Maps, config: Mapping[str, Any]) -> Foreign:
    """The adapter on that base.

    Args:
        config: the base's config.json.

    Raises:
        BadInput: a key, value or tensor that is unknown, missing or does not fit the base, or that cannot be computed here.
    """
    keys = Settings(source.settings, source.ref)
    keys.one_of("peft_type", (PEFT_TYPE,))
    keys.ignore("base_model_name_or_path", *_TRAINING)
    common(keys)
    strategy = keys.one_of("routing_strategy", ("mixlora", LEGACY, "mixlora-dynamic", "mixlora-switch"))
    router, base_weight, warnings = _router(keys, strategy)
    _activation(keys, config)
    count = keys.natural("num_experts")
    plain = low_rank(keys)
    expert, notes = dict(plain), ()
    if (nested := keys.any("expert_lora")) is not None:
        if not isinstance(nested, dict):
            keys.refuse("expert_lora", "an object is needed")
        inner = Settings(nested | {k: source.settings[k] for k in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
                                   if k in source.settings and k not in nested}, source.ref, "expert_lora.")  # fmt: skip
        inner.ignore("base_model_name_or_path", "task_type", "bias", "lora_init", "peft_type", "target_modules")
        expert = low_rank(inner)
        inner.done()
        notes = ("expert_lora is heeded, as MoE-PEFT does in training; the mixlora package ignores it",)
    attention, ffn = _targets(keys, maps, legacy=strategy == LEGACY)
    keys.done()
    layers = layers_with("down", maps)
    entries: list[dict[str, Any]] = [
        {"site": role, "layers": layers_with(role, maps), "experts": {"type": "lora", "count": 1, "options": dict(plain)},
         "router": {"kind": "always", "select": "all", "top_k": 1}} for role in attention
    ]  # fmt: skip
    shape = {"gated": bool({"gate", "gate_up"} & {role for role, _ in maps}), "bias": maps["down", layers[0]].bias}
    options = expert | {"targets": ffn, "base_weight": base_weight}
    entries.append({"site": "ffn", "layers": layers, "experts": {"type": "lora_ffn", "count": count, **shape, "options": options},
                    "router": router})  # fmt: skip
    naming: Naming = named_first if strategy == LEGACY else named
    return Foreign(entries, fit(source, entries, maps, naming), source.settings, warnings, notes)


def common(keys: Settings) -> None:
    """What the adapters of MixLoRA and MoE-PEFT all say."""
    keys.one_of("bias", ("none",), "none")
    if keys.any("task_type", "CAUSAL_LM") not in TASKS:
        keys.refuse("task_type", f"its classification head has no place in a language model; known are {listed(TASKS)}")


def low_rank(keys: Settings) -> dict[str, Any]:
    """rank, alpha, rslora, dropout of an entry's options."""
    if keys.flag("use_dora"):
        keys.refuse("use_dora", "the file does not hold DoRA's magnitudes, so what was trained is lost")
    found: dict[str, Any] = {"rank": keys.natural("r"), "alpha": float(keys.number("lora_alpha", least=1e-9))}
    if keys.flag("use_rslora"):
        found["rslora"] = True
    if dropout := keys.number("lora_dropout", 0.0, most=0.99):
        found["dropout"] = float(dropout)
    return found


def _router(keys: Settings, strategy: str) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """(RouterConfig's fields, base_weight, warnings)."""
    noise = keys.number("jitter_noise", 0.01 if strategy == "mixlora-switch" else 0.0, most=1)
    router: dict[str, Any] = {"noise": "jitter", "noise_scale": float(noise)} if noise else {}
    if strategy in ("mixlora", LEGACY):
        return router | {"select": "topk", "top_k": keys.natural("top_k", 2)}, "one", ()
    if strategy == "mixlora-dynamic":
        if keys.number("temperature", 0.0) not in (0, 1):
            keys.refuse(
                "temperature",
                "MixLoRA divides probabilities by it, not logits, and no router here does; 0 or 1 can be read",
            )
        chosen = {"select": "topp", "top_p": float(keys.number("top_p", 0.8, least=1e-9, most=1)), "renormalise": False}
        return router | chosen, "paper", ()
    keys.natural("expert_capacity", 32)
    keys.number("ffn_dropout", 0.0, most=1)
    said = ("mixlora-switch drops tokens beyond expert_capacity, which later tokens decide; read as top-1 without a capacity, weighted by its "
            "probability")  # fmt: skip
    return router | {"select": "topk", "top_k": 1, "renormalise": False}, "paper", (said,)


def _activation(keys: Settings, config: Mapping[str, Any]) -> None:
    asked = keys.any("act_fn")
    own = config.get("hidden_act") or config.get("hidden_activation") or config.get("activation_function")
    if asked is not None and asked != own:
        keys.refuse("act_fn", f"the base's network has {own!r}, and experts here run with the base's")


def _targets(keys: Settings, maps: Maps, *, legacy: bool) -> tuple[list[str], list[str]]:
    """(roles of attention, roles of the FFN)."""
    known = leaves(maps) | ({name: [role] for name, role in W.items()} if legacy else {})
    there = {role for role, _ in maps}
    attention, ffn = [], []
    for name in keys.targets():
        roles = [role for role in known.get(name, ()) if role in there]
        if len(roles) != 1:
            keys.refuse("target_modules", f"{name!r} is none of the base's linear maps; it has {listed(leaves(maps))}")
        (ffn if roles[0] in FFN_ROLES else attention).append(roles[0])
    if not ffn or "down" not in there:
        keys.refuse("target_modules", "none is of an FFN, where the experts stand")
    return attention, sorted(ffn, key=FFN_ROLES.index)
