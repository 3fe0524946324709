"""Fine-grained experts in virtual groups: the FFN is cut into shards that are always chosen together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeforge.errors import UsageProblem
from moeforge.options import opt

from ..partition import NEEDS, Kind, partition, work_bytes
from ..recipe import ExpertRecipe, Layer, LayerRecipe, MixtureShape


@dataclass(frozen=True)
class Options:
    granularity: int = opt("shards that one FFN is cut into; experts and top_k are multiples of it", default=2, min=1)
    partition: Kind = opt("which neurons form a shard; any choice is exact", default="contiguous")


class Split:
    name = "split"
    summary = "fine-grained experts: shards of the FFN in virtual groups; the same function at step 0"
    reference = "Upcycling LLMs into MoE, arXiv:2410.07524 (virtual groups), with an output scale exact for gated FFNs"
    api_version = 1
    Options = Options

    def shape(self, ffn_width: int, stage: Any, options: Options) -> MixtureShape:
        parts = options.granularity
        check_groups(stage, parts)
        if ffn_width % parts:
            raise UsageProblem(f"--granularity {parts} does not divide the FFN's {ffn_width} neurons")
        return MixtureShape(stage.experts, stage.top_k, ffn_width // parts, tied=parts, routed_scale=float(parts))

    def needs(self, stage: Any, options: Options) -> frozenset[str]:
        return NEEDS[options.partition]

    def work_bytes(self, model_width: int, ffn_width: int, options: Options) -> int:
        return work_bytes(options.partition, model_width, ffn_width)

    def recipe(self, layer: Layer, shape: MixtureShape, stage: Any, options: Options) -> LayerRecipe:
        shards = partition(options.partition, layer, shape.tied)
        return LayerRecipe(tuple(ExpertRecipe(neurons=shards[e % shape.tied]) for e in range(shape.experts)))


def check_groups(stage: Any, parts: int) -> None:
    """Whole virtual groups only.

    Raises:
        UsageProblem: --experts or --top-k is no multiple of the granularity.
    """
    for name, value in (("--experts", stage.experts), ("--top-k", stage.top_k)):
        if value % parts:
            raise UsageProblem(f"{name} {value} is not a multiple of --granularity {parts}: a group of {parts} shards "
                               "would be chosen in part")  # fmt: skip
