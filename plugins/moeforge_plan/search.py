"""Every layout an engine can run, costed, sorted, and told why it lost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from . import layouts
from .job import Candidate, Hardware, Job, Recompute
from .layouts import Engine, Layout, divisors
from .memory import Memory, memory
from .shape import Shape
from .steptime import Times, mfu, pace, step

MICRO = (1, 2, 4, 8, 16)
"""Sequences of a microbatch that are tried where the user names none."""
LONG = 8192
"""Tokens from which context parallelism is considered; each of its ranks keeps half of them at least."""
LEVELS: tuple[Recompute, ...] = ("none", "selective", "ffn", "full")
"""Cheapest first."""
AGAIN: dict[Recompute, str] = {
    "none": "recomputing nothing",
    "selective": "recomputing activations",
    "ffn": "recomputing FFNs",
    "full": "recomputing layers",
}
Objective = Literal["mfu", "memory"]


@dataclass(frozen=True)
class Row:
    """One layout with the microbatch, interleaving and recomputation that suit it best.

    Args:
        times: None where it does not fit.
        missing: bytes beyond the budget; 0 where it fits.
    """

    candidate: Candidate
    memory: Memory
    times: Times | None
    mfu: float | None
    missing: float

    @property
    def layout(self) -> Layout:
        return self.candidate.layout


@dataclass(frozen=True)
class Found:
    """The answer of a search.

    Args:
        fits: best first.
        misfits: nearest to fitting first, with what least memory they would take.
        refused: why layouts were not considered at all -> how many.
    """

    fits: list[Row]
    misfits: list[Row]
    refused: Counter[str]


def search(shape: Shape, job: Job, gpu: Hardware, world: int, budget: float, *, engines: Iterable[Engine] = ("megatron", "transformers"),
           objective: Objective = "mfu", micro_batch: int | None = None) -> Found:  # fmt: skip
    """Enumerate, drop what cannot run, cost the rest, sort; equal ones by fewer ranks that one copy of the model is cut over.

    Args:
        budget: bytes of memory that a rank may take.
        micro_batch: sequences of a microbatch; None: what suits each layout best.
    """
    found = Found([], [], Counter())
    for layout in candidates(shape, job, gpu, world, engines):
        why = layouts.rules(
            layout, experts=shape.experts, heads=shape.heads, kv_heads=shape.kv_heads, layers=shape.layers
        )
        sizes = [b for b in ([micro_batch] if micro_batch else MICRO) if job.global_batch % (layout.dp * b) == 0]
        if not sizes:
            why.append(
                f"DP = {layout.dp} x microbatch {micro_batch or 1} does not divide the global batch of {job.global_batch}"
            )
        found.refused.update(why)
        if why:
            continue
        row = best(shape, layout, sizes, job, gpu, budget, objective)
        (found.misfits if row.missing else found.fits).append(row)
    found.fits.sort(key=lambda row: _order(row, objective))
    found.misfits.sort(key=lambda row: row.missing)
    return found


def candidates(shape: Shape, job: Job, gpu: Hardware, world: int, engines: Iterable[Engine]) -> Iterator[Layout]:
    for engine in engines:
        if engine == "megatron":
            for layout in layouts.megatron(world, experts=shape.experts, node=gpu.node, cp=job.seq >= LONG):
                if job.seq // layout.cp >= LONG // 2 or layout.cp == 1:
                    yield layout
        else:
            yield from layouts.transformers(world, experts=shape.experts, node=gpu.node)


def best(
    shape: Shape, layout: Layout, sizes: list[int], job: Job, gpu: Hardware, budget: float, objective: Objective
) -> Row:
    """The best choice of everything that is not the layout; where nothing fits, the one that takes least memory."""
    fitting: list[Row] = []
    least: Row | None = None
    for size in sizes:
        fits = False
        found = None
        for recompute in levels(shape, layout.engine):
            fastest = True
            for stages in interleavings(shape, layout, size, job):
                candidate = Candidate(layout, size, stages, recompute)
                held = memory(shape, candidate, job)
                row = Row(candidate, held, None, None, max(0.0, held.total - budget))
                if least is None or held.total < least.memory.total:
                    least = row
                if row.missing:
                    fastest = False
                    if stages == 1:
                        break  # interleaving keeps more in flight
                    continue
                found = found or pace(shape, layout, size, job, gpu)
                times = step(found, candidate, job)
                share = mfu(shape, job, layout.world, gpu, times.total)
                fitting.append(Row(candidate, held, times, share, 0.0))
                fits = True
            if fastest and objective == "mfu":
                break  # recomputing more only costs time
        if not fits:
            break  # larger microbatches take more
    if fitting:
        return min(fitting, key=lambda row: _order(row, objective))
    assert least is not None
    return least


def levels(shape: Shape, engine: Engine) -> tuple[Recompute, ...]:
    """What an engine can recompute: whole layers with transformers; with Megatron also FFNs, and activations within experts."""
    if engine == "transformers":
        return ("none", "full")
    return LEVELS if shape.experts else ("none", "ffn", "full")


def interleavings(shape: Shape, layout: Layout, micro_batch: int, job: Job) -> list[int]:
    """Pieces that a pipeline rank may hold; Megatron interleaves equal stages, with microbatches in multiples of PP."""
    count = job.global_batch // (layout.dp * micro_batch)
    if layout.pp == 1 or shape.layers % layout.pp or count % layout.pp:
        return [1]
    return divisors(shape.layers // layout.pp)


def _order(row: Row, objective: Objective) -> tuple[float, float, int]:
    seconds = row.times.total if row.times else math.inf
    first, second = (row.memory.total, seconds) if objective == "memory" else (seconds, row.memory.total)
    return round(first, 9), round(second, 9), row.layout.model_parallel


def why_lost(row: Row, winner: Row, job: Job, gpu: Hardware, objective: Objective) -> str:
    """What sets a runner-up back the most, in one phrase."""
    if objective == "memory" and row.memory.total > winner.memory.total:
        names = ("weights", "gradients", "optimizer", "gathered", "activations")
        name = max(names, key=lambda n: getattr(row.memory, n) - getattr(winner.memory, n))
        more = getattr(row.memory, name) - getattr(winner.memory, name)
        return (
            f"{(row.memory.total - winner.memory.total) / 1e9:.3g} GB more, {more / 1e9:.3g} GB of them {MEMORY[name]}"
        )
    assert row.times is not None and winner.times is not None
    mine, theirs = vars(row.times), vars(winner.times)
    name = max(mine, key=lambda n: mine[n] - theirs[n])
    lost = (row.times.total / winner.times.total - 1) * 100
    if lost < 0.5:
        return "as fast within half a percent"
    return f"{lost:.0f}% slower, most of it {reason(name, row, winner, job, gpu)} (+{mine[name] - theirs[name]:.2g} s)"


MEMORY = {"weights": "weights", "gradients": "gradients", "optimizer": "optimizer state", "gathered": "gathered FSDP units",
          "activations": "activations"}  # fmt: skip


def reason(part: str, row: Row, winner: Row, job: Job, gpu: Hardware) -> str:
    """A part of the step time, with what makes it large in this layout."""
    layout, candidate = row.layout, row.candidate
    ep, dp = layout.expert_axis("ep"), layout.dense_axis("dp")
    nodes = math.ceil(ep.size / ep.inside(gpu.node))
    count = candidate.microbatches(job)
    computing = "thinner matrix products"
    pieces = f"{candidate.stages} piece{'' if candidate.stages == 1 else 's'} a rank"
    if LEVELS.index(candidate.recompute) > LEVELS.index(winner.candidate.recompute):
        computing = AGAIN[candidate.recompute]
    synced = (
        "parameters gathered and gradients reduced for every microbatch"
        if layout.sharding == "parameters"
        else "reducing gradients"
    )
    return {
        "compute": computing,
        "tp": f"TP {layout.tp}'s traffic" + (f" and sends between {layout.pp} stages" if layout.pp > 1 else ""),
        "a2a": f"the all-to-all of EP {layout.ep}" + (f" over {nodes} nodes" if nodes > 1 else ""),
        "etp": f"each expert cut over ETP {layout.etp}",
        "cp": f"keys and values around CP {layout.cp}",
        "launch": f"launches of {count} microbatches",
        "bubble": f"the bubble of PP {layout.pp} with {count} microbatches and {pieces}",
        "dp": f"{synced}, over DP {dp.size}",
    }[part]
