"""A layout in its engine's words, and what is said beside it."""

import shlex

import pytest

from moeforge_plan.commands import bridge, call, tune
from moeforge_plan.job import Candidate, Job, hardware
from moeforge_plan.layouts import Layout, rules
from moeforge_plan.memory import memory
from moeforge_plan.notes import notes
from moeforge_plan.published import shapes
from moeforge_plan.search import Row, interleavings

H100 = hardware()["h100"]
MIXTRAL = shapes()["Mixtral-8x22B"]
JOB = Job(4096, 256)


def row(layout, *, micro_batch=1, stages=1, recompute="none"):
    candidate = Candidate(layout, micro_batch, stages, recompute)
    return Row(candidate, memory(MIXTRAL, candidate, JOB), None, None, 0.0)


def test_a_layout_of_several_nodes_for_transformers():
    found = row(Layout("transformers", 32, 2, 1, 1, 8, 1, 2, "parameters"), micro_batch=2, recompute="full")
    assert (
        call(found)
        == "DistributedConfig(tp_size=2, fsdp_size=8, dp_replicate_size=2, ep_size=8, fsdp_mixed_precision=True)"
    )
    assert shlex.split(tune(found, JOB, H100, "my model")) == [
        *"torchrun --nnodes 4 --nproc-per-node 8 -m moeforge tune".split(), "my model",
        *"--data DATA --tp 2 --fsdp 8 --dp-replicate 2 --ep 8 --sequence-length 4096 --batch-size 2 --accumulate 8".split(),
        "--gradient-checkpointing",
    ]  # fmt: skip


def test_one_node_and_one_gpu():
    four = tune(row(Layout("transformers", 4, sharding="parameters")), JOB, H100, "m")
    assert four.startswith("torchrun --nproc-per-node 4 -m moeforge tune m ")
    assert "--gradient-checkpointing" not in four
    one = row(Layout("transformers", 1, sharding="parameters"))
    assert call(one) == "DistributedConfig()"
    assert tune(one, JOB, H100, "m").startswith("moeforge tune m --data DATA --sequence-length")


@pytest.mark.parametrize(
    ("recompute", "told"),
    [
        ("none", set()),
        ("selective", {"model.recompute_granularity=selective", "model.recompute_modules=[moe_act]"}),
        ("ffn", {"model.recompute_granularity=selective", "model.recompute_modules=[moe]"}),
        (
            "full",
            {"model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1"},
        ),
    ],
)
def test_megatron_bridge(recompute, told):
    found = bridge(row(Layout("megatron", 128, 2, 1, 8, 8, 1), stages=7, recompute=recompute), JOB, MIXTRAL)
    assert {text for text in found if "recompute" in text} == told
    assert set(found) - told == {
        "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=8", "model.context_parallel_size=1",
        "model.expert_model_parallel_size=8", "model.expert_tensor_parallel_size=1", "model.sequence_parallel=true",
        "model.virtual_pipeline_model_parallel_size=7", "train.micro_batch_size=1", "train.global_batch_size=256",
        "model.seq_length=4096", "dataset.sequence_length=4096", "ddp.use_distributed_optimizer=true",
    }  # fmt: skip


def test_what_is_said_beside_a_layout():
    within = row(Layout("megatron", 128, 2, 1, 8, 8, 1))
    assert notes(within, MIXTRAL, H100, 2 * within.memory.total) == []
    (tight,) = notes(within, MIXTRAL, H100, 1.02 * within.memory.total)
    assert f"only {0.02 * within.memory.total / 1e9:.2g} GB are left" in tight
    wide = row(Layout("megatron", 128, 8, 1, 1, 8, 8))
    assert notes(wide, MIXTRAL, H100, 2 * wide.memory.total) == [
        "EP 8 spans nodes: its all-to-all runs at 50 GB/s, not 450"
    ]
    short = row(Layout("megatron", 80, pp=5))
    assert notes(short, MIXTRAL, H100, 2 * short.memory.total) == [
        "56 layers do not divide by PP 5: the last stage holds 8"
    ]


def test_interleaving_takes_microbatches_in_multiples_of_the_pipeline():
    layout = Layout("megatron", 128, 2, 1, 8, 8, 1)  # DP 8
    assert interleavings(MIXTRAL, layout, 1, Job(4096, 256)) == [1, 7]
    assert interleavings(MIXTRAL, layout, 1, Job(4096, 8 * 12)) == [1]
    assert interleavings(MIXTRAL, Layout("megatron", 80, pp=5), 1, Job(4096, 160)) == [1]


@pytest.mark.parametrize(("tp", "kv_heads", "runs"), [(8, 4, True), (2, 8, True), (4, 6, False), (8, 12, False)])
def test_key_value_heads_are_cut_or_repeated(tp, kv_heads, runs):
    layout = Layout("megatron", 8, tp, etp=tp)
    found = rules(layout, experts=0, heads=24, kv_heads=kv_heads, layers=4)
    assert (found == []) == runs
