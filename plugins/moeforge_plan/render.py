"""The answer for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from moeforge.report.table import table

from .commands import bridge, call, distributed_config, tune
from .job import Hardware, Job
from .layouts import Engine
from .notes import notes
from .search import AGAIN, Found, Objective, Row, why_lost
from .shape import Shape

HEAD = ("#", "engine", "TP", "CP", "PP", "DP", "ETP", "EP", "EDP", "batch", "v", "recompute", "GB", "step s", "MFU %",
        "comp%", "tp%", "a2a%", "etp%", "bub%", "dp%")  # fmt: skip
LEGEND = (
    "batch: sequences of a microbatch x microbatches an update; v: pipeline pieces a rank; GB: of the fullest rank; MFU: FLOPs of",
    "6 x active parameters and causal attention over peak; then % of the step: computing, TP and CP traffic, all-to-all, ETP traffic,",
    "pipeline bubble, data parallelism's parameters and gradients",
)

HELP = "more --gpus, a larger --gpu, --optimizer adamw-8bit, --training lora or a smaller --seq need less of each"


class Report:
    """One search, told.

    Args:
        model: what the user asked for.
        notes: of the model and the hardware; those of layouts are added.
    """

    def __init__(self, model: str, shape: Shape, job: Job, gpu: Hardware, world: int, budget: float, objective: Objective,
                 found: Found, top: int, notes: list[str]):  # fmt: skip
        self.model, self.shape, self.job, self.gpu, self.world = model, shape, job, gpu, world
        self.objective: Objective = objective
        self.budget, self.found, self.top, self.notes = budget, found, top or None, notes

    def best(self) -> dict[Engine, Row]:
        """The first of each engine's layouts that fit."""
        found: dict[Engine, Row] = {}
        for row in self.found.fits:
            found.setdefault(row.layout.engine, row)
        return found

    def data(self) -> dict[str, Any]:
        fits = self.found.fits[: self.top]
        best: dict[str, Any] = {}
        for engine, row in self.best().items():
            best[engine] = {"rank": self.found.fits.index(row) + 1, **self._row(row),
                            "notes": notes(row, self.shape, self.gpu, self.budget)}  # fmt: skip
            if engine == "transformers":
                best[engine] |= {
                    "distributed_config": distributed_config(row),
                    "command": tune(row, self.job, self.gpu, self.model),
                }
            else:
                best[engine]["overrides"] = bridge(row, self.job, self.shape)
        return {
            "model": {"ref": self.model, **asdict(self.shape), "parameters": self.shape.parameters, "active": self.shape.active},
            "job": asdict(self.job), "gpus": self.world, "gpu": asdict(self.gpu), "memory_budget_bytes": self.budget,
            "objective": self.objective, "fit": len(self.found.fits), "ranked": [self._row(row) for row in fits], "best": best,
            "do_not_fit": [self._row(row) for row in self.found.misfits], "refused": dict(self.found.refused), "notes": self.notes,
        }  # fmt: skip

    def _row(self, row: Row) -> dict[str, Any]:
        layout, candidate = row.layout, row.candidate
        return {
            "engine": layout.engine, "tp": layout.tp, "cp": layout.cp, "pp": layout.pp, "dp": layout.dp, "etp": layout.etp,
            "ep": layout.ep, "edp": layout.edp, "dp_replicate": layout.replicate, "micro_batch": candidate.micro_batch,
            "microbatches": candidate.microbatches(self.job), "interleaving": candidate.stages, "recompute": candidate.recompute,
            "memory_bytes": {**asdict(row.memory), "total": row.memory.total}, "missing_bytes": row.missing,
            "step_s": row.times and row.times.total, "parts_s": row.times and asdict(row.times), "mfu": row.mfu,
            "behind": self._why(row) if row.times else None,
        }  # fmt: skip

    def _why(self, row: Row) -> str | None:
        winner = self.found.fits[0]
        return None if row is winner else why_lost(row, winner, self.job, self.gpu, self.objective)

    def text(self) -> str:
        found, gpu, job = self.found, self.gpu, self.job
        nodes = math.ceil(self.world / gpu.node)
        lines = [
            f"{self.model}: {self.shape.describe()}",
            f"{self.world} x {gpu.title}, {nodes} node{'' if nodes == 1 else 's'}; an update: {job.global_batch} sequences of "
            f"{job.seq} tokens; {job.training} training, {job.optimizer}",
        ]
        sort = "fastest" if self.objective == "mfu" else "smallest"
        head = f"{len(found.fits)} layouts fit into {self.budget / 1e9:.4g} GB, {len(found.misfits)} do{'es' if len(found.misfits) == 1 else ''} not"
        lines += [*(f"note: {text}" for text in self.notes), "", head + (f"; {sort} first:" if found.fits else "")]
        if found.fits:
            shown = found.fits[: self.top]
            lines += [*table(HEAD, [self._cells(n, row) for n, row in enumerate(shown, 1)]), *LEGEND]
            behind = [f"  {n}  {why}" for n, row in enumerate(shown, 1) if (why := self._why(row))]
            lines += ["", "why the others are behind:", *behind] if behind else []
        lines += self._misfits()
        lines += self._refused()
        for engine, row in self.best().items():
            lines += ["", *self._run(engine, row)]
        lines += [] if found.fits else ["", HELP]
        return "\n".join(lines)

    def _cells(self, number: int, row: Row) -> list[str]:
        layout, candidate, times = row.layout, row.candidate, row.times
        assert times is not None and row.mfu is not None
        share: Callable[[float], str] = lambda part: f"{100 * part / times.total:.0f}"  # noqa: E731
        return [str(number), layout.engine, *map(str, (layout.tp, layout.cp, layout.pp)), _copies(row),
                *(map(str, (layout.etp, layout.ep, layout.edp)) if self.shape.experts else "---"), f"{candidate.micro_batch}x{candidate.microbatches(self.job)}",
                str(candidate.stages), candidate.recompute, f"{row.memory.total / 1e9:.1f}", f"{times.total:.3g}", f"{100 * row.mfu:.1f}",
                *map(share, (times.compute + times.launch, times.tp + times.cp, times.a2a, times.etp, times.bubble, times.dp))]  # fmt: skip

    def _misfits(self) -> list[str]:
        rows = self.found.misfits
        if not rows:
            return []
        lines = ["", f"do not fit, nearest first ({len(rows)} in all, --json lists them):" if len(rows) > (self.top or len(rows))
                 else "do not fit, nearest first:"]  # fmt: skip
        for row in rows[: self.top]:
            held = {"weights": row.memory.weights, "gradients": row.memory.gradients, "optimizer": row.memory.optimizer,
                    "gathered units": row.memory.gathered, "activations": row.memory.activations}  # fmt: skip
            largest = max(held, key=lambda name: held[name])
            lines.append(f"  {_named(row, self.shape)}: {row.missing / 1e9:.1f} GB too much ({row.memory.total / 1e9:.1f}, of which {largest} "
                         f"{held[largest] / 1e9:.1f})")  # fmt: skip
        return lines

    def _refused(self) -> list[str]:
        why = self.found.refused
        if not why:
            return []
        shown = [f"  {text} ({count} layout{'' if count == 1 else 's'})" for text, count in why.most_common(3)]
        more = [f"  and for {len(why) - 3} more reason{'s' if len(why) > 4 else ''} (--json)"] if len(why) > 3 else []
        return ["", "cannot run:", *shown, *more]

    def _run(self, engine: Engine, row: Row) -> list[str]:
        assert row.times is not None and row.mfu is not None
        names = {"transformers": "transformers", "megatron": "Megatron-Bridge"}
        title = (f"with {names[engine]}, its best (#{self.found.fits.index(row) + 1} of all): {_named(row, self.shape)}; {row.times.total:.3g} s, "
                 f"MFU {100 * row.mfu:.1f}%, {row.memory.total / 1e9:.1f} GB")  # fmt: skip
        said = [f"  note: {text}" for text in notes(row, self.shape, self.gpu, self.budget)]
        if engine == "transformers":
            return [title, f"  {call(row)}", f"  {tune(row, self.job, self.gpu, self.model)}", *said]
        return [title, *(f"  {text}" for text in bridge(row, self.job, self.shape)), *said]


def _copies(row: Row) -> str:
    """DP, as replicas x FSDP where there are several."""
    layout = row.layout
    return f"{layout.replicate}x{layout.fsdp}" if layout.replicate > 1 else str(layout.dp)


def _named(row: Row, shape: Shape) -> str:
    layout, again = row.layout, row.candidate.recompute
    parts = {
        "TP": layout.tp,
        "CP": layout.cp,
        "PP": layout.pp,
        "ETP": layout.etp if shape.experts else 1,
        "EP": layout.ep,
    }
    sizes = " ".join(f"{name} {size}" for name, size in parts.items() if size > 1)
    return f"{layout.engine} {sizes + ' ' if sizes else ''}DP {_copies(row)}{'' if again == 'none' else f', {AGAIN[again]}'}"
