"""One matrix product an expert, over the rows that chose it; see README.md."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Backend, Op, always, triton_lacks
from ..pairs import Pairs
from .library import why_not as _library_lacks


def _triton_lacks(
    x: Tensor, weight: Tensor, pairs: Pairs, *, bias: Tensor | None = None, gather: bool = True
) -> str | None:
    return triton_lacks(x, weight, bias)


OP = Op(
    "grouped_gemm",
    Backend("triton", "grouped_gemm.triton:grouped_gemm", _triton_lacks),
    Backend("torch", "grouped_gemm.library:grouped_gemm", _library_lacks),
    Backend("reference", "grouped_gemm.reference:grouped_gemm", always),
)


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    pairs: Pairs,
    *,
    bias: Tensor | None = None,
    gather: bool = True,
    backend: str | None = None,
) -> Tensor:
    """y_p = W[expert_p] x_row(p) + b[expert_p] for every real pair p.

    Args:
        x: [T, K] rows of tokens when `gather` (row of pair p: token_p), else [P, K] rows of pairs.
        weight: [E, N, K].
        bias: [E, N].

    Returns:
        [P, N] in x's dtype; rows of empty pairs are zero. Differentiable in x, weight and bias.
    """
    return OP.run(backend, x, weight, pairs, bias=bias, gather=gather)
