"""One compiled call for the few pairs of a decoding step: what was chosen is read where it lies, and nothing as wide as F is written but
the answer. There is no way back: gradients are for other back ends.
"""

from __future__ import annotations

from torch import Tensor

from ..activations import canonical
from ..cpu import library
from ..lora_experts.cpu import PAIRS, Lists
from ..lora_ffn.cpu import arguments, unlike_ranks
from ..pairs import Pairs


def why_not(x: Tensor, gate: Tensor | None, up: Tensor, pairs: Pairs, a_gate: Tensor | None, a_up: Tensor | None, b_gate: Tensor | None,
             b_up: Tensor | None, a_down: Tensor | None, b_down: Tensor | None, scale: Tensor, **_: object) -> str | None:  # fmt: skip
    """What is in the way, in one sentence."""
    # before any size is looked at: that would bind torch.compile's graph to it
    reason = library.lacks_way_there(x=x, gate=gate, up=up, a_gate=a_gate, a_up=a_up, b_gate=b_gate, b_up=b_up, a_down=a_down,
                                     b_down=b_down, weight=pairs.weight)  # fmt: skip
    if reason is None and pairs.token.shape[0] > PAIRS:
        return f"it is for at most {PAIRS} pairs; here are {pairs.token.shape[0]}"
    return reason or unlike_ranks(b_gate, b_up, a_down)


def lora_network(x: Tensor, gate: Tensor | None, up: Tensor, pairs: Pairs, a_gate: Tensor | None, a_up: Tensor | None, b_gate: Tensor | None,
             b_up: Tensor | None, a_down: Tensor | None, b_down: Tensor | None, scale: Tensor, *, activation: str, rest: bool
             ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See :func:`moeforge_kernels.lora_network.lora_network`."""
    lists, x = Lists.of(pairs, scale), library.rows(x)
    a_gate = None if gate is None or b_gate is None else a_gate
    a_up = None if b_up is None else a_up
    count = lists.token.shape[0]
    low_gate, low_up, low_down = (
        None if a is None else library.empty(count, a.shape[1]) for a in (a_gate, a_up, a_down)
    )
    if a_up is a_gate:
        a_up, low_up = None, low_gate  # once for both
    between, held = arguments(gate, up, low_gate, low_up, lists.weight, b_gate, b_up, a_down, lists.scale, None, lists.token, lists.offsets,
                              canonical(activation))  # fmt: skip
    mixed, delta = library.empty(*up.shape, dtype=up.dtype), None
    between.mixed = mixed.data_ptr()
    if low_down is not None and b_down is not None:
        between.low_down = low_down.data_ptr()
        delta = library.empty(x.shape[0], b_down.shape[1])
    a_gate, a_up, b_down = (
        None if w is None else library.rows(w) for w in (a_gate, a_up, b_down if low_down is not None else None)
    )
    call = library.LoraNetwork(rest, x.shape[1], 0 if delta is None else delta.shape[1], x.data_ptr(), x.stride(0),
                               *_place(a_gate), *_place(a_up), *_place(b_down), library.pointer(delta), between)  # fmt: skip
    library.run("lora_network", call, up.dtype)
    del held
    return mixed, None if delta is None else delta.to(up.dtype)


def _place(weight: Tensor | None) -> tuple[int | None, int, int]:
    """Where it lies, and how far its experts and rows are apart."""
    if weight is None:
        return None, 0, 0
    return weight.data_ptr(), weight.stride(0) if weight.shape[0] > 1 else 0, weight.stride(1)
