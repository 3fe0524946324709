"""Bytes that a rank sends (bfloat16), a layer, a microbatch and a step. Backward moves what forward does."""

from __future__ import annotations

from dataclasses import dataclass

from .job import Job
from .layouts import Layout
from .memory import params
from .shape import Shape


@dataclass(frozen=True)
class Traffic:
    """Bytes per rank in one forward pass of one layer, by the group they go to."""

    tp_attention: float
    tp_ffn: float
    a2a: float
    etp: float
    cp: float


def layer(shape: Shape, layout: Layout, micro_batch: int, job: Job, *, sparse: bool) -> Traffic:
    """One layer's, forward.

    tp: all-gather before and reduce-scatter after attention (4*T*h*(TP-1)/TP), and the same around a shared or dense FFN.
    a2a: dispatch and combine of T*k/TP rows. etp: all-gather and reduce-scatter of the rows within the ranks that share an
    expert. cp: a ring of this rank's keys and values.
    """
    h, tokens = shape.hidden, job.seq * micro_batch / layout.cp
    around = 4 * tokens * h * (layout.tp - 1) / layout.tp
    cp = 4 * tokens * shape.kv_heads * shape.head_dim / min(layout.tp, shape.kv_heads) * (layout.cp - 1)
    if not sparse:
        return Traffic(around, around, 0.0, 0.0, cp)
    shared = around if shape.shared_width else 0.0
    rows = tokens * shape.top_k / layout.tp
    a2a = 4 * rows * h * (layout.ep - 1) / layout.ep
    if layout.engine == "transformers":
        # a TP group's ranks hold the same tokens: with EP the outputs of their slices are gathered, without it partial ones summed
        return Traffic(around, shared + around * (0.5 if layout.ep > 1 else 1.0), a2a, 0.0, cp)
    return Traffic(around, shared, a2a, 4 * rows * layout.etp * h * (layout.etp - 1) / layout.etp, cp)


def edge(shape: Shape, layout: Layout, micro_batch: int, job: Job) -> float:
    """From one pipeline stage to the next, one microbatch, forward."""
    return 2 * job.seq * micro_batch / layout.cp * shape.hidden / layout.tp if layout.pp > 1 else 0.0


@dataclass(frozen=True)
class Sync:
    """Bytes per rank of parameters gathered and gradients reduced, apart for attention's and the experts' groups; `replicas`:
    of gradients summed over copies of the sharded model (HSDP)."""

    gather_dense: float
    gather_expert: float
    reduce_dense: float
    reduce_expert: float
    replicas: float


def sync(shape: Shape, layout: Layout, job: Job) -> Sync:
    """Of one update with a sharded optimizer: bfloat16 parameters gathered, float32 gradients reduced. Of one microbatch with
    FSDP: two gathers of bfloat16 and one reduction, in float32 by transformers. Frozen parameters are gathered, never reduced."""
    held = params(shape, layout)
    sharded = layout.sharding == "parameters"
    gather = 4.0 if sharded else 2.0
    reduce = 2.0 if sharded and layout.engine == "megatron" else 4.0
    if job.training != "full":
        reduce = 0.0
        gather = gather * job.frozen_bytes / 2 if sharded else 0.0
    dense, expert = layout.fsdp * layout.cp, layout.efsdp
    d, e = held.dense * (dense - 1) / dense, held.expert * (expert - 1) / expert
    copies = 2 * reduce * (held.dense / dense + held.expert / expert) * (layout.replicate - 1) / layout.replicate
    return Sync(gather * d, gather * e, reduce * d, reduce * e, copies)
