"""`--to mola`: the names of MoLA's modified PEFT."""

from __future__ import annotations

from moeforge.checkpoint.lora_formats.mola import TOP_K, named
from moeforge.mixture.config import RouterConfig

from .held import Adapter, Package, cuts


def mola(adapter: Adapter) -> tuple[list[Package], list[str]]:
    """(the directory, warnings).

    Raises:
        BadInput: the first field that MoLA cannot hold.
    """
    numbers = range(len(adapter.entries))
    ranks: dict[int, int] = {}
    warnings: list[str] = []
    for i in numbers:
        entry = adapter.entries[i]
        if entry.site == "ffn" or entry.router.kind == "always":
            what = (
                "has experts at linear maps; --to mixlora holds those of FFNs"
                if entry.site == "ffn"
                else "has a router at every target"
            )
            adapter.refuse("site", entry.site, what)
        options = adapter.only(i, ("rank", "alpha", "dropout"))
        adapter.router(i, RouterConfig(top_k=entry.router.top_k))
        if entry.router.top_k != min(TOP_K, entry.experts.count):
            warnings.append(
                f"MoLA's files do not say that a token visits {entry.router.top_k} experts at {entry.site}; whoever loads them must"
            )
        for layer in entry.layers:
            if ranks.setdefault(layer, options["rank"]) != options["rank"]:
                adapter.refuse(f"options.rank of site {entry.site}", options["rank"],
                               f"has one for each layer, and another site of layer {layer} has {ranks[layer]}")  # fmt: skip
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": adapter.base(), "bias": "none",
        "r": [ranks.get(layer, min(ranks.values())) for layer in range(1 + max(layer for _, layer in adapter.maps))],
        "lora_alpha": adapter.same(numbers, lambda i: adapter.whole(adapter.options[i]["alpha"]), "options.alpha"),
        "lora_dropout": adapter.same(numbers, lambda i: float(adapter.options[i]["dropout"]), "options.dropout"),
        "target_modules": adapter.modules(numbers), "fan_in_fan_out": False, "modules_to_save": None, "inference_mode": True,
        "init_lora_weights": True, "layers_to_transform": None, "layers_pattern": None,
    }  # fmt: skip
    tensors = cuts([place for i in numbers for place in adapter.places[i]], named)
    return [Package("", settings, tensors, pickled=True)], [*sorted(set(warnings)), *adapter.parted()]
