"""What may be asked of ranks is decided from numbers alone, before anything is loaded."""

import itertools
import subprocess
import sys

import pytest

from moeforge.errors import UsageProblem
from moeforge.train.layout import Layout, arrange, check_model


def test_what_is_left_are_copies():
    assert arrange(1, 1, 1, None, 1) == Layout() and not Layout().sharded
    assert arrange(1, 1, 1, None, 4) == Layout(replicate=4) and not Layout(replicate=4).sharded
    assert arrange(2, 2, 4, None, 8) == Layout(2, 2, 4, 2)
    assert arrange(2, 4, 4, None, None) == Layout(2, 4, 4, 1)


def test_data_is_what_sees_rows_of_its_own_whatever_the_experts_do():
    for ep in (2, 4, 8):
        layout = arrange(2, 4, ep, 2, 16)
        assert (layout.data, layout.shards, layout.world) == (8, 8, 16) and layout.sharded


@pytest.mark.parametrize(
    ("numbers", "world", "told"),
    [
        ((1, 3, 1, None), 4, r"--tp 1 --fsdp 3 needs 3 or a multiple of it processes, and there are 4"),
        ((2, 2, 1, 2), 4, r"--tp 2 --fsdp 2 --dp-replicate 2 needs 8 processes, and there are 4"),
        ((1, 2, 2, None), 1, r"needs 2 or a multiple of it processes, and there is one: torchrun --nproc-per-node"),
        ((1, 1, 1, 2), 4, r"--dp-replicate 2 needs 2 processes, and there are 4"),
        ((2, 2, 1 + 2, None), 4, r"--ep 3 --tp 2: .* must be a multiple of 2"),
        ((1, 4, 3, None), 4, r"--ep 3: must divide fsdp \* tp = 4"),
        ((2, 1, 4, None), 2, r"--ep 4: must divide fsdp \* tp = 2"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused_by_name(numbers, world, told):
    with pytest.raises(UsageProblem, match=told):
        arrange(*numbers, world)


def test_what_is_accepted_is_what_transformers_accepts():
    """Its own rules, for every small number."""
    distributed = pytest.importorskip("transformers.distributed.configuration_utils")
    if not hasattr(distributed.DistributedConfig(), "ep_size"):
        pytest.skip("this transformers has no experts on ranks of their own")
    accepted = 0
    for tp, fsdp, ep, replicate in itertools.product((1, 2, 3, 4, 6), (1, 2, 3, 4, 6), (1, 2, 3, 4, 6, 8, 12), (1, 2)):
        numbers = dict(tp_size=tp, fsdp_size=fsdp, ep_size=ep, dp_replicate_size=replicate)
        try:
            distributed.DistributedConfig(**numbers)
        except ValueError:
            with pytest.raises(UsageProblem):
                arrange(tp, fsdp, ep, replicate, tp * fsdp * replicate)
        else:
            accepted += 1
            assert arrange(tp, fsdp, ep, replicate, tp * fsdp * replicate).world == tp * fsdp * replicate
    assert accepted > 50


def test_the_model_s_numbers_count():
    config = {"num_attention_heads": 12, "num_key_value_heads": 4}
    for layout, experts in [
        (Layout(2, 4, 8), 8),
        (Layout(1, 2, 1), 3),
        (Layout(4, 1, 1), 2),
        (Layout(2, 4, 4), 8),
        (Layout(4, 4, 1), None),
    ]:
        check_model(layout, config, experts, "moe")
    for layout, experts, told in [
        (Layout(1, 8, 8), 12, "moe has 12 experts, which 8 ranks cannot share evenly"),
        (Layout(1, 2, 2), None, "moe has no experts"),
        (Layout(8, 1, 1), 8, "num_attention_heads = 12, which 8 ranks"),
        (Layout(6, 1, 1), 6, "num_key_value_heads = 4, which 6 ranks"),
        (Layout(2, 4, 4), 4, "has 4 experts, so that of 2 ranks which hold 1 of them together one would hold none"),
        (Layout(1, 4, 1), 5, "has 5 experts, so that of 4 ranks which hold 5 of them together one would hold none"),
    ]:
        with pytest.raises(UsageProblem, match=told):
            check_model(layout, config, experts, "moe")


def test_it_imports_no_torch():
    code = "import sys, moeforge.train.layout, moeforge.pipeline.ranks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
