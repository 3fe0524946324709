"""Bytes on the fullest rank (MoE Parallel Folding's two factorizations; activations after Korthikanti et al., 2205.05198)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .job import Candidate, Job
from .layouts import Layout
from .shape import Shape

FRAGMENTATION = 0.06
"""Share that the allocator loses."""
FIXED = 1.0e9
"""Context, kernels and communicators' buffers of a process."""
UNITS = 2
"""FSDP units whose whole weights are live at once: the one that computes and the one that is fetched."""


@dataclass(frozen=True)
class Params:
    """Parameters of the fullest stage on one rank, before data parallelism cuts them.

    Args:
        dense: attention, shared experts, dense FFNs, routers, embeddings.
        unit: the largest layer: what one FSDP unit holds.
    """

    dense: float
    expert: float
    dense_unit: float
    expert_unit: float


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by what they hold."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    overhead: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations + self.overhead


def stage(shape: Shape, pp: int) -> tuple[int, int]:
    """(sparse, dense) layers of the fullest pipeline stage."""
    layers = math.ceil(shape.layers / pp)
    sparse = min(layers, shape.sparse_layers)
    return sparse, layers - sparse


def params(shape: Shape, layout: Layout) -> Params:
    """Every parameter of the model."""
    embeddings = shape.vocab * shape.hidden if layout.pp > 1 else shape.embeddings
    return _spread(
        shape,
        layout,
        shape.attention,
        shape.shared,
        shape.dense_ffn,
        shape.expert,
        embeddings,
        shape.hidden * shape.experts,
    )


def adapters(shape: Shape, layout: Layout, rank: int) -> Params:
    """LoRA of `rank` beside every linear map but the routers: rank x (in + out) parameters each."""
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def ffn(width: int) -> int:
        return shape.matrices * (h + width) * rank if width else 0

    shared, dense, expert = ffn(shape.shared_width), ffn(shape.dense_width), ffn(shape.expert_width)
    return _spread(shape, layout, 2 * rank * (2 * h + q + kv), shared, dense, expert, 0, 0)


def _spread(
    shape: Shape, layout: Layout, attention: int, shared: int, dense_ffn: int, expert: int, embeddings: int, router: int
) -> Params:
    """Sizes of a layer's parts on the ranks: TP cuts all but routers."""
    sparse, dense = stage(shape, layout.pp)
    layer = (attention + max(shared if sparse else 0, dense_ffn if dense else 0)) / layout.tp + (
        router if sparse else 0
    )
    unit = shape.experts * expert / (layout.etp * layout.ep)
    total = (
        (sparse + dense) * attention + sparse * shared + dense * dense_ffn + embeddings
    ) / layout.tp + sparse * router
    return Params(total, sparse * unit, layer, unit)


def expert_share(shape: Shape, layout: Layout) -> float:
    """Share of a rank's experts that the fullest rank keeps under FSDP.

    Transformers cuts tensors along their first axis, which counts experts: with fewer experts than ranks, some ranks keep a
    whole one and others nothing.
    """
    if layout.engine != "transformers" or not shape.experts:
        return 1 / layout.efsdp
    local = shape.experts // layout.ep
    return math.ceil(local / layout.efsdp) / local


def memory(shape: Shape, candidate: Candidate, job: Job) -> Memory:
    """Of the fullest rank."""
    layout, full = candidate.layout, job.training == "full"
    every = params(shape, layout)
    trained = every if full else adapters(shape, layout, job.adapter_rank)
    frozen = 0.0 if full else 1.0
    if layout.sharding == "parameters":
        dense, expert = 1 / (layout.fsdp * layout.cp), expert_share(shape, layout)
        kept = trained.dense * dense + trained.expert * expert
        weights, gradients, state = 4 * kept, 4 * kept, (job.state_bytes - 4) * kept
        weights += frozen * job.frozen_bytes * (every.dense * dense + every.expert * expert)
        gathered = UNITS * (2 * (every.dense_unit + every.expert_unit) + 4 * (trained.dense_unit + trained.expert_unit))
    else:
        kept = trained.dense + trained.expert
        weights, gradients = 2 * kept, 4 * kept
        state = job.state_bytes * (trained.dense / (layout.dp * layout.cp) + trained.expert / layout.edp)
        weights += frozen * job.frozen_bytes * (every.dense + every.expert)
        gathered = 0.0
    held = weights + gradients + state + gathered
    live = activations(shape, candidate, job)
    return Memory(weights, gradients, state, gathered, live, FRAGMENTATION * (held + live) + FIXED)


def activations(shape: Shape, candidate: Candidate, job: Job) -> float:
    """Bytes kept for the backward pass: of the first stage with its microbatches in flight, or of the last with the logits."""
    layout = candidate.layout
    sparse, dense = stage(shape, layout.pp)
    tokens = job.seq * candidate.micro_batch / layout.cp
    layers = sparse * layer(shape, candidate, job, sparse=True) + dense * layer(shape, candidate, job, sparse=False)
    live = 0.0
    if candidate.recompute in ("ffn", "full"):
        kept = Candidate(layout, candidate.micro_batch)
        live = layer(shape, kept, job, sparse=bool(sparse))
    # transformers: bfloat16 logits of the whole vocabulary, float32 copy and its gradient; Megatron: a TP rank's part, in place
    logits = 10 * tokens * shape.vocab if layout.engine == "transformers" else 4 * tokens * shape.vocab / layout.tp
    flight = min(layout.pp, candidate.microbatches(job))
    if candidate.stages > 1:
        flight *= 1 + (layout.pp - 1) / (layout.pp * candidate.stages)
    if layout.pp == 1:
        return layers + live + logits
    return max(layers * flight + live, layers + live + logits)


def layer(shape: Shape, candidate: Candidate, job: Job, *, sparse: bool) -> float:
    """Bytes of one layer and microbatch.

    Attention keeps 22*T*h (10 of norms, residuals and inputs, 12 of heads); an expert's row its input and output (4h) and three
    vectors of its width (6f), the last of which `selective` computes again; `ffn` keeps what goes into the FFN, `full` what goes into
    the layer.
    """
    layout, h = candidate.layout, shape.hidden
    tokens = job.seq * candidate.micro_batch / layout.cp
    # without sequence parallelism (transformers) every TP rank keeps norms and residuals of all tokens
    alone = 1 if layout.engine == "transformers" else layout.tp
    if candidate.recompute == "full":
        return 2 * tokens * h / alone
    attention = tokens * (10 * h / alone + 12 * shape.heads * shape.head_dim / layout.tp)
    if candidate.recompute == "ffn":
        return attention
    inner = 2 * shape.matrices
    if not sparse:
        return attention + inner * tokens * shape.dense_width / layout.tp
    shared = inner * tokens * shape.shared_width / layout.tp
    rows = job.skew * tokens * shape.top_k / layout.tp * layout.etp
    if candidate.recompute == "selective":
        inner -= 2
    return attention + shared + rows * (4 * h + inner * shape.expert_width / layout.etp)
