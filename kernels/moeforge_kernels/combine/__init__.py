"""The pairs' answers, weighted and summed for each token; see README.md."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Backend, Op, always, triton_lacks
from ..pairs import Pairs


def _triton_lacks(y: Tensor, pairs: Pairs) -> str | None:
    return triton_lacks(y)


OP = Op(
    "combine",
    Backend("triton", "combine.triton:combine", _triton_lacks),
    Backend("torch", "combine.library:combine", always),
    Backend("reference", "combine.reference:combine", always),
)


def combine(y: Tensor, pairs: Pairs, *, backend: str | None = None) -> Tensor:
    """out_t = sum over the real pairs p of token t of weight_p * y_p, always in the same order: bit-reproducible.

    Args:
        y: [P, N]; rows of empty pairs are ignored, whatever they hold.

    Returns:
        [T, N] in y's dtype, summed in float32 (float64 stays). Differentiable in y and the pairs' weights.
    """
    return OP.run(backend, y, pairs)
