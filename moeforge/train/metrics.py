"""What a run measured: `metrics.jsonl`, held-out loss, expert load."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..mixture.statistics import Statistics

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
        directory: where `metrics.jsonl` goes; None keeps the records in memory only.
        size: bytes to keep of an earlier, interrupted run; what stands behind them is written anew.
    """

    def __init__(self, directory: Path | None, size: int = 0) -> None:
        self.path = None if directory is None else directory / FILE
        self.records: list[dict[str, Any]] = []
        if self.path is not None:
            self.path.touch()
            os.truncate(self.path, size)
            self.records = [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.path is None:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def sync(self) -> int:
        """Make all lines durable; returns the file's size."""
        if self.path is None:
            return 0
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def of(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["event"] == event]


def load_metrics(statistics: Statistics) -> dict[str, Any]:
    """What is said of the routers, layer by layer: `sites` [L], their names; `load` [L][E], each expert's share of the assignments; `entropy` in
    nats, the number of `dead` experts and the `violation`, the busiest expert's load over the mean, less 1; and `imbalance`, the busiest expert's load over the mean, averaged over layers: 1 when
    even, None for a dense model. Where labels were counted, `by_label` [L][labels][E] is the load of each."""
    by_site = statistics.as_json()
    layers = list(by_site.values())
    violations = [layer["max_violation"] for layer in layers if layer["max_violation"] is not None]
    found: dict[str, Any] = {
        "sites": list(by_site),
        "load": [[round(share, 6) for share in layer["load"]] for layer in layers],
        "entropy": [None if layer["entropy"] is None else round(layer["entropy"], 6) for layer in layers],
        "dead": [len(layer["dead"]) for layer in layers],
        "violation": [None if layer["max_violation"] is None else round(layer["max_violation"], 6) for layer in layers],
        "imbalance": 1 + sum(violations) / len(violations) if violations else None,
    }
    if any("by_label" in layer for layer in layers):
        found["by_label"] = [[[round(share, 6) for share in row] for row in layer["by_label"]] for layer in layers]
    return found
