"""What a run measured: `metrics.jsonl`, held-out loss, expert load."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


def perplexity(loss: float) -> float | None:
    """exp(loss); None where that is no number that a file can hold: past the largest float (a loss of 709), and for NaN."""
    try:
        found = math.exp(loss)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def perplexity_text(value: float | None) -> str:
    """For people."""
    return "above 1e308" if value is None else f"{value:.4g}"


class Metrics:
    """An append-only log, one JSON object a line. It holds no clock readings: two runs of one plan write the same bytes.

    Args:
        directory: where `metrics.jsonl` goes.
        size: bytes to keep of an earlier, interrupted run; what stands behind them is written anew.
    """

    def __init__(self, directory: Path, size: int = 0) -> None:
        self.path = directory / FILE
        self.path.touch()
        os.truncate(self.path, size)
        self.records: list[dict[str, Any]] = [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def sync(self) -> int:
        """Make all lines durable; returns the file's size."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def of(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["event"] == event]


@dataclass
class Load:
    """Assignments to each expert, layer by layer, over any number of batches."""

    layers: list[str]
    counts: list[list[float]] = field(default_factory=list)

    def add(self, counts: Iterable[Iterable[float]]) -> None:
        new = [list(layer) for layer in counts]
        self.counts = (
            [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(self.counts, new, strict=True)]
            if self.counts
            else new
        )

    def fractions(self) -> list[list[float]]:
        """Share of assignments, [L][E], each row summing to 1 (a row of zeros where nothing was seen)."""
        return [[count / max(sum(layer), 1.0) for count in layer] for layer in self.counts]

    def imbalance(self) -> float | None:
        """The busiest expert's load over the mean, averaged over layers: 1 when even. None for a dense model."""
        rows = self.fractions()
        return sum(max(row) * len(row) for row in rows) / len(rows) if rows else None
