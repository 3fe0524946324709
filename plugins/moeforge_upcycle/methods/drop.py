"""Drop-Upcycling: every expert forgets a share of its neurons and starts them anew with the old statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moeforge.options import opt

from ..recipe import ExpertRecipe, Layer, LayerRecipe, Matrix, MixtureShape, chosen_neurons, neuron_index


@dataclass(frozen=True)
class Options:
    r: float = opt(
        "share of the neurons that are drawn anew: 0 copies, 1 starts from scratch", default=0.5, min=0, max=1
    )
    index_set: Literal["shared", "per_matrix"] = opt(
        "same neurons in the three matrices, as the paper says, or a set for each, as its released code does",
        default="shared",
    )


class Drop:
    name = "drop"
    summary = "copies of which a share of the neurons is drawn anew from the statistics of what it replaces"
    reference = "Drop-Upcycling, arXiv:2502.19261"
    api_version = 1
    Options = Options

    def shape(self, ffn_width: int, stage: Any, options: Options) -> MixtureShape:
        count = int(options.r * ffn_width)
        why = f"{count} of {ffn_width} neurons of every expert are drawn anew" if count else ""
        return MixtureShape(stage.experts, stage.top_k, ffn_width, exact=not count, why_inexact=why)

    def needs(self, stage: Any, options: Options) -> frozenset[str]:
        return frozenset()

    def recipe(self, layer: Layer, shape: MixtureShape, stage: Any, options: Options) -> LayerRecipe:
        count = int(options.r * layer.ffn_width)
        if count == 0:
            return LayerRecipe((ExpertRecipe(),) * shape.experts)

        def perturb(expert: int):
            def redraw(matrix: Matrix, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
                word = f"drop {expert}" + (f" {matrix}" if options.index_set == "per_matrix" else "")
                where = neuron_index(matrix, chosen_neurons(layer, word, count))
                old = values[where]
                values[where] = rng.standard_normal(old.shape, dtype=np.float32) * old.std() + old.mean()
                return values

            return redraw

        return LayerRecipe(tuple(ExpertRecipe(perturb=perturb(e)) for e in range(shape.experts)))
