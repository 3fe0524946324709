"""A mixture's feed-forward experts for a handful of tokens, without sorting; see README.md."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Backend, Op, always, triton_lacks

TOKENS = 16
"""The most that it is meant for: beyond, an expert's weights are worth loading once for all of its tokens (expert_ffn)."""


def _triton_lacks(x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, *, up_bias: Tensor | None, down_bias: Tensor | None,
                  **_: object) -> str | None:  # fmt: skip
    return triton_lacks(x, up, down, up_bias, down_bias)


OP = Op(
    "expert_gemv",
    Backend("triton", "expert_gemv.triton:expert_gemv", _triton_lacks),
    Backend("torch", "expert_gemv.library:expert_gemv", always),
    Backend("reference", "expert_gemv.reference:expert_gemv", always),
)


def expert_gemv(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: str,
    gated: bool = True,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """out_t = sum_s w_ts * FFN_{e_ts}(x_t), as moeforge_kernels.expert_ffn computes it; forward only.

    No sort and no wait for the device: shapes and launches do not depend on the choice, so it may be captured in a CUDA graph.

    Args:
        x: [T, D]; T is at most `TOKENS` where it is to be fast.
        index: [T, S] expert ids; E marks an empty slot.
        weight: [T, S]; what stands at empty slots is ignored.
        up, down, up_bias, down_bias, activation, gated: as for expert_ffn.

    Returns:
        [T, D] in x's dtype. Not differentiable.

    Raises:
        ValueError: a backend is asked for that cannot run this.
    """
    options = {"activation": activation, "gated": gated, "up_bias": up_bias, "down_bias": down_bias}
    return OP.run(backend, x, index, weight, up, down, **options)
