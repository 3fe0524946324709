"""Copies with noise on some of their neurons, so that experts differ from the first step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moeforge.errors import UsageProblem
from moeforge.options import opt

from ..recipe import ExpertRecipe, Layer, LayerRecipe, Matrix, MixtureShape, chosen_neurons, neuron_index


@dataclass(frozen=True)
class Options:
    sigma: float = opt("standard deviation of the noise", default=0.1, min=0)
    unit: Literal["relative", "absolute"] = opt(
        "of sigma: relative to each matrix' own standard deviation, or absolute", default="relative"
    )
    share: float = opt("share of an expert's neurons that get noise", default=0.5, min=0, max=1)

    def __post_init__(self) -> None:
        if not math.isfinite(self.sigma):
            raise UsageProblem(f"--sigma {self.sigma:g}: must be a finite number")


class Noise:
    name = "noise"
    summary = "copies with Gaussian noise on a random share of their neurons"
    reference = "OLMoE, arXiv:2409.02060; the RNU baseline of arXiv:2502.19261 (sigma 0.02 absolute, share 0.5)"
    api_version = 1
    Options = Options

    def shape(self, ffn_width: int, stage: Any, options: Options) -> MixtureShape:
        silent = options.sigma == 0 or int(options.share * ffn_width) == 0
        why = "" if silent else f"noise of sigma {options.sigma:g} changes the weights"
        return MixtureShape(stage.experts, stage.top_k, ffn_width, exact=silent, why_inexact=why)

    def needs(self, stage: Any, options: Options) -> frozenset[str]:
        return frozenset()

    def recipe(self, layer: Layer, shape: MixtureShape, stage: Any, options: Options) -> LayerRecipe:
        count = int(options.share * layer.ffn_width)

        def perturb(expert: int):
            def add(matrix: Matrix, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
                where = neuron_index(matrix, chosen_neurons(layer, f"noise {expert}", count))
                std = np.float32(options.sigma) * (values.std() if options.unit == "relative" else np.float32(1))
                values[where] += rng.standard_normal(values[where].shape, dtype=np.float32) * std
                return values

            return add

        return LayerRecipe(tuple(ExpertRecipe(perturb=perturb(e)) for e in range(shape.experts)))
