"""The options of `moeforge attach` that every method shares; what is not given is what the method's paper says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeforge.options import opt
from moeforge.pipeline.reading import Decoding


@dataclass(frozen=True)
class Options(Decoding):
    experts: str | None = opt(
        "experts by layer: a number, four digits for four groups of layers (2468, 8642, 8228, 5555), diamond, hourglass, ... with "
        ":TOTAL, or a list with a number for each layer",
        default=None,
    )
    rank: int | None = opt("rank r of every expert", default=None, min=1)
    alpha: float | None = opt("the deltas' scale is alpha / r", default=None, min=0)
    rslora: bool = opt("alpha / sqrt(r) instead (arXiv:2312.03732)", default=False)
    dora: bool = opt("a magnitude per output (arXiv:2402.09353)", default=False)
    dropout: float = opt(
        "on what the low-rank paths read, in training; at the site ffn it costs the fused path",
        default=0.0,
        min=0,
        max=0.99,
    )
    layers: str = opt("layers that get experts: all, or a list such as 0,3,5-7", default="all")
    top_k: int | None = opt("experts that a token visits", default=None, min=1)
    select: Literal["topk", "topp", "threshold", "sparsegen", "all", "label"] | None = opt(
        "how they are chosen; sparsegen: all that a sparse projection of the logits leaves; label: each token's label is its expert",
        default=None,
    )
    top_p: float = opt("share of probability, for --select topp", default=0.8, min=0, max=1)
    threshold: float = opt("least probability, for --select threshold", default=0.0, min=0, max=1)
    sparsity: float = opt("for --select sparsegen: the higher, the fewer experts", default=0.0, max=0.99)
    train_select: Literal["all"] | None = opt("another choice in training: all experts, weighted", default=None)
    router_input: Literal["site", "shared"] = opt(
        "site: every linear map has a router of its own; shared: q, k and v have one, and gate and up, as they read the same",
        default="site",
    )
    router: Literal["linear", "cosine", "static"] = opt("where logits come from", default="linear")
    renormalise: bool | None = opt("make the chosen weights sum to one", default=None)
    gate_scale: Literal["prob", "none", "straight_through"] | None = opt(
        "multiply by the weight, by one, or by one with the weight's gradient", default=None
    )
    temperature: float = opt("router logits are divided by it", default=1.0, min=0.001)
    jitter: float = opt("router inputs times U(1-j, 1+j), in training", default=0.0, min=0, max=1)
    router_std: float = opt("standard deviation of the router's first weights", default=0.02, min=0)
    router_init: Literal["random", "zero", "prototypes"] = opt(
        "how routers start: random, all experts alike, or each expert's main input direction with --router cosine (imported LoRAs)",
        default="random",
    )
    null_experts: int = opt("experts that change nothing, for tokens that may keep the base model", default=0, min=0)
    base_weight: Literal["one", "paper"] = opt(
        "what the frozen FFN counts: one, whatever the gates sum to, or their sum, as papers have it", default="one"
    )
    seed: int = opt("seed of everything random", default=0, min=0)
    verify: bool | None = opt(
        "prove the written adapter: step 0, saved and loaded, gradients, forced routes beside PEFT, base untouched (default: if it fits in memory)",
        default=None,
    )
