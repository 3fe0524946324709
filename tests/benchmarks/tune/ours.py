"""One run of moeforge's training loop, timed step by step: `python ours.py JOB.json OUT.json`."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moeforge.checkpoint import open_checkpoint
from moeforge.pipeline.context import Context
from moeforge.pipeline.journal import JOURNAL, Journal
from moeforge.pipeline.progress import Progress
from moeforge.testing import inprocess
from moeforge.train.ranks import Ranks
from moeforge_tune.run import prepare


class Clock:
    """Stands where the progress bar does: notes the time after each update."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, title: str, total: float, unit: str) -> Clock:
        return self

    def __enter__(self) -> Clock:
        self.times.append(time.perf_counter())
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self, amount: float, note: str | None = None) -> None:
        self.times.append(time.perf_counter())


def main(job: dict[str, Any]) -> dict[str, Any]:
    plan = inprocess.plan("tune", job["model"], data=tuple(job["data"]), train=job["train"], steps=job["steps"],
                          sequence_length=job["length"], batch_size=job["rows"], accumulate=job["accumulate"],
                          learning_rate=job["rate"], schedule="constant", warmup=0.0, balance=0.0, held_out=0.0,
                          precision=job["precision"], seed=job["seed"])  # fmt: skip
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch, open_checkpoint(job["model"]) as source:
        space: Any = SimpleNamespace(path=Path(scratch), journal=Journal(Path(scratch) / JOURNAL, "benchmark"))
        loop = prepare(
            plan.payload, source, Ranks.here(), Context("tune", Progress("tune", quiet=True), Path(scratch)), space
        )
        steps = loop.run(clock).metrics.of("step")
    config = loop.model.config
    return {"losses": [step["loss"] for step in steps], "tokens": [step["tokens"] for step in steps], "times": clock.times,
            "experts": config._experts_implementation, "attention": config._attn_implementation,
            "trained": loop.choice.size}  # fmt: skip


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
