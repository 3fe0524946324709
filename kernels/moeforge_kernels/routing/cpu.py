"""The choice of a few tokens in one compiled call: a decoding step would otherwise spend twenty small ones on it.

There is no way back: gradients are for other back ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpu import library
from ..pairs import Pairs

TOKENS = 64
"""T up to which one thread is faster than torch's sort of them all."""


def why_not(logits: Tensor, top_k: int, *, bias: Tensor | None, real: Tensor | None = None, **_: object) -> str | None:
    """What is in the way, in one sentence."""
    # before any size is looked at: that would bind torch.compile's graph to it
    if (reason := library.lacks_way_there(logits=logits, bias=bias)) is not None:
        return reason
    if logits.shape[0] > TOKENS:
        return f"it is for at most {TOKENS} tokens; here are {logits.shape[0]}"
    if real is not None and (real.device.type != "cpu" or real.dtype != torch.bool):
        return f"real is {real.dtype} on {real.device.type}"
    if logits.dtype != torch.float32:
        return f"it computes in float32; the logits are {logits.dtype}"
    return None


def route(logits: Tensor, top_k: int, *, score: str, select_first: bool, renormalise: bool, factor: float, bias: Tensor | None,
          real: Tensor | None) -> Pairs:  # fmt: skip
    """See :func:`moeforge_kernels.routing.route`."""
    tokens, experts = logits.shape
    if not 0 < top_k <= experts:
        raise ValueError(f"routing: top_k = {top_k} of {experts} experts")
    count = tokens * top_k
    token, expert, by_token = library.empty(3, count, dtype=torch.int64)
    weight, offsets = library.empty(count), library.empty(experts, dtype=torch.int32)
    held = (
        logits.contiguous(),
        None if bias is None else bias.contiguous(),
        None if real is None else real.contiguous(),
    )
    call = library.Route(
        tokens, experts, top_k, score == "sigmoid", select_first, renormalise, factor, *map(library.pointer, held),
        *(made.data_ptr() for made in (token, expert, weight, offsets, by_token)),
    )  # fmt: skip
    library.run("route", call, logits.dtype)
    return Pairs(token, expert, weight, offsets, by_token, tokens, top_k)
