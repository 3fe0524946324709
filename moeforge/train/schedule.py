"""Learning rate as a function of how much of the budget is spent."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "constant", "wsd"]


def rate(progress: float, kind: Schedule, warmup: float, *, floor: float = 0.1, decay: float = 0.2) -> float:
    """Factor on the peak learning rate.

    Args:
        progress: share of the budget spent before this step, 0..1.
        kind: `cosine` down to `floor`; `constant`; `wsd`: constant, then linear to 0 over the last `decay`
            (warm-up, stable, decay; arXiv:2404.06395, section 4).
        warmup: share of the budget with a linear rise.
    """
    if progress < warmup:
        # the first step is not wasted at 0, whatever its length
        return max(progress / warmup, 0.01)
    if kind == "cosine":
        phase = (progress - warmup) / max(1 - warmup, 1e-9)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(phase, 1.0)))
    if kind == "wsd" and progress > 1 - decay:
        return max((1 - progress) / decay, 0.0)
    return 1.0
