"""Is upcycling the better use of the tokens? One line of published advice; it changes nothing that is written."""

from __future__ import annotations

import re

from moeforge.errors import UsageProblem

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
FROM_SCRATCH = 2.0
"""Share of the dense model's training cost from which a mixture gains more from a fresh start (Skywork-MoE 2406.06563)."""
NOT_CARRIED = "optimiser state; training starts it anew"


def tokens(text: str, flag: str) -> float:
    """A number of tokens written as `2T`, `100B`, `1.5e9`.

    Raises:
        UsageProblem: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([KMBT]?)\s*", text)
    if found is None or float(found[1]) == 0:
        raise UsageProblem(f"{flag} {text!r}: not a number of tokens; write a number such as 100B or 2T")
    return float(found[1]) * UNITS[found[2]]


def advise(dense: float, planned: float, dense_parameters: int, active_parameters: int) -> str:
    """One sentence from what the dense model was trained on and what the mixture will be: tokens, costs as tokens times
    active parameters."""
    share = planned * active_parameters / (dense * dense_parameters)
    said = f"the planned tokens cost {share:.2g} times what the dense model did"
    if share >= FROM_SCRATCH:
        return f"{said}: from twice on, training a mixture from scratch does better (2406.06563)"
    return f"{said}: upcycle; it pays less the longer the dense model was trained (2502.03009)"
