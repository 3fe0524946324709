"""Seconds of one update, part by part: bytes over bandwidth and operations over peak, with the constants below.

FITTED constants were picked from a coarse grid (tests/benchmarks/plan/fit.py) by the 18 published runs of published.toml that did
not run out of memory, and never by its hold-out tables; the optimum is flat. The others are data sheets or what is commonly measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import traffic
from .job import Candidate, Hardware, Job
from .layouts import Axis, Layout
from .memory import params, stage
from .shape import Shape, attention_core

MATMUL = 0.70
"""FITTED. Share of peak that a large matrix product reaches, attention's and the experts' grouped ones alike."""
HALF_WIDTH = 200.0
"""h/TP at which attention's products reach half their speed."""
HALF_EXPERT = 500.0
"""FITTED. f/ETP at which an expert's products reach half their speed."""
FLASH = 0.5
"""Share of peak of the attention core (FlashAttention-2 and 3 on H100: 0.4 to 0.75)."""
LAUNCH = 120e-6
"""FITTED. Host time of a sparse layer's pass that nothing hides: launches, and reading the split sizes; a dense layer's is half."""
OVERLAP = 0.2
"""FITTED. Share of FSDP's traffic, or of computing where that is less, that the two hide of each other."""


@dataclass(frozen=True)
class Parts:
    """Seconds of one forward pass of one microbatch."""

    compute: float = 0.0
    tp: float = 0.0
    a2a: float = 0.0
    etp: float = 0.0
    cp: float = 0.0
    launch: float = 0.0

    def __add__(self, other: Parts) -> Parts:
        return Parts(self.compute + other.compute, self.tp + other.tp, self.a2a + other.a2a, self.etp + other.etp,
                     self.cp + other.cp, self.launch + other.launch)  # fmt: skip

    def times(self, compute: float, rest: float) -> Parts:
        return Parts(
            compute * self.compute, rest * self.tp, rest * self.a2a, rest * self.etp, rest * self.cp, rest * self.launch
        )

    @property
    def total(self) -> float:
        return self.compute + self.tp + self.a2a + self.etp + self.cp + self.launch


@dataclass(frozen=True)
class Times:
    """Seconds of one update on the slowest rank, by what they go to."""

    compute: float
    tp: float
    a2a: float
    etp: float
    cp: float
    launch: float
    bubble: float
    dp: float

    @property
    def total(self) -> float:
        return self.compute + self.tp + self.a2a + self.etp + self.cp + self.launch + self.bubble + self.dp


@dataclass(frozen=True)
class Pace:
    """What one layout takes for one microbatch, whatever is recomputed and however the pipeline is cut.

    Args:
        attention, ffn: forward seconds of the fullest stage.
        head: forward seconds of the language model's head.
        edge: seconds of sending one microbatch to the next stage and its gradient back.
        sync: seconds of data parallelism's traffic alone on the wires: of an update, or of a microbatch with FSDP.
        update: seconds of the optimizer.
    """

    attention: Parts
    ffn: Parts
    head: float
    edge: float
    sync: float
    update: float


def ring(group: Axis, gpu: Hardware) -> float:
    """Bytes/s of a rank in an all-gather or reduce-scatter: the ranks of a node drive all their network ports at once."""
    inside = group.inside(gpu.node)
    wire = gpu.link if inside == group.size else min(gpu.link, inside * gpu.network)
    return wire * gpu.link_efficiency * 1e9


def exchange(group: Axis, gpu: Hardware) -> float:
    """Bytes/s of a rank in an all-to-all: what goes to other nodes passes its own port."""
    if group.size == 1:
        return gpu.link * gpu.link_efficiency * 1e9
    out = (group.size - group.inside(gpu.node)) / (group.size - 1)
    return gpu.link_efficiency * 1e9 / (out / gpu.network + (1 - out) / gpu.link)


def pace(shape: Shape, layout: Layout, micro_batch: int, job: Job, gpu: Hardware) -> Pace:
    """Everything that does not depend on recomputing and interleaving."""
    sparse, dense = stage(shape, layout.pp)
    attention, ffn = Parts(), Parts()
    for count, is_sparse in ((sparse, True), (dense, False)):
        if count:
            first, second = _layer(shape, layout, micro_batch, job, gpu, sparse=is_sparse)
            attention, ffn = attention + first.times(count, count), ffn + second.times(count, count)
    tokens = job.seq * micro_batch / layout.cp
    head = 2 * tokens * shape.vocab * shape.hidden / layout.tp / (gpu.flops * (gpu.efficiency or MATMUL))
    wire = gpu.network if layout.dense_axis("pp").stride >= gpu.node else gpu.link
    edge = _sent(2 * traffic.edge(shape, layout, micro_batch, job), wire * gpu.link_efficiency * 1e9)
    return Pace(attention, ffn, head, edge, _sync(shape, layout, job, gpu), _update(shape, layout, job, gpu))


