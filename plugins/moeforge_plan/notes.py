"""What a user should know of a layout before running it."""

from __future__ import annotations

from .commands import last_stage
from .job import Hardware
from .search import Row
from .shape import Shape

TIGHT = 0.95
"""Share of the budget from which a few percent of error in the estimate decide."""


def notes(row: Row, shape: Shape, gpu: Hardware, budget: float) -> list[str]:
    """One sentence each; empty where nothing is unusual."""
    layout, found = row.layout, []
    group = layout.expert_axis("ep")
    if group.size > 1 and group.inside(gpu.node) < group.size:
        found.append(f"EP {layout.ep} spans nodes: its all-to-all runs at {gpu.network:g} GB/s, not {gpu.link:g}")
    if row.memory.total > TIGHT * budget:
        found.append(
            f"only {(budget - row.memory.total) / 1e9:.2g} GB are left: the estimate is good to some 10%, try it before you rely on it"
        )
    if left := last_stage(shape, layout.pp):
        found.append(f"{shape.layers} layers do not divide by PP {layout.pp}: the last stage holds {left}")
    return found
