"""Logits to the sorted list of pairs, for the policies that most checkpoints have; see README.md."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..dispatch import Backend, Op, always, triton_is_usable
from ..pairs import Pairs
from .cpu import why_not as _cpu_lacks


def _triton_lacks(logits: Tensor, top_k: int, *, bias: Tensor | None, **_: object) -> str | None:
    if (reason := triton_is_usable(logits.device.type)) is not None:
        return reason
    if logits.dtype.itemsize > 4:
        return f"the kernel computes in float32; the logits are {logits.dtype}"
    if logits.shape[1] > 1024:
        return f"a token's logits must fit into one program: at most 1024 experts, not {logits.shape[1]}"
    if bias is not None and bias.dtype.itemsize > 4:
        return f"the kernel compares in float32; the bias is {bias.dtype}"
    return None


OP = Op(
    "routing",
    Backend("triton", "routing.triton:route", _triton_lacks),
    Backend("cpu", "routing.cpu:route", _cpu_lacks),
    Backend("reference", "routing.reference:route", always),
)


def route(
    logits: Tensor,
    top_k: int,
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    select_first: bool = False,
    renormalise: bool = True,
    factor: float = 1.0,
    bias: Tensor | None = None,
    real: Tensor | None = None,
    backend: str | None = None,
) -> Pairs:
    """Each token goes to its `top_k` best experts, the lowest index first among equals.

    Args:
        logits: [T, E] of any floating type; computed in float32 (float64 stays).
        select_first: choose among the logits and score the chosen; otherwise score all and choose among the scores.
        renormalise: divide a token's weights by their sum.
        factor: then multiply by this.
        bias: [E] is added for the choice, not for the weight (DeepSeek-V3).
        real: [T] bool; tokens where it is False go nowhere.

    Returns:
        The list; its weights are differentiable in the logits.
    """
    options = {"score": score, "select_first": select_first, "renormalise": renormalise, "factor": factor, "bias": bias, "real": real}  # fmt: skip
    return OP.run(backend, logits, top_k, **options)
