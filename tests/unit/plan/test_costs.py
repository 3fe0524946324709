"""Parameters, bytes and seconds, each beside a calculation of its own."""

import dataclasses
import random

import pytest

from moeforge_plan import traffic
from moeforge_plan.job import Candidate, Hardware, Job, hardware
from moeforge_plan.layouts import Axis, Layout, empty_shards
from moeforge_plan.memory import activations, expert_share, layer, memory, params
from moeforge_plan.published import shapes
from moeforge_plan.shape import Shape, attention_core
from moeforge_plan.steptime import FLASH, exchange, mfu, pace, ring, step

H100 = hardware()["h100"]


def any_shape(seed, experts=16):
    r = random.Random(seed)
    heads = 8 * r.randint(1, 8)
    head, hidden = 64 * r.randint(1, 2), 256 * r.randint(1, 16)
    layers, width = 4 * r.randint(1, 12), 128 * r.randint(1, 16)
    sparse = layers - r.randint(0, 3)
    attention = hidden * head * (2 * heads + 16)
    return Shape(layers, hidden, heads, 8, head, 1000 * r.randint(5, 150), r.random() < 0.5, attention, 4 * hidden, sparse, experts,
                 r.choice((1, 2, 4)), width, r.choice((0, width)))  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_ranks_together_hold_every_parameter_once(seed):
    shape = any_shape(seed)
    for tp, etp, ep in ((1, 1, 1), (2, 1, 4), (4, 4, 2), (2, 1, 16)):
        held = params(shape, Layout("megatron", 64, tp, 1, 1, ep, etp))
        routers = shape.sparse_layers * shape.hidden * shape.experts  # whole on every TP rank
        assert (held.dense - routers) * tp + routers + held.expert * etp * ep == pytest.approx(shape.parameters)


@pytest.mark.parametrize("seed", range(5))
def test_adam_costs_sixteen_bytes_a_parameter_over_all_ranks_of_fsdp(seed):
    """Sharded wholly, weights, gradients and moments add up to 16 B a parameter (10 with moments of 8 bits)."""
    shape = any_shape(seed)
    layout = Layout("megatron", 64, 1, 1, 1, 4, 1, 1, "parameters")
    for optimizer, size in (("adamw", 16), ("adamw-8bit", 10)):
        held = memory(shape, Candidate(layout), Job(2048, 64, optimizer=optimizer))
        assert 64 * (held.weights + held.gradients + held.optimizer) == pytest.approx(size * shape.parameters)


def test_zero_1_of_a_folded_layout_by_hand():
    """Mixtral-8x22B, TP2 EP8 PP8 on 128: 7 layers a stage, DP 8, EDP 2; 6 + 12/8 and 6 + 12/2 B a parameter."""
    shape = shapes()["Mixtral-8x22B"]
    dense = (7 * 6144 * 128 * (96 + 16) + 32768 * 6144) / 2 + 7 * 6144 * 8
    expert = 7 * 8 * 3 * 6144 * 16384 / 8
    held = memory(shape, Candidate(Layout("megatron", 128, 2, 1, 8, 8, 1), stages=7), Job(4096, 256))
    assert held.weights + held.gradients + held.optimizer == pytest.approx(dense * 7.5 + expert * 12)
    rows = 4096 * 2 / 2
    one = 22 * 4096 * 6144 / 2 + rows * (4 * 6144 + 6 * 16384)
    assert held.activations == pytest.approx(7 * 8 * (1 + 7 / 56) * one)


def test_recomputing_more_keeps_less():
    shape, job = any_shape(3), Job(4096, 64)
    layout = Layout("megatron", 16, 2, 1, 2, 4, 1)
    kept = [activations(shape, Candidate(layout, 1, 1, level), job) for level in ("none", "selective", "ffn", "full")]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4


def test_transformers_keeps_norms_and_logits_of_every_token_on_every_rank():
    shape, job = any_shape(4), Job(4096, 64)
    mine, theirs = (
        Candidate(Layout(engine, 16, 4, 1, 1, 4, 1, 1, "parameters")) for engine in ("megatron", "transformers")
    )
    for sparse in (True, False):
        more = layer(shape, theirs, job, sparse=sparse) - layer(shape, mine, job, sparse=sparse)
        assert more == pytest.approx(10 * 4096 * shape.hidden * (1 - 1 / 4))


@pytest.mark.parametrize(("rows", "ranks"), [(8, 4), (6, 4), (1, 4), (7, 7), (5, 4), (128, 48)])
def test_rows_are_handed_out_as_torch_chunks_them(rows, ranks):
    import torch

    assert empty_shards(rows, ranks) == ranks - len(torch.chunk(torch.empty(rows, 2), ranks))


