"""A mixture's feed-forward experts, from the tokens to their weighted sum; see README.md."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Backend, Op, always, triton_lacks
from ..pairs import Pairs
from .cpu import why_not as _cpu_lacks
from .library import why_not as _library_lacks


def _triton_lacks(
    x: Tensor, pairs: Pairs, up: Tensor, down: Tensor, *, up_bias: Tensor | None, down_bias: Tensor | None, **_: object
) -> str | None:
    return triton_lacks(x, up, down, up_bias, down_bias)


OP = Op(
    "expert_ffn",
    Backend("triton", "expert_ffn.triton:expert_ffn", _triton_lacks),
    Backend("cpu", "expert_ffn.cpu:expert_ffn", _cpu_lacks),
    Backend("torch", "expert_ffn.library:expert_ffn", _library_lacks),
    Backend("reference", "expert_ffn.reference:expert_ffn", always),
)


def expert_ffn(
    x: Tensor,
    pairs: Pairs,
    up: Tensor,
    down: Tensor,
    *,
    activation: str,
    gated: bool = True,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """out_t = sum over the pairs (t, e, w) of w * FFN_e(x_t).

    FFN_e(x) = D_e (act(G_e x + g_e) * (U_e x + u_e)) + d_e where gated, D_e act(U_e x + u_e) + d_e where not.

    Args:
        x: [T, D].
        up: [E, 2F, D], the F rows of G_e before those of U_e, when gated; else [E, F, D].
        down: [E, D, F].
        up_bias, down_bias: [E, 2F or F], [E, D].
        activation: a name that moeforge_kernels.activations knows.

    Returns:
        [T, D] in x's dtype. Differentiable in x, the weights, the biases and the pairs' weights.
    """
    options = {"activation": activation, "gated": gated, "up_bias": up_bias, "down_bias": down_bias}
    return OP.run(backend, x, pairs, up, down, **options)
