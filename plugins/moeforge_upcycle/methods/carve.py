"""The dense FFN cut into experts with nothing added: fewer neurons a token, at the price of the lost ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moeforge.errors import UsageProblem
from moeforge.options import opt

from .. import partition
from ..calibrate import SAMPLES
from ..recipe import ExpertRecipe, Layer, LayerRecipe, LayerStats, MixtureShape
from ..routers import chance, temperature


@dataclass(frozen=True)
class Options:
    shared: int = opt("widths of a routed expert that go into an always active one", default=0, min=0)
    partition: Literal["coactivation", "kmeans", "activation", "random", "contiguous"] = opt(
        "which neurons form an expert", default="coactivation"
    )
    router: Literal["analytic", "stage"] = opt(
        "rows fitted to how much each expert would add (analytic), or those of --router-init", default="analytic"
    )
    output_scale: Literal["visited", "expected", "llama-moe"] = opt(
        "weight of a visited neuron on average: 1 as in the dense model, E/k to make up for the others, or E/k^2 "
        "(LLaMA-MoE multiplies weights that sum to one by E/k)",
        default="visited",
    )
    flatness: float = opt(
        "how far the analytic router keeps weights from being equal: mean first-choice score over that of chance",
        default=1.05,
        min=1.0001,
    )
    ridge: float = opt(
        "regularisation of the analytic router, relative to the mean square of its inputs", default=0.01, min=0
    )


class Carve:
    name = "carve"
    summary = "experts cut from the FFN without added parameters; fewer active ones, not the same function"
    reference = "LLaMA-MoE, arXiv:2406.16554; CMoE, arXiv:2502.04416; MoEfication, arXiv:2110.01786"
    api_version = 1
    Options = Options

    def shape(self, ffn_width: int, stage: Any, options: Options) -> MixtureShape:
        if options.router == "analytic" and stage.router_init != type(stage).router_init:
            raise UsageProblem(
                f"--router-init {stage.router_init} has no effect: --router analytic makes the rows; give --router stage with it"
            )
        parts = stage.experts + options.shared
        if ffn_width % parts:
            raise UsageProblem(
                f"--experts {stage.experts} and --shared {options.shared} cut the FFN into {parts} equal parts, "
                f"which do not divide its {ffn_width} neurons"
            )
        width = ffn_width // parts
        share = stage.experts / stage.top_k
        scales = {"visited": stage.top_k, "expected": stage.experts, "llama-moe": share}
        return MixtureShape(
            stage.experts,
            stage.top_k,
            width,
            shared_width=options.shared * width,
            routed_scale=float(scales[options.output_scale]),
            exact=False,
            why_inexact=f"a token visits {stage.top_k + options.shared} of {parts} parts of the FFN",
        )

    def needs(self, stage: Any, options: Options) -> frozenset[str]:
        wanted = set(partition.NEEDS[options.partition])
        if options.shared:
            wanted.add("rate")
        if options.router == "analytic":
            wanted |= {"samples", "activations"}
        return frozenset(wanted)

    def work_bytes(self, model_width: int, ffn_width: int, options: Options) -> int:
        return partition.work_bytes(options.partition, model_width, ffn_width) + 24 * SAMPLES * (
            ffn_width + model_width
        )

    def recipe(self, layer: Layer, shape: MixtureShape, stage: Any, options: Options) -> LayerRecipe:
        stats = layer.stats[0]
        neurons, shared = np.arange(layer.ffn_width), None
        if shape.shared_width:
            assert stats is not None and stats.rate is not None
            order = np.argsort(-stats.rate, kind="stable")
            shared = ExpertRecipe(neurons=np.sort(order[: shape.shared_width]))
            neurons = np.sort(order[shape.shared_width :])
        sets = partition.partition(options.partition, layer, shape.experts, neurons=neurons)
        router = None
        if options.router == "analytic":
            assert stats is not None
            router = analytic_router(layer, stats, sets, options.ridge, options.flatness)
        return LayerRecipe(tuple(ExpertRecipe(neurons=chosen) for chosen in sets), shared, router)


def analytic_router(
    layer: Layer, stats: LayerStats, sets: list[np.ndarray], ridge: float, flatness: float
) -> np.ndarray:
    """[E, D] float32 rows whose order of logits is, by least squares, the order of what the experts would add.

    For token x expert e adds about y_e = sum over its neurons of |h_i(x)| |d_i|, h the activation and d the column of down.
    With Y centred over the experts (a constant shared by all changes no choice), W = (X'X + lambda I)^-1 X'Y. Logits are then
    made almost equal: visited experts should weigh about the same, as their neurons do in the dense model, and only the order
    of the logits chooses.

    After CMoE's analytic router, which takes the activation of one representative neuron for an expert; that is not linear in
    x, so no native layout could hold it.
    """
    assert stats.samples is not None and stats.activations is not None
    x = stats.samples.astype(np.float64)
    size = np.abs(stats.activations.astype(np.float64)) * np.linalg.norm(layer.read("down", 0), axis=0)
    y = np.stack([size[:, chosen].sum(1) for chosen in sets], axis=1)
    y -= y.mean(1, keepdims=True)
    gram = x.T @ x
    gram += np.eye(len(gram)) * (ridge * np.trace(gram) / len(gram))
    rows = np.linalg.solve(gram, x.T @ y).T
    least = chance(layer.scoring, len(sets))
    target = min(flatness * least, (1 + least) / 2)
    return (rows * temperature(x @ rows.T, target, layer.scoring)).astype(np.float32)
