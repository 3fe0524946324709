"""Nothing is dropped silently, what is shown holds, and the order is the objective's."""

import itertools

import pytest

from moeforge_plan import layouts
from moeforge_plan.job import Job, hardware
from moeforge_plan.memory import memory
from moeforge_plan.published import shapes
from moeforge_plan.search import candidates, levels, search, why_lost
from moeforge_plan.shape import read
from moeforge_plan.steptime import pace, step

H100 = hardware()["h100"]
MIXTRAL, QWEN = shapes()["Mixtral-8x22B"], shapes()["Qwen2-57B-A14B"]
DENSE = read({"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
              "vocab_size": 128256, "intermediate_size": 14336})  # fmt: skip
CASES = [
    (MIXTRAL, 128, 256, 4096),
    (QWEN, 64, 256, 4096),
    (MIXTRAL, 256, 32, 32768),
    (DENSE, 16, 96, 8192),
    (DENSE, 12, 24, 2048),
]


@pytest.mark.parametrize(("shape", "world", "batch", "seq"), CASES)
@pytest.mark.parametrize("objective", ["mfu", "memory"])
def test_every_layout_fits_or_is_listed_or_is_refused(shape, world, batch, seq, objective):
    job, budget = Job(seq, batch), 80e9
    found = search(shape, job, H100, world, budget, objective=objective)
    tried = list(candidates(shape, job, H100, world, ("megatron", "transformers")))
    kept = [row.layout for row in (*found.fits, *found.misfits)]
    assert len(set(kept)) == len(kept)
    left = set(tried) - set(kept)
    for layout in left:
        assert layouts.rules(
            layout, experts=shape.experts, heads=shape.heads, kv_heads=shape.kv_heads, layers=shape.layers
        ) or (batch % layout.dp)
    assert bool(left) == bool(found.refused)
    for row in found.fits:
        layout, candidate = row.layout, row.candidate
        assert layouts.faults(layout) == []
        assert row.memory == memory(shape, candidate, job)
        assert row.memory.total <= budget
        assert layout.dp * candidate.micro_batch * candidate.microbatches(job) == batch
        assert shape.layers % (layout.pp * candidate.stages) == 0 or candidate.stages == 1
        assert candidate.recompute in levels(shape, layout.engine)
        assert row.times == step(pace(shape, layout, candidate.micro_batch, job, H100), candidate, job)
    for row in found.misfits:
        assert row.missing == pytest.approx(row.memory.total - budget)
        assert row.missing > 0
    keys = [row.memory.total if objective == "memory" else row.times.total for row in found.fits]
    assert keys == sorted(keys)
    missing = [row.missing for row in found.misfits]
    assert missing == sorted(missing)


def test_what_does_not_fit_is_told_with_the_least_it_would_take():
    job = Job(4096, 256)
    found = search(MIXTRAL, job, H100, 128, 80e9, engines=["megatron"])
    row = found.misfits[0]
    alone = search(MIXTRAL, job, H100, 128, row.memory.total + 1, engines=["megatron"])
    assert row.layout in [other.layout for other in alone.fits]


def test_least_memory_is_less_than_what_the_fastest_takes():
    job = Job(4096, 256)
    fast, small = (search(QWEN, job, H100, 64, 80e9, objective=objective) for objective in ("mfu", "memory"))
    assert small.fits[0].memory.total < fast.fits[0].memory.total
    assert small.fits[0].times.total > fast.fits[0].times.total


def test_more_memory_never_makes_the_best_slower():
    job, best = Job(4096, 256), []
    for budget in (60e9, 80e9, 140e9):
        best.append(search(QWEN, job, H100, 64, budget).fits[0].times.total)
    assert best == sorted(best, reverse=True)


def test_a_microbatch_that_was_asked_for_is_kept():
    found = search(QWEN, Job(4096, 256), H100, 64, 80e9, micro_batch=2)
    assert {row.candidate.micro_batch for row in (*found.fits, *found.misfits)} == {2}
    found = search(DENSE, Job(4096, 10), H100, 8, 80e9, micro_batch=4)
    assert any("microbatch 4 does not divide the global batch of 10" in why for why in found.refused)


def test_interleaving_needs_whole_stages_and_whole_rounds():
    for row in search(MIXTRAL, Job(4096, 256), H100, 128, 80e9, engines=["megatron"]).fits:
        if row.candidate.stages > 1:
            assert row.candidate.microbatches(Job(4096, 256)) % row.layout.pp == 0


def test_every_reason_names_what_the_layout_loses_by():
    job = Job(4096, 256)
    for objective in ("mfu", "memory"):
        fits = search(QWEN, job, H100, 64, 80e9, objective=objective).fits
        said = [why_lost(row, fits[0], job, H100, objective) for row in fits[1:]]
        assert all("\n" not in text and len(text) < 160 for text in said)
        assert len(set(said)) > 10
    slow = [row for row in search(QWEN, job, H100, 64, 80e9).fits]
    for row in slow[1:]:
        told = why_lost(row, slow[0], job, H100, "mfu")
        gaps = {name: value - vars(slow[0].times)[name] for name, value in vars(row.times).items()}
        if "all-to-all" in told:
            assert max(gaps, key=gaps.get) == "a2a"


def test_context_parallelism_is_for_long_sequences():
    seen = {
        seq: {row.cp for row in candidates(MIXTRAL, Job(seq, 32), H100, 64, ["megatron"])}
        for seq in (4096, 8192, 65536)
    }
    assert seen == {4096: {1}, 8192: {1, 2}, 65536: {1, 2, 4, 8, 16}}


def test_layers_that_do_not_divide_leave_a_shorter_last_stage():
    from moeforge_plan.commands import last_stage

    for layers, pp in itertools.product(range(1, 65), range(1, 17)):
        layout = layouts.Layout("megatron", 16 * pp, pp=pp)
        empty = any("empty" in why for why in layouts.rules(layout, experts=0, heads=8, kv_heads=8, layers=layers))
        stages = [list(range(layers))[i : i + -(-layers // pp)] for i in range(0, layers, -(-layers // pp))]
        assert empty == (len(stages) != pp)
        if not empty:
            assert (last_stage(DENSE.__class__(**{**vars(DENSE), "layers": layers}), pp) or len(stages[0])) == len(
                stages[-1]
            )
