"""Every layout of up to 64 ranks, by brute force, and transformers' own meshes and refusals."""

import itertools
import math

import pytest

from moeforge_plan import layouts
from moeforge_plan.layouts import AXES, ORDER, Layout, divisors, faults, groups, rules

WORLDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


def every(world):
    """Every (TP, CP, PP, EP, ETP) whose two products divide the ranks."""
    for pp in divisors(world):
        pairs = [(a, b) for a in divisors(world // pp) for b in divisors(world // pp // a)]
        for (tp, cp), (etp, ep) in itertools.product(pairs, pairs):
            yield Layout("megatron", world, tp, cp, pp, ep, etp)


@pytest.mark.parametrize("world", WORLDS)
def test_groups_of_every_layout_partition_the_ranks_and_pipelines_agree(world):
    count = 0
    for layout in every(world):
        count += 1
        assert faults(layout) == []
        for sizes, axis in (
            (layout.dense_sizes(), layout.dense_axis),
            (layout.expert_sizes(), layout.expert_axis),
        ):
            assert math.prod(sizes.values()) == world
            for name in AXES:
                found = groups(sizes, ORDER, name)
                assert sorted(itertools.chain(*found)) == list(range(world))
                assert {len(group) for group in found} == {sizes[name]}
                if sizes[name] > 1:
                    assert {b - a for group in found for a, b in itertools.pairwise(group)} == {axis(name).stride}
        assert groups(layout.dense_sizes(), ORDER, "pp") == groups(layout.expert_sizes(), ORDER, "pp")
    assert count >= len(divisors(world))


@pytest.mark.parametrize("node", [2, 8])
def test_ranks_of_a_group_within_a_node_are_counted(node):
    for layout in every(32):
        for sizes, axis in (
            (layout.dense_sizes(), layout.dense_axis),
            (layout.expert_sizes(), layout.expert_axis),
        ):
            for name in AXES:
                for group in groups(sizes, ORDER, name):
                    shared = {sum(other // node == rank // node for other in group) for rank in group}
                    assert shared == {axis(name).inside(node)}, (layout, name, group)


def test_the_gradient_group_of_attention_spans_dp_and_cp():
    for layout in every(16):
        both = layout.dense_axis("dp+cp")
        ranks = {0}
        for name in ("cp", "dp"):
            sizes = layout.dense_sizes()
            ranks = {other for group in groups(sizes, ORDER, name) if ranks & set(group) for other in group}
        assert sorted(ranks) == [both.stride * at for at in range(both.size)]


def test_a_pipeline_that_is_not_slowest_needs_equal_expert_and_data_parallelism():
    """Section 1.3 (d) and (e): with pp before dp, attention's and the experts' pipelines agree just where TP*CP = ETP*EP."""
    order, wrong, right = "tp-cp-ep-pp-dp", 0, 0
    for layout in every(64):
        if layout.pp == 1:
            assert faults(layout, order) == []
        elif layout.tp * layout.cp == layout.etp * layout.ep:
            right += 1
            assert faults(layout, order) == []
        else:
            wrong += 1
            assert "must end in pp" in faults(layout, order)[0]
            assert "disagree on the pipeline groups" in faults(layout, order)[1]
    assert wrong > right > 0


def test_products_that_do_not_divide_are_named():
    assert faults(Layout("megatron", 64, tp=3)) == ["TP*CP*PP = 3 does not divide 64 GPUs"]
    assert faults(Layout("megatron", 64, pp=4, ep=5)) == ["ETP*EP*PP = 20 does not divide 64 GPUs"]
    assert "replicas" in faults(Layout("transformers", 64, replicate=3, sharding="parameters"))[0]


@pytest.mark.parametrize(
    ("sizes", "order", "message"),
    [
        ({"tp": 2, "dp": 2}, "tp", "lacks dp, whose size is 2"),
        ({"tp": 2, "dp": 2}, "tp-tp-dp", "each of tp, dp at most once"),
        ({"tp": 2, "dp": 2}, "tp-dp-zp", "each of tp, dp at most once"),
        ({"cp": 2, "ep": 2}, "cp-ep", "cannot have both EP and CP"),
    ],
)
def test_orders_that_cannot_be(sizes, order, message):
    with pytest.raises(ValueError, match=message):
        layouts.complete(sizes, order)


def test_an_axis_of_size_one_may_be_left_out():
    assert groups({"tp": 2, "cp": 1, "dp": 3}, "dp-tp", "tp") == [(0, 3), (1, 4), (2, 5)]
    assert groups({"tp": 2, "cp": 1, "dp": 3}, "dp-tp", "cp") == [(rank,) for rank in range(6)]


def test_folding_lets_ep_reach_over_tp_cp_and_dp():
    """Section 1.1: TP4 CP2 DP8 PP4 has EP up to 64, 8 before folding; CP8 with EP8 needs 8 GPUs."""
    wide = Layout("megatron", 256, tp=4, cp=2, pp=4, ep=64)
    assert (wide.dp, wide.edp, faults(wide), wide.folded) == (8, 1, [], True)
    small = Layout("megatron", 8, cp=8, ep=8)
    assert (small.dp, small.edp, faults(small)) == (1, 1, [])
    assert not Layout("megatron", 128, tp=2, pp=8, ep=4, etp=2).folded


def test_transformers_refuses_what_the_rules_refuse():
    from transformers.distributed import DistributedConfig

    agreed = set()
    for tp, fsdp, replicate, ep in itertools.product((1, 2, 3, 4), (1, 2, 3, 4, 6), (1, 2), (2, 3, 4, 6, 8, 12)):
        world = tp * fsdp * replicate
        if world % ep:
            continue
        layout = Layout("transformers", world, tp, 1, 1, ep, 1, replicate, "parameters")
        mine = [text for text in rules(layout, experts=24, heads=12, kv_heads=12, layers=4) if "EP" in text]
        try:
            made = DistributedConfig(tp_size=tp, fsdp_size=fsdp, dp_replicate_size=replicate, ep_size=ep)
        except ValueError as error:
            assert mine, f"{layout}: transformers says {error}"
        else:
            assert mine == [], layout
            assert (made.efsdp_size, made.dp_size) == (layout.efsdp, layout.dp)
        agreed.add(bool(mine))
    assert agreed == {True, False}


def test_tune_takes_what_the_rules_take():
    """`moeforge tune` refuses a layout for a model just where `plan` does."""
    from moeforge.errors import UsageProblem
    from moeforge.train.layout import arrange, check_model

    agreed = set()
    sizes = itertools.product((1, 2, 4), (1, 2, 3, 4, 8), (1, 2), (1, 2, 4, 8), (6, 8, 16), ((8, 2), (12, 4)))
    for tp, fsdp, replicate, ep, experts, (heads, kv_heads) in sizes:
        world = tp * fsdp * replicate
        if world % ep:
            continue
        etp = 1 if ep > 1 else tp
        layout = Layout("transformers", world, tp, 1, 1, ep, etp, replicate, "parameters")
        mine = rules(layout, experts=experts, heads=heads, kv_heads=kv_heads, layers=4)
        config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        try:
            check_model(arrange(tp, fsdp, ep, replicate, world), config, experts, "m")
        except UsageProblem as error:
            assert mine, f"{layout}, {experts} experts: tune says {error}"
        else:
            assert mine == [], layout
        agreed.add(bool(mine))
    assert agreed == {True, False}


def test_transformers_refuses_a_pipeline_beside_fsdp():
    from transformers.distributed import DistributedConfig

    with pytest.raises(ValueError, match="pipeline"):
        DistributedConfig(fsdp_size=2, pp_size=2)
    layout = Layout("transformers", 4, pp=2, sharding="parameters")
    assert any("no pipeline" in text for text in rules(layout, experts=0, heads=4, kv_heads=4, layers=4))


@pytest.mark.parametrize(
    ("tp", "fsdp", "replicate", "ep"),
    [(1, 8, 1, 8), (2, 4, 1, 4), (2, 2, 2, 4), (2, 8, 1, 2), (4, 2, 2, 8), (1, 4, 4, 2)],
)
def test_our_groups_are_those_of_transformers_meshes(tp, fsdp, replicate, ep):
    """Both meshes, built by transformers itself over a process group that talks to nobody."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers.distributed import DistributedConfig
    from transformers.distributed.utils import initialize_distributed_mesh

    world = tp * fsdp * replicate
    layout = Layout("transformers", world, tp, 1, 1, ep, 1, replicate, "parameters")
    torch.distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        config = DistributedConfig(tp_size=tp, fsdp_size=fsdp, dp_replicate_size=replicate, ep_size=ep)
        _, mesh = initialize_distributed_mesh(config)
        assert mesh is not None
        for sizes, names, of in (
            (layout.dense_sizes(), {"tp": "tp"}, mesh.get_mesh(("pp", "dp_replicate", "fsdp", "tp"))),
            (layout.expert_sizes(), {"ep": "ep"}, mesh.get_mesh(("pp", "dp_replicate", "efsdp", "ep"))),
        ):
            data = "fsdp" if "tp" in names else "efsdp"
            for mine, theirs in ({**names, "dp": ("dp_replicate", data)}).items():
                ranks = of.mesh
                axes = [of.mesh_dim_names.index(name) for name in ((theirs,) if isinstance(theirs, str) else theirs)]
                moved = torch.movedim(ranks, axes, tuple(range(-len(axes), 0))).reshape(-1, sizes[mine])
                assert sorted(map(tuple, moved.tolist())) == groups(sizes, ORDER, mine)
    finally:
        torch.distributed.destroy_process_group()


def test_enumerated_layouts_are_sound_and_distinct():
    for found in (
        list(layouts.megatron(64, experts=8, node=8, cp=True)),
        list(layouts.transformers(64, experts=8, node=8)),
    ):
        assert len(set(found)) == len(found) > 20
        assert all(faults(layout) == [] for layout in found)
    assert {layout.ep for layout in layouts.transformers(64, experts=0, node=8)} == {1}
