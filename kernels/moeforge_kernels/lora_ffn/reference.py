"""What the back ends must give, in plain torch, expert after expert."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import activation as find
from ..pairs import Pairs


def lora_ffn(gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None, pairs: Pairs, b_gate: Tensor | None,
             b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, *, activation: str, rest: bool
             ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See :func:`moeforge_kernels.lora_ffn.lora_ffn`."""
    act = find(activation)
    mixed = up.new_zeros(up.shape, dtype=torch.promote_types(up.dtype, torch.float32))
    low_down = None if a_down is None else up.new_zeros(len(pairs.token), a_down.shape[1])
    start = 0
    for e, stop in enumerate(pairs.offsets.tolist()):
        rows = torch.arange(start, stop, device=up.device)
        token = pairs.token[rows]

        def ahead(
            base: Tensor, low: Tensor | None, b: Tensor | None, e: int = e, rows: Tensor = rows, token: Tensor = token
        ) -> Tensor:
            return (
                base[token] if low is None or b is None else base[token] + scale[e].to(low.dtype) * (low[rows] @ b[e].T)
            )

        hidden = (
            act(ahead(up, low_up, b_up))
            if gate is None
            else act(ahead(gate, low_gate, b_gate)) * ahead(up, low_up, b_up)
        )
        mixed = mixed.index_add(0, token, pairs.weight[rows].unsqueeze(-1).to(mixed.dtype) * hidden)
        if a_down is not None and low_down is not None:
            low_down = low_down.index_add(0, rows, hidden @ a_down[e].T)
        start = stop
    if rest:
        left = 1 - pairs.gates().sum(-1, keepdim=True)
        mixed = mixed + left * (act(up) if gate is None else act(gate) * up)
    return mixed.to(up.dtype), low_down
