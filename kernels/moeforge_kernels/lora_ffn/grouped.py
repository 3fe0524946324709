"""In torch's differentiable ops, without a wait for the device: what torch.compile traces. It keeps the hidden rows of all pairs."""

from __future__ import annotations

from torch import Tensor

from ..activations import activation as find
from ..combine import combine
from ..grouped_gemm import grouped_gemm
from ..pairs import Pairs


def lora_ffn(gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None, pairs: Pairs, b_gate: Tensor | None,
             b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, *, activation: str, rest: bool
             ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See :func:`moeforge_kernels.lora_ffn.lora_ffn`."""
    act = find(activation)
    s = scale[pairs.expert.clamp_max(pairs.experts - 1)].unsqueeze(-1)

    def ahead(base: Tensor, low: Tensor | None, b: Tensor | None) -> Tensor:
        if low is None or b is None:
            return base[pairs.token]
        return base[pairs.token] + grouped_gemm((s * low).to(low.dtype), b.contiguous(), pairs, gather=False)

    u = ahead(up, low_up, b_up)
    hidden = act(u) if gate is None else act(ahead(gate, low_gate, b_gate)) * u
    mixed = combine(hidden, pairs)
    if rest:
        left = 1 - pairs.gates().sum(-1, keepdim=True)
        mixed = mixed + (left * (act(up) if gate is None else act(gate) * up)).to(mixed.dtype)
    low_down = None if a_down is None else grouped_gemm(hidden, a_down, pairs, gather=False)
    return mixed, None if low_down is None else low_down.masked_fill((pairs.expert == pairs.experts).unsqueeze(-1), 0)
