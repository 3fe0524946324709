"""Always-active neurons in a shared expert, the others in routed shards: exact, which upcycling with a shared expert
elsewhere is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moeforge.errors import UsageProblem
from moeforge.options import opt

from ..partition import NEEDS, Kind, importance, partition, work_bytes
from ..recipe import ExpertRecipe, Layer, LayerRecipe, MixtureShape
from .split import check_groups


@dataclass(frozen=True)
class Options:
    shared: int = opt("width of the shared expert, in widths of a routed one", default=1, min=1)
    granularity: int = opt(
        "shards that the routed neurons are cut into; experts and top_k are multiples of it", default=1, min=1
    )
    partition: Kind = opt("which of the routed neurons form a shard; any choice is exact", default="contiguous")
    rank: Literal["activation", "norm", "random"] = opt(
        "which neurons are shared: most active on calibration text, largest weights, or any", default="activation"
    )
    fill: Literal["neurons", "half"] = opt(
        "what is shared: some neurons, which the routed experts then lack (neurons), or the whole FFN at half weight, beside "
        "routed experts of the whole FFN at half weight (half)",
        default="neurons",
    )

    def __post_init__(self) -> None:
        if self.fill == "half":
            for name in ("shared", "rank"):
                if (value := getattr(self, name)) != getattr(type(self), name):
                    raise UsageProblem(f"--{name} {value} has no effect: --fill half shares all neurons")


class Shared:
    name = "shared"
    summary = "most active neurons in a shared expert, the rest in routed ones; the same function at step 0"
    reference = "Qwen2, arXiv:2407.10671, section 2 (layout); exact split after arXiv:2410.07524"
    api_version = 1
    Options = Options

    def shape(self, ffn_width: int, stage: Any, options: Options) -> MixtureShape:
        half = options.fill == "half"
        parts = options.granularity if half else options.shared + options.granularity
        check_groups(stage, options.granularity)
        if half and ffn_width % parts:
            raise UsageProblem(f"--granularity {parts} does not divide the FFN's {ffn_width} neurons")
        if ffn_width % parts:
            raise UsageProblem(f"--shared {options.shared} and --granularity {options.granularity} cut the FFN into {parts} "
                               f"equal parts, which do not divide its {ffn_width} neurons")  # fmt: skip
        width = ffn_width // parts
        return MixtureShape(
            stage.experts,
            stage.top_k,
            width,
            shared_width=ffn_width if half else options.shared * width,
            tied=options.granularity,
            routed_scale=options.granularity * (0.5 if half else 1.0),
        )

    def needs(self, stage: Any, options: Options) -> frozenset[str]:
        ranked = options.fill == "neurons" and options.rank == "activation"
        return NEEDS[options.partition] | ({"activation"} if ranked else frozenset())

    def work_bytes(self, model_width: int, ffn_width: int, options: Options) -> int:
        return work_bytes(options.partition, model_width, ffn_width)

    def recipe(self, layer: Layer, shape: MixtureShape, stage: Any, options: Options) -> LayerRecipe:
        if options.fill == "half":
            rest, shared = np.arange(layer.ffn_width), ExpertRecipe(scale={"down": 0.5})
        else:
            order = np.argsort(-self._importance(layer, options.rank), kind="stable")
            rest, shared = order[shape.shared_width :], ExpertRecipe(neurons=np.sort(order[: shape.shared_width]))
        shards = partition(options.partition, layer, shape.tied, neurons=rest)
        return LayerRecipe(tuple(ExpertRecipe(neurons=shards[e % shape.tied]) for e in range(shape.experts)), shared)

    def _importance(self, layer: Layer, rank: str) -> np.ndarray:
        """[F] float64: how much each neuron contributes to the output."""
        if rank == "random":
            return layer.rng("shared").random(layer.ffn_width)
        if rank == "activation":
            return importance(layer)
        norms = [np.linalg.norm(layer.read(m, 0), axis=0 if m == "down" else 1) for m in layer.matrices]
        return np.prod([norm.astype(np.float64) for norm in norms], axis=0)
