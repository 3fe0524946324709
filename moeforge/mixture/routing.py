"""What a router says about a batch of tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moeforge_kernels.pairs import Pairs


class Routing(NamedTuple):
    """The choice, and what it was made from (for losses and statistics).

    Attributes:
        pairs: who goes where, with what weight.
        logits: [T, E'] float32 (float64 stays), before noise, bias and temperature; E' counts null experts too. None where there are none.
        probabilities: [T, E'] float32, what the selection saw: they sum to 1 for softmax. None where there are none.
    """

    pairs: Pairs
    logits: Tensor | None
    probabilities: Tensor | None
