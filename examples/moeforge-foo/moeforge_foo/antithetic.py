"""`moeforge upcycle --method antithetic`: experts in pairs, one with noise +d and one with -d.

The mean of each pair is the dense FFN's weights, so the experts start apart while the average stays where it was.
"""

from dataclasses import dataclass

import numpy as np

from moeforge.errors import UsageProblem
from moeforge.options import opt
from moeforge_upcycle.recipe import ExpertRecipe, Layer, LayerRecipe, Matrix, MixtureShape


@dataclass(frozen=True)
class Options:
    noise_rel: float = opt("standard deviation of the noise, relative to that of the matrix", default=0.02, min=0.0)


class Antithetic:
    name = "antithetic"
    summary = "copies in pairs with opposite noise"
    reference = "example plugin moeforge-foo"
    api_version = 1
    Options = Options

    def shape(self, ffn_width, stage, options):
        if stage.experts % 2:
            raise UsageProblem(
                f"--method antithetic makes experts in pairs, --experts {stage.experts} is odd; choose an even number"
            )
        return MixtureShape(
            stage.experts, stage.top_k, ffn_width, exact=False, why_inexact="noise is added to every expert"
        )

    def needs(self, stage, options):
        return frozenset()

    def recipe(self, layer: Layer, shape: MixtureShape, stage, options) -> LayerRecipe:
        def perturb(sign: float, pair: int):
            def add(matrix: Matrix, weights: np.ndarray, _: np.random.Generator) -> np.ndarray:
                # The generator is keyed by the pair, not by the expert: both of a pair must draw the same noise.
                noise = layer.rng(f"antithetic/{pair}/{matrix}").standard_normal(weights.shape, dtype=np.float32)
                return weights + np.float32(sign * options.noise_rel) * weights.std() * noise

            return add

        return LayerRecipe(
            tuple(ExpertRecipe(perturb=perturb(1.0 - 2.0 * (e % 2), e // 2)) for e in range(shape.experts))
        )