@pytest.mark.parametrize(("replicate", "share"), [(1, 1.0), (2, 1.0), (8, 1.0)])
def test_fsdp_cannot_cut_one_expert(replicate, share):
    """8 experts over EP 8: each rank has one, and FSDP over efsdp cuts the axis that counts them."""
    shape = shapes()["Mixtral-8x22B"]
    layout = Layout("transformers", 128, 1, 1, 1, 8, 1, replicate, "parameters")
    assert expert_share(shape, layout) == share
    assert expert_share(shape, dataclasses.replace(layout, engine="megatron")) == 1 / layout.efsdp
    assert expert_share(shape, Layout("transformers", 8, 1, 1, 1, 2, 1, 1, "parameters")) == 1 / 4


def test_adapters_beside_frozen_weights():
    shape, layout = any_shape(1), Layout("transformers", 8, 1, 1, 1, 1, 1, 1, "parameters")
    full, lora, packed = (
        memory(shape, Candidate(layout), Job(2048, 64, training)) for training in ("full", "lora", "4bit")
    )
    assert full.total > lora.total > packed.total
    assert lora.weights - packed.weights == pytest.approx((2 - 0.55) * shape.parameters / 8)
    assert lora.gradients * 8 == pytest.approx(4 * adapters(shape, 16))


def adapters(shape, rank):
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 2 * (h + q) + 2 * (h + kv)
    shared = 3 * (h + shape.shared_width) if shape.shared_width else 0
    ffn = shape.sparse_layers * (shape.experts * 3 * (h + shape.expert_width) + shared)
    return rank * (shape.layers * attention + ffn + shape.dense_layers * 3 * (h + shape.dense_width))


@pytest.mark.parametrize(
    ("model", "a2a", "tp", "etp"),
    [("Mixtral-8x22B", 88, 50, 101), ("Llama3-8x70B", 117, 67, 134), ("Qwen2-57B-A14B", 206, 29, 235), ("Mixtral-8x22B-G8T8", 352, 50, 403)],
)  # fmt: skip
def test_bytes_a_layer_of_the_published_models(model, a2a, tp, etp):
    """Forward MB at 4096 tokens, TP 2, EP 8; ETP 2 where experts are cut (systems.md 4.3)."""
    shape = shapes()[model]
    found = traffic.layer(shape, Layout("megatron", 16, 2, 1, 1, 8, 1), 1, Job(4096, 16), sparse=True)
    assert (found.a2a / 1e6, found.tp_attention / 1e6) == pytest.approx((a2a, tp), rel=0.02)
    cut = traffic.layer(shape, Layout("megatron", 16, 2, 1, 1, 4, 2), 1, Job(4096, 16), sparse=True)
    assert cut.etp / 1e6 == pytest.approx(etp, rel=0.02)


def test_what_one_rank_alone_sends():
    shape, job = any_shape(2), Job(4096, 8)
    layout = Layout("transformers", 1, sharding="parameters")
    for sparse in (True, False):
        assert set(vars(traffic.layer(shape, layout, 1, job, sparse=sparse)).values()) == {0.0}
    assert set(vars(traffic.sync(shape, layout, job)).values()) == {0.0}
    assert traffic.edge(shape, layout, 1, job) == 0.0


def test_frozen_weights_are_gathered_and_never_reduced():
    shape = any_shape(2)
    layout = Layout("transformers", 8, 1, 1, 1, 1, 1, 2, "parameters")
    full, lora = (traffic.sync(shape, layout, Job(2048, 64, training)) for training in ("full", "lora"))
    assert full.reduce_dense > 0
    assert full.replicas > 0
    assert (lora.reduce_dense, lora.reduce_expert, lora.replicas) == (0, 0, 0)
    assert lora.gather_expert == full.gather_expert > 0
    assert traffic.sync(shape, Layout("megatron", 8), Job(2048, 64, "lora")).gather_dense == 0


def test_a_groups_ranks_within_a_node_share_their_ports():
    gpu = dataclasses.replace(H100, link_efficiency=1.0)
    assert ring(Axis(8, 1), gpu) == 450e9
    assert ring(Axis(16, 8), gpu) == 50e9
    assert ring(Axis(16, 4), gpu) == 100e9
    assert ring(Axis(128, 1), gpu) == 400e9
    assert exchange(Axis(8, 1), gpu) == 450e9
    assert 1 / exchange(Axis(16, 1), gpu) == pytest.approx((8 / 15) / 50e9 + (7 / 15) / 450e9)


def test_interleaving_divides_the_bubble():
    shape, job = any_shape(5), Job(4096, 64)
    layout = Layout("megatron", 16, 2, 1, 4, 4, 1)
    found = pace(shape, layout, 1, job, H100)
    once, twice = (step(found, Candidate(layout, 1, stages), job) for stages in (1, 2))
    count = Candidate(layout).microbatches(job)
    assert once.bubble / once.total < 3 / (count + 3) + 1e-9
    assert twice.bubble < 0.6 * once.bubble
    assert twice.compute == once.compute


