"""All that LoRA experts which share a feed-forward network do but for its frozen maps; see README.md."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Backend, Op, always
from ..pairs import Pairs
from .cpu import why_not as _cpu_lacks

OP = Op(
    "lora_network",
    Backend("cpu", "lora_network.cpu:lora_network", _cpu_lacks),
    Backend("reference", "lora_network.reference:lora_network", always),
)


def lora_network(x: Tensor, gate: Tensor | None, up: Tensor, pairs: Pairs, a_gate: Tensor | None, a_up: Tensor | None,
                 b_gate: Tensor | None, b_up: Tensor | None, a_down: Tensor | None, b_down: Tensor | None, scale: Tensor, *,
                 activation: str, rest: bool, backend: str | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """:func:`moeforge_kernels.lora_ffn.lora_ffn` with low_gate = A_e x, low_up = A'_e x of each pair, and the deltas of the map behind.

    Args:
        x: [T, D] what the network reads.
        a_gate, a_up: [E, r, D]; may be one tensor. None: that map has no deltas.
        b_gate, b_up: [E, F, r]. a_down: [E, r, F]. b_down: [E, D', r].
        backend: `cpu`, for the few pairs of a decoding step, which has no way back, or `reference`, which leaves each of the three parts
            its own choice; default: the first that can.

    Returns:
        mixed [T, F] in up's dtype, and sum_p w_p s_e B''_e A''_e h_p [T, D'], None where the map behind has no deltas.

    Raises:
        ValueError: a backend is asked for that there is not, or that cannot run this.
    """
    given = (x, gate, up, pairs, a_gate, a_up, b_gate, b_up, a_down, b_down, scale)
    return OP.run(backend, *given, activation=activation, rest=rest)
