"""One op after the other, each with a back end of its own choice."""

from __future__ import annotations

from torch import Tensor

from ..lora_experts import lora_expand, lora_shrink
from ..lora_ffn import lora_ffn
from ..pairs import Pairs


def lora_network(x: Tensor, gate: Tensor | None, up: Tensor, pairs: Pairs, a_gate: Tensor | None, a_up: Tensor | None, b_gate: Tensor | None,
             b_up: Tensor | None, a_down: Tensor | None, b_down: Tensor | None, scale: Tensor, *, activation: str, rest: bool
             ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See :func:`moeforge_kernels.lora_network.lora_network`."""
    low_gate = None if a_gate is None else lora_shrink(x, pairs, a_gate)
    low_up = low_gate if a_up is a_gate else None if a_up is None else lora_shrink(x, pairs, a_up)
    mixed, low_down = lora_ffn(
        gate, up, low_gate, low_up, pairs, b_gate, b_up, a_down, scale, activation=activation, rest=rest
    )
    if low_down is None or b_down is None:
        return mixed, None
    return mixed, lora_expand(low_down, pairs, b_down, scale)