def step(found: Pace, candidate: Candidate, job: Job) -> Times:
    """One update of a candidate whose layout and microbatch have that pace.

    Forward, backward (twice the compute, the same traffic) and what is computed again, for each microbatch; pipeline ranks idle
    (PP-1)/stages microbatches more.
    """
    layout, recompute = candidate.layout, candidate.recompute
    count = candidate.microbatches(job)
    back, again = job.backward, float(recompute == "full")
    attention = found.attention.times(1 + back + again, 2 + again)
    again = float(recompute in ("ffn", "full"))
    one = attention + found.ffn.times(1 + back + again, 2 + again) + Parts(compute=(1 + back) * found.head)
    edge = candidate.stages * found.edge
    micro = one.total + edge
    if layout.sharding == "parameters":
        dp = count * (found.sync - OVERLAP * min(found.sync, micro))
    else:
        # parameters are gathered beside the first forward pass, gradients reduced beside the last backward pass
        dp = max(0.0, found.sync - micro)
    bubble = (layout.pp - 1) / candidate.stages * micro
    return Times(count * one.compute + found.update, count * (one.tp + edge), count * one.a2a, count * one.etp, count * one.cp,
                 count * one.launch, bubble, dp)  # fmt: skip


def mfu(shape: Shape, job: Job, world: int, gpu: Hardware, seconds: float) -> float:
    """Model FLOPs of an update over what `world` GPUs could do in its time: :meth:`Shape.flops` a token, of which frozen weights
    leave a third away."""
    work = shape.flops(job.seq) * (1 + job.backward) / 3
    return work * job.seq * job.global_batch / (seconds * world * gpu.flops)


def _layer(
    shape: Shape, layout: Layout, micro_batch: int, job: Job, gpu: Hardware, *, sparse: bool
) -> tuple[Parts, Parts]:
    """Forward of one layer and one microbatch: attention, and what follows it."""
    h, alone = shape.hidden, (1 if layout.engine == "transformers" else layout.tp)
    tokens = job.seq * micro_batch / layout.cp
    top, bus = gpu.flops * (gpu.efficiency or MATMUL), gpu.hbm * 1e9
    matmul = top * (h / layout.tp) / (h / layout.tp + HALF_WIDTH)
    core = tokens * attention_core(shape, job.seq) / layout.tp / (gpu.flops * FLASH)
    # norms, residuals and rotations read and write about what they keep
    attention = 2 * tokens * shape.attention / layout.tp / matmul + core + 22 * tokens * h / alone / bus
    ffn = 2 * tokens * (shape.shared if sparse else shape.dense_ffn) / layout.tp / matmul
    if sparse:
        rows = job.skew * tokens * shape.top_k / layout.tp
        held = rows * layout.etp * layout.ep / shape.experts
        thin = shape.expert_width / layout.etp
        ffn += 2 * rows * shape.expert / (top * held / (held + gpu.small_rows) * thin / (thin + HALF_EXPERT))
        # permuted, unpermuted and activated: rows and their inner vectors pass memory about three times
        ffn += rows * layout.etp * (8 * h + 6 * thin) / bus
    moved = traffic.layer(shape, layout, micro_batch, job, sparse=sparse)
    tp, cp = layout.dense_axis("tp"), layout.dense_axis("cp")
    ep, etp = layout.expert_axis("ep"), layout.expert_axis("tp")
    # the ring of keys and values runs beside the attention core
    ring_cp = max(0.0, _over(moved.cp, ring(cp, gpu), cp, gpu, layout.cp) - core)
    launch = LAUNCH / (2 if sparse else 4)
    return (
        Parts(attention, _over(moved.tp_attention, ring(tp, gpu), tp, gpu), cp=ring_cp, launch=launch),
        Parts(ffn, _over(moved.tp_ffn, ring(tp, gpu), tp, gpu), _over(moved.a2a, exchange(ep, gpu), ep, gpu),
              _over(moved.etp, ring(etp, gpu), etp, gpu), launch=launch),
    )  # fmt: skip


def _over(moved: float, bandwidth: float, group: Axis, gpu: Hardware, messages: int = 2) -> float:
    """Seconds of sending `moved` bytes within a group; nothing to send takes none."""
    alpha = gpu.link_alpha if group.inside(gpu.node) == group.size else gpu.network_alpha
    return messages * alpha + _sent(moved, bandwidth) if moved else 0.0


def _sent(moved: float, bandwidth: float) -> float:
    """Seconds on the wire; where nothing is sent there may be none (one GPU that was measured alone)."""
    return moved / bandwidth if moved else 0.0


def _sync(shape: Shape, layout: Layout, job: Job, gpu: Hardware) -> float:
    moved = traffic.sync(shape, layout, job)
    dense, expert = layout.dense_axis("dp+cp"), layout.expert_axis("dp")
    dense, expert = (
        Axis(dense.size // layout.replicate, dense.stride),
        Axis(expert.size // layout.replicate, expert.stride),
    )
    seconds = _sent(moved.gather_dense + moved.reduce_dense, ring(dense, gpu))
    seconds += _sent(moved.gather_expert + moved.reduce_expert, ring(expert, gpu))
    copies = Axis(layout.replicate, layout.tp * layout.fsdp)
    return seconds + _sent(moved.replicas, ring(copies, gpu))


def _update(shape: Shape, layout: Layout, job: Job, gpu: Hardware) -> float:
    """The optimizer reads and writes its state and gradients once."""
    if job.training != "full":
        return 0.0
    held = params(shape, layout)
    kept = held.dense / (layout.fsdp * layout.cp) + held.expert / layout.efsdp
    return 2 * (job.state_bytes + 4) * kept / (gpu.hbm * 1e9)
