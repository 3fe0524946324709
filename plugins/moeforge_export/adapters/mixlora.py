"""`--to mixlora` and `--to moe-peft`: adapter_model.bin of MixLoRA, or of MoE-PEFT's MOLA and LORAMOE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moeforge.checkpoint.adapter_layout import FFN_ROLES
from moeforge.checkpoint.lora_formats.mixlora import prefixed
from moeforge.mixture.config import RouterConfig

from .held import Adapter, Package, cuts

NO_CAPACITY = 2**31 - 1
"""expert_capacity of Switch routing that drops no token."""


def mixlora(adapter: Adapter) -> tuple[list[Package], list[str]]:
    """(the directory, warnings).

    Raises:
        BadInput: the first field that MixLoRA cannot hold.
    """
    routed, plain = adapter.routed(), adapter.plain()
    for i in routed:
        if adapter.entries[i].site != "ffn":
            adapter.refuse(
                "site", adapter.entries[i].site, "has experts in FFNs only; --to mola or moe-peft holds others"
            )
    if not routed:
        adapter.refuse("experts.count", 1, "has several experts under a router; --to peft holds plain LoRA")
    count = adapter.same(routed, lambda i: adapter.entries[i].experts.count, "experts.count")
    router = adapter.same(routed, lambda i: adapter.entries[i].router, "router")
    for i in plain:
        if adapter.entries[i].site in FFN_ROLES:
            adapter.refuse("site", adapter.entries[i].site, "has experts there, not plain LoRA")
    adapter.everywhere([*routed, *plain])
    expert = adapter.same(routed, lambda i: _low_rank(adapter, i, "base_weight"), "options of site ffn")
    paper = adapter.options[routed[0]]["base_weight"] == "paper"
    strategy = _strategy(adapter, routed[0], router, paper)
    own = adapter.same(plain, lambda i: _low_rank(adapter, i), "options of plain LoRA") if plain else expert
    config = adapter.source.base.config
    act = config.get("hidden_act") or config.get("hidden_activation") or config.get("activation_function")
    settings = _settings(adapter, "MIXLORA", [*plain, *routed]) | own | strategy | {"num_experts": count, "act_fn": act}
    if expert != own:
        settings["expert_lora"] = expert
    tensors = cuts([place for i in (*plain, *routed) for place in adapter.places[i]], prefixed("mixlora"))
    warnings = [] if own["lora_dropout"] and expert["lora_dropout"] else [
        "lora_dropout = 0: the mixlora package asserts that it is more; MoE-PEFT does not"]  # fmt: skip
    return [Package("", settings, tensors, pickled=True)], warnings


def moe_peft(adapter: Adapter) -> tuple[list[Package], list[str]]:
    """What MoE-PEFT has for this adapter: MIXLORA, MOLA or LORAMOE.

    Raises:
        BadInput: the first field that it cannot hold.
    """
    routed, plain = adapter.routed(), adapter.plain()
    if not routed or any(adapter.entries[i].site == "ffn" for i in routed):
        return mixlora(adapter)
    router = adapter.same(routed, lambda i: adapter.entries[i].router, "router")
    count = adapter.same(routed, lambda i: adapter.entries[i].experts.count, "experts.count")
    adapter.everywhere([*routed, *plain])
    options = adapter.same([*routed, *plain], lambda i: _low_rank(adapter, i), "options")
    kind = "LORAMOE" if router.select == "all" else "MOLA"
    extra: dict[str, Any] = {"routing_strategy": kind.lower(), "num_experts": count}
    if kind == "MOLA":
        adapter.router(routed[0], RouterConfig(top_k=router.top_k))
        extra["top_k"] = router.top_k
        if plain:
            adapter.refuse("site", adapter.entries[plain[0]].site, "MOLA has experts at every target, not plain LoRA")
    else:
        meant = RouterConfig(
            select="all", top_k=router.top_k, renormalise=router.renormalise
        )  # all of a softmax add up to 1
        adapter.router(routed[0], meant)
        for i, wrong in ((i, adapter.entries[i].site) for i in (*routed, *plain)):
            if (wrong in FFN_ROLES) != (i in routed):
                adapter.refuse(
                    "site", wrong, "LORAMOE has experts at the FFN's linear maps and plain LoRA at the others"
                )
    settings = _settings(adapter, kind, [*plain, *routed]) | options | extra
    tensors = cuts([place for i in (*plain, *routed) for place in adapter.places[i]], prefixed(kind.lower()))
    return [Package("", settings, tensors, pickled=True)], adapter.parted()


def _settings(adapter: Adapter, kind: str, numbers: list[int]) -> dict[str, Any]:
    return {"bias": "none", "peft_type": kind, "task_type": "CAUSAL_LM", "base_model_name_or_path": adapter.base(),
            "target_modules": adapter.modules(numbers)}  # fmt: skip


def _low_rank(adapter: Adapter, number: int, *may: str) -> dict[str, Any]:
    options = adapter.only(number, ("rank", "alpha", "rslora", "dropout", *may))
    found = {"r": options["rank"], "lora_alpha": adapter.whole(options["alpha"]), "lora_dropout": float(options["dropout"])}  # fmt: skip
    return found | ({"use_rslora": True} if options["rslora"] else {})


def _strategy(adapter: Adapter, number: int, router: RouterConfig, paper: bool) -> dict[str, Any]:
    """routing_strategy and its numbers."""
    meant = RouterConfig(top_k=router.top_k, noise="jitter" if router.noise == "jitter" else "none")
    found: dict[str, Any] = {"routing_strategy": "mixlora", "top_k": router.top_k}
    if router.select == "topp":
        meant = replace(meant, select="topp", top_p=router.top_p, renormalise=False)
        found = {"routing_strategy": "mixlora-dynamic", "top_p": router.top_p, "temperature": 0.0}
    elif not router.renormalise and router.top_k == 1:
        meant = replace(meant, renormalise=False)
        found = {"routing_strategy": "mixlora-switch", "expert_capacity": NO_CAPACITY}
    adapter.router(number, meant)
    if not router.renormalise and not paper:
        adapter.refuse(
            "options.base_weight", "one", f"weighs the frozen FFN as well with {found['routing_strategy']}: paper"
        )
    noise = router.noise_scale if router.noise == "jitter" else 0.0
    return found | ({"jitter_noise": noise} if noise or found["routing_strategy"] == "mixlora-switch" else {})