def test_recomputing_layers_costs_a_forward_pass():
    shape, job = any_shape(6), Job(4096, 64)
    layout = Layout("megatron", 8, 1, 1, 1, 4, 1)
    found = pace(shape, layout, 1, job, H100)
    plain, ffn, full = (step(found, Candidate(layout, 1, 1, level), job) for level in ("none", "ffn", "full"))
    count = Candidate(layout).microbatches(job)
    assert full.compute - plain.compute == pytest.approx(count * (found.attention.compute + found.ffn.compute))
    assert ffn.compute - plain.compute == pytest.approx(count * found.ffn.compute)
    assert full.a2a == ffn.a2a == pytest.approx(1.5 * plain.a2a)


def test_mfu_never_passes_what_the_products_reach():
    job = Job(4096, 256)
    for shape in shapes().values():
        layout = Layout("megatron", 64, 1, 1, 1, 8, 1)
        seconds = step(pace(shape, layout, 1, job, H100), Candidate(layout), job).total
        assert 0 < mfu(shape, job, 64, H100, seconds) < 0.7


def test_every_gpu_is_described():
    assert all(isinstance(gpu, Hardware) and gpu.memory > 20 and gpu.link >= gpu.network for gpu in hardware().values())


def test_context_parallel_ranks_share_attentions_optimizer_state():
    """DP 2 and CP 4: eight ranks keep an eighth each of 12 B for attention's parameters."""
    shape, layout = any_shape(7, experts=8), Layout("megatron", 16, 2, 4, 1, 1, 2)
    held, every = memory(shape, Candidate(layout), Job(16384, 64)), params(shape, layout)
    assert held.optimizer == pytest.approx(12 * (every.dense / 8 + every.expert / 8))


def test_gradients_hide_behind_one_microbatch_and_no_more():
    shape, job = any_shape(8), Job(1024, 64)
    layout = Layout("megatron", 64, 1, 1, 1, 1, 1)
    found = pace(shape, layout, 1, job, dataclasses.replace(H100, network=0.01))
    told = step(found, Candidate(layout), job)
    one = (told.total - told.dp - found.update) / Candidate(layout).microbatches(job)
    assert told.dp == pytest.approx(found.sync - one)
    assert told.dp > 0
    hidden = dataclasses.replace(found, sync=0.9 * one)
    assert step(hidden, Candidate(layout), job).dp == 0


def test_the_optimizer_reads_and_writes_its_state_once():
    shape, job = any_shape(9), Job(2048, 64)
    layout = Layout("megatron", 64, 1, 1, 1, 4, 1, 1, "parameters")
    found = pace(shape, layout, 1, job, H100)
    assert found.update == pytest.approx(2 * 16 * shape.parameters / 64 / 3350e9)
    assert pace(shape, layout, 1, Job(2048, 64, "lora"), H100).update == 0


def test_a_message_costs_its_latency_whatever_its_size():
    shape, job = any_shape(10), Job(64, 64)
    layout = Layout("megatron", 8, 2, 1, 1, 4, 1)
    none, some = (pace(shape, layout, 1, job, dataclasses.replace(H100, link_alpha=alpha)) for alpha in (0.0, 1e-3))
    assert some.ffn.a2a - none.ffn.a2a == pytest.approx(2e-3 * shape.sparse_layers)
    assert some.attention.tp - none.attention.tp == pytest.approx(2e-3 * shape.layers)
    wide = Layout("megatron", 32, 2, 1, 1, 16, 1)
    near, far = (pace(shape, wide, 1, job, dataclasses.replace(H100, network_alpha=alpha)) for alpha in (0.0, 1e-3))
    assert far.ffn.a2a - near.ffn.a2a == pytest.approx(2e-3 * shape.sparse_layers)


def test_keys_and_values_go_round_beside_the_attention_core():
    shape, layout = any_shape(11), Layout("megatron", 32, 1, 4, 1, 1, 1)
    job = Job(65536, 32)
    assert pace(shape, layout, 1, job, H100).attention.cp == 0
    slow = dataclasses.replace(H100, link=0.01, network=0.01)
    moved = traffic.layer(shape, layout, 1, job, sparse=True).cp
    core = 65536 / 4 * attention_core(shape, 65536) / (H100.flops * FLASH)
    each = 4 * H100.link_alpha + moved / (0.01e9 * H100.link_efficiency) - core
    assert pace(shape, layout, 1, job, slow).attention.cp == pytest.approx(shape.layers * each)
