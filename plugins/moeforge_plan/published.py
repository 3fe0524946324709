"""The published runs of published.toml as layouts and jobs."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from .job import Candidate, Hardware, Job, hardware
from .layouts import Layout, divisors
from .memory import memory
from .shape import Shape, read
from .steptime import mfu, pace, step


@dataclass(frozen=True)
class Run:
    """One printed number. `mfu` in percent; None: out of memory."""

    model: str
    shape: Shape
    method: str
    layout: Layout
    job: Job
    mfu: float | None


@dataclass(frozen=True)
class Estimate:
    """What the cost model says of a run: the fastest interleaving that fits.

    Args:
        mfu: in percent.
        memory: bytes, with activations alone recomputed where that helps.
        fits: within the GPU's memory.
    """

    mfu: float
    memory: float
    fits: bool
    candidate: Candidate


@functools.cache
def _raw() -> Mapping[str, Any]:
    return tomllib.loads(resources.files("moeforge_plan").joinpath("published.toml").read_text("utf-8"))


def gpu() -> Hardware:
    return hardware()[_raw()["source"]["gpu"]]


def configs() -> Mapping[str, Mapping[str, Any]]:
    """The models' config.json, as far as sizes go."""
    return _raw()["models"]


def shapes() -> dict[str, Shape]:
    return {name: read(config) for name, config in configs().items()}


def runs() -> list[Run]:
    """Tables 1 and 3: what the constants may look at."""
    part = _raw()["runs"]
    job = Job(part["seq"], part["global_batch"])
    return [_run(row, row["gpus"], job, row.get("mfu")) for row in part["table"]]


def scaling() -> list[Run]:
    """Table 4, the hold-out: the mappings of :func:`runs` on more GPUs."""
    part, rows = _raw()["scaling"], _raw()["runs"]["table"]
    job = Job(part["seq"], part["global_batch"])
    found = []
    for line in part["table"]:
        row = next(row for row in rows if (row["model"], row["method"]) == (line["model"], line["method"]))
        found += [_run(row, gpus, job, value) for gpus, value in zip(line["gpus"], line["mfu"], strict=True)]
    return found


def context() -> list[Run]:
    """Table 5, the hold-out: longer sequences at the same tokens a batch."""
    part = _raw()["context"]
    return [_run({"method": "folded", "etp": 1, **row}, row["gpus"], Job(row["seq"], part["tokens_a_batch"] // row["seq"]), row["mfu"])
            for row in part["table"]]  # fmt: skip


def _run(row: Mapping[str, Any], world: int, job: Job, value: float | None) -> Run:
    sharding = "parameters" if row["method"].startswith("FSDP") else "optimizer"
    layout = Layout(
        "megatron", world, row["tp"], row.get("cp", 1), row.get("pp", 1), row.get("ep", 1), row["etp"], 1, sharding
    )
    return Run(row["model"], shapes()[row["model"]], row["method"], layout, job, value)


def estimate(run: Run) -> Estimate:
    """The papers do not print interleaving and recomputation, so the fastest interleaving that fits is assumed, with at most the
    FFN's activation recomputed; where none fits, the fastest at all."""
    device = gpu()
    found = pace(run.shape, run.layout, 1, run.job, device)
    best = None
    for candidate in _candidates(run):
        held = memory(run.shape, candidate, run.job).total
        seconds = step(found, candidate, run.job).total
        key = (held > device.memory * 1e9, seconds, held)
        if best is None or key < best[0]:
            best = (key, candidate)
    assert best is not None
    (over, seconds, held), candidate = best
    return Estimate(100 * mfu(run.shape, run.job, run.layout.world, device, seconds), held, not over, candidate)


def _candidates(run: Run) -> Iterator[Candidate]:
    layout = run.layout
    even = run.shape.layers % layout.pp == 0 and Candidate(layout).microbatches(run.job) % layout.pp == 0
    for stages in divisors(run.shape.layers // layout.pp) if layout.pp > 1 and even else [1]:
        for recompute in ("none", "selective"):
            yield Candidate(layout, 1, stages, recompute)
