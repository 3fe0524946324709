"""What a few seeds say of a number."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % for 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Interval:
    """Mean of a few numbers, with the half width of its 95 % interval (Student's t)."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """None for the half width of a single number, which has none.

        Raises:
            ValueError: more numbers than the table has.
        """
        if len(values) < 2:
            return cls(values[0], None)
        if len(values) - 1 > len(T_975):
            raise ValueError(f"{len(values)} numbers: this table of Student's t ends at {len(T_975) + 1}")
        return cls(statistics.fmean(values), T_975[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5)

    @property
    def claim(self) -> str:
        """What may be said of a difference in loss."""
        if self.half is None or abs(self.mean) <= self.half:
            return "-"
        return "lower" if self.mean < 0 else "higher"

    def __str__(self) -> str:
        """Of a difference; bold where 0 lies outside."""
        text = f"{self.mean:+.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")
        return text if self.claim == "-" else f"**{text}**"
