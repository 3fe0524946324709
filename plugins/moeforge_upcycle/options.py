"""The options of `moeforge upcycle` that every method shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moeforge.errors import UsageProblem
from moeforge.options import Bytes, opt
from moeforge.pipeline.reading import Decoding

from . import advice

EXPERTS = 8
"""--experts where neither the user nor the method says."""
DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
"""--dtype -> safetensors' name."""


@dataclass(frozen=True)
class Options(Decoding):
    experts: int | None = opt(
        f"routed experts in every sparse layer (default: {EXPERTS}; for btx one of each checkpoint, for lora what SRC has)",
        default=None,
        min=2,
    )
    top_k: int = opt("experts that a token visits", default=2, min=1)
    target: str = opt(
        "layout of the result, or auto: the first native one that holds this model exactly, else moeforge, our own runtime's",
        default="auto",
    )
    layers: str = opt(
        "layers that become sparse: all, every:N, last-half, first:N, or a list such as 0,3,5-7", default="all"
    )
    router_init: Literal["random", "zero", "uniform", "centroid", "ridge", "kmeans", "prompts"] = opt(
        "how router rows start; the last four come from text", default="random"
    )
    router_std: float = opt("standard deviation of random router rows", default=0.02, min=0)
    router_top1: float | None = opt(
        "mean probability of the first choice that a router made from text is scaled to (default: half, "
        "or three quarters where half is what chance gives)",
        default=None,
        min=0,
        max=1,
    )
    calibration: tuple[str, ...] = opt(
        "text file to measure on, one a domain; builtin:prose and builtin:code need no file (default: both)",
        default=(),
        reads=True,
    )
    calibration_tokens: int = opt("tokens measured of each domain", default=4096, min=64)
    prompts: Path | None = opt("TOML file with [[expert]] prompts, for --router-init prompts", default=None)
    untie: float = opt("relative noise that unties the router rows of a virtual group", default=0.0, min=0)
    norm_topk: bool = opt("make the top-k weights sum to one", default=True)
    scale: Literal["down", "split", "routed-factor", "cuberoot"] = opt(
        "where the output scale of a split goes; cuberoot (Megatron) is not exact", default="down"
    )
    seed: int = opt("seed of everything random", default=0, min=0)
    dtype: Literal["keep", "bf16", "f16", "f32"] = opt("dtype of the written weights", default="keep")
    max_shard_size: Bytes = opt("largest safetensors file", default=Bytes(5_000_000_000), unit="bytes")
    max_memory: Bytes | None = opt("work within this much memory", default=None, affects_output=False)
    workers: int | None = opt("threads", default=None, min=1, affects_output=False)
    verify: bool | None = opt(
        "prove from the written files that the function is the same (default: if a layer fits in memory)", default=None
    )
    bf16_kl: bool = opt(
        "record the KL divergence when both models run in bfloat16, too; slow on a CPU without bfloat16", default=False
    )
    allow_inexact: bool = opt("turn reasons why the result cannot be exact into recorded warnings", default=False)

    dense_tokens: str | None = opt(
        "tokens that the dense model was trained on, such as 2T: with --planned-tokens, the plan says if upcycling pays",
        default=None,
        affects_output=False,
    )
    planned_tokens: str | None = opt(
        "tokens that the mixture will be trained on, such as 100B", default=None, affects_output=False
    )

    def __post_init__(self) -> None:
        if (self.dense_tokens is None) != (self.planned_tokens is None):
            raise UsageProblem("--dense-tokens and --planned-tokens go together")
        for flag, value in (("--dense-tokens", self.dense_tokens), ("--planned-tokens", self.planned_tokens)):
            if value is not None:
                advice.tokens(value, flag)
        if self.experts is not None and self.top_k > self.experts:
            raise UsageProblem(f"--top-k {self.top_k} is more than --experts {self.experts}")
        if self.bf16_kl and self.verify is False:
            raise UsageProblem("--bf16-kl runs both models, which --no-verify forbids; drop one of the two")
        if (self.router_init == "prompts") != (self.prompts is not None):
            raise UsageProblem("--router-init prompts and --prompts FILE go together")
