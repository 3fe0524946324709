"""Every expert is the whole dense FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..recipe import ExpertRecipe, Layer, LayerRecipe, MixtureShape


@dataclass(frozen=True)
class Options:
    """None of its own."""


class Copy:
    name = "copy"
    summary = "every expert a copy of the dense FFN; the same function at step 0"
    reference = "Sparse Upcycling, arXiv:2212.05055"
    api_version = 1
    Options = Options

    def shape(self, ffn_width: int, stage: Any, options: Options) -> MixtureShape:
        return MixtureShape(stage.experts, stage.top_k, ffn_width)

    def needs(self, stage: Any, options: Options) -> frozenset[str]:
        return frozenset()

    def recipe(self, layer: Layer, shape: MixtureShape, stage: Any, options: Options) -> LayerRecipe:
        return LayerRecipe((ExpertRecipe(),) * shape.experts)
