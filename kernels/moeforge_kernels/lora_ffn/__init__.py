"""What LoRA experts that share a frozen feed-forward network do between its two products; see README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Backend, Op, always, triton_lacks
from ..pairs import Pairs
from .cpu import unlike_ranks
from .cpu import why_not as _cpu_lacks

RANK_BYTES = 256
"""Of one row of ranks that the Triton kernels take in one step: 128 of 16 bits, 64 of float32."""


def _triton_lacks(gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None, pairs: Pairs, b_gate: Tensor | None,
                  b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, **_: object) -> str | None:  # fmt: skip
    deltas = [tensor for tensor in (b_gate, b_up, a_down) if tensor is not None]
    if (reason := triton_lacks(up, gate)) is not None or not deltas:
        return reason
    if (reason := triton_lacks(*deltas) or unlike_ranks(low_gate, low_up, a_down)) is not None:
        return reason
    rank, kind = deltas[0].shape[2] if a_down is None else a_down.shape[1], deltas[0].dtype
    if rank * kind.itemsize > RANK_BYTES:
        return (
            f"the kernels take all ranks in one step, {RANK_BYTES // kind.itemsize} of {kind} at most; here are {rank}"
        )
    return None


OP = Op(
    "lora_ffn",
    Backend("triton", "lora_ffn.triton:lora_ffn", _triton_lacks),
    Backend("cpu", "lora_ffn.cpu:lora_ffn", _cpu_lacks),
    Backend("blocked", "lora_ffn.blocked:lora_ffn", always),
    Backend("grouped", "lora_ffn.grouped:lora_ffn", always),
    Backend("reference", "lora_ffn.reference:lora_ffn", always),
)


def lora_ffn(gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None, pairs: Pairs, b_gate: Tensor | None,
             b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, *, activation: str, rest: bool, backend: str | None = None
             ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """For every pair p = (t, e, w), with what the frozen maps gave for its token:

        g_p = gate_t + s_e B_e low_gate_p,   u_p = up_t + s_e B'_e low_up_p,   h_p = act(g_p) * u_p       (h_p = act(u_p) without a gate)
        mixed_t = sum_p w_p h_p + (1 - sum_p w_p) act(gate_t) * up_t,   low_down_p = A_e h_p

    The second term, left out where `rest` is False, makes the frozen network count once whatever the weights sum to; where they sum to 1
    up to 1e-6 it may be taken as 0, its gradient is not. With it, W mixed is f(x) + sum_p w_p (f_e(x) - f(x)) before the down-deltas
    (arXiv:2404.15159 with that base path; W commutes with the sum).

    Args:
        gate, up: [T, F]; may be slices of one tensor.
        low_gate, low_up: [P, r], rows of pairs; None: that map has no deltas.
        b_gate, b_up: [E, F, r]. a_down: [E, r, F]. None likewise.
        scale: [E] float32, without gradient; the down-delta's is not applied here.
        backend: default: `triton` or `cpu` where they can, else `blocked`, or `grouped` under torch.compile.

    Returns:
        mixed [T, F] in up's dtype; low_down [P, r], zero for empty pairs, or None. Differentiable in everything but scale.

    Raises:
        ValueError: a backend is asked for that there is not, or that cannot run this.
    """
    given = (gate, up, low_gate, low_up, pairs, b_gate, b_up, a_down, scale)
    default = "grouped" if torch.compiler.is_compiling() and _triton_lacks(*given) and _cpu_lacks(*given) else None
    return OP.choose(backend, *given, default=default).function(*given, activation=activation, rest=rest)
