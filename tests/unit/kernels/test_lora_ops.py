"""Back ends of the LoRA ops against the reference in float64: answers and all gradients."""

import pytest
import torch

from moeforge_kernels.activations import FUNCTIONS
from moeforge_kernels.lora_experts import EXPAND, OP, SHRINK, are_few, lora_expand, lora_experts, lora_shrink, plan
from moeforge_kernels.lora_ffn import OP as FFN
from moeforge_kernels.lora_ffn import lora_ffn
from moeforge_kernels.lora_ffn.blocked import ROWS
from moeforge_kernels.pairs import pairs_from_slots

LIMITS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 5e-2}
SIZES = [(13, 5, 2, 3), (1, 4, 2, 8), (7, 1, 1, 1), (ROWS + 9, 3, 2, 5), (0, 3, 2, 2), (40, 9, 3, 16)]
"""T, E, K, r."""


def routed(tokens, experts, slots, dtype, *, seed=0, empty=True, sums_to_one=False):
    generator = torch.Generator().manual_seed(seed)
    index = (
        torch.stack([torch.randperm(experts, generator=generator)[:slots] for _ in range(tokens)])
        if tokens
        else torch.zeros(0, slots).long()
    )
    weight = torch.rand(tokens, slots, generator=generator, dtype=torch.float64) + 0.1
    if sums_to_one:
        weight = weight / weight.sum(-1, keepdim=True)
    elif empty and tokens > 3:
        index[1] = experts  # a token without an expert
        index[2, 0] = experts
    return index, weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_()


def random(*shape, dtype, seed):
    value = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return value.to(dtype).requires_grad_()


def compare(run, inputs, weight, index, experts, dtype, backend):
    """The worst error of answers and gradients: the norm of the difference over that of the true tensor."""

    def both(which, inputs, weight):
        outs = [out for out in run(which, inputs, pairs_from_slots(index, weight, experts)) if out is not None]
        up = [
            torch.randn(out.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(out.dtype)
            for i, out in enumerate(outs)
        ]
        leaves = [leaf for leaf in (*inputs, weight) if leaf is not None]
        grads = torch.autograd.grad([(o * u).sum() for o, u in zip(outs, up, strict=True)], leaves, allow_unused=True)
        return [*outs, *grads]

    wide = [None if value is None else value.detach().double().requires_grad_() for value in inputs]
    truth = both("reference", wide, weight.detach().double().requires_grad_())
    found = both(backend, inputs, weight)
    worst = 0.0
    for one, other in zip(found, truth, strict=True):
        if other is None:
            assert one is None or not one.any()
            continue
        assert one.shape == other.shape and bool(one.isfinite().all())
        if other.numel():
            gap = (one.detach().double() - other.detach()).norm() / other.detach().norm().clamp_min(1e-30)
            worst = max(worst, float(gap))
    return worst


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("backend", ["concat", "grouped", "few"])
@pytest.mark.parametrize("share", [False, True])
def test_lora_experts(backend, sizes, dtype, share):
    tokens, experts, slots, rank = sizes
    index, weight = routed(tokens, experts, slots, dtype)
    scale = torch.rand(experts, generator=torch.Generator().manual_seed(9)) + 0.5
    inputs = [random(tokens, 11, dtype=dtype, seed=1), random(1 if share else experts, rank, 11, dtype=dtype, seed=2),
              random(experts, 17, rank, dtype=dtype, seed=3)]  # fmt: skip

    def run(which, values, pairs):
        return (lora_experts(values[0], pairs, values[1], values[2], scale, backend=which),)

    assert compare(run, inputs, weight, index, experts, dtype, backend) <= LIMITS[dtype]

    def shrink(which, values, pairs):
        return (lora_shrink(values[0], pairs, values[1], backend=which), values[2].sum() + pairs.weight.sum())

    if backend in SHRINK.backends:
        assert compare(shrink, inputs, weight, index, experts, dtype, backend) <= LIMITS[dtype]
    low = random(tokens * slots, rank, dtype=dtype, seed=4)

    def expand(which, values, pairs):
        return (lora_expand(values[0], pairs, values[1], scale, backend=which),)

    assert compare(expand, [low, inputs[2]], weight, index, experts, dtype, backend) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("backend", ["blocked", "grouped"])
@pytest.mark.parametrize("kind", ["gated", "plain", "fused", "no gate deltas", "no down deltas", "paper", "to one"])
def test_lora_ffn(backend, sizes, dtype, kind):
    tokens, experts, slots, rank = sizes
    width, pairs_count = 19, tokens * slots
    index, weight = routed(tokens, experts, slots, dtype, sums_to_one=kind == "to one")
    scale = torch.rand(experts, generator=torch.Generator().manual_seed(9)) + 0.5
    both = random(tokens, 2 * width, dtype=dtype, seed=1)
    inputs = [both, random(pairs_count, rank, dtype=dtype, seed=2), random(pairs_count, rank, dtype=dtype, seed=3),
              random(experts, width, rank, dtype=dtype, seed=4), random(experts, width, rank, dtype=dtype, seed=5),
              random(experts, rank, width, dtype=dtype, seed=6)]  # fmt: skip
    if kind in ("plain", "no gate deltas"):
        inputs[1] = inputs[3] = None
    if kind == "no down deltas":
        inputs[5] = None

    def run(which, values, pairs):
        both, low_gate, low_up, b_gate, b_up, a_down = values
        gate, up = both.chunk(2, -1)  # rows with a stride
        return lora_ffn(None if kind == "plain" else gate, up, low_gate, low_up, pairs, b_gate, b_up, a_down, scale, activation="silu",
                        rest=kind != "paper", backend=which)  # fmt: skip

    assert compare(run, inputs, weight, index, experts, dtype, backend) <= LIMITS[dtype]


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("backend", ["blocked", "grouped"])
def test_every_activation(backend, activation):
    index, weight = routed(20, 4, 2, torch.float64)
    inputs = [random(20, 8, dtype=torch.float64, seed=1), random(20, 8, dtype=torch.float64, seed=2), random(40, 3, dtype=torch.float64, seed=3),
              random(4, 8, 3, dtype=torch.float64, seed=4)]  # fmt: skip

    def run(which, values, pairs):
        gate, up, low, b = values
        return lora_ffn(
            gate, up, low, low, pairs, b, b, None, torch.ones(4), activation=activation, rest=True, backend=which
        )

    assert compare(run, inputs, weight, index, 4, torch.float64, backend) <= 1e-11


@pytest.mark.parametrize("backend", FFN.backends)
def test_weights_that_sum_to_one_still_get_the_gradient_of_the_rest(backend):
    """What a straight-through gate learns from: d/dw of (1 - w) h_base is there although 1 - w is 0."""
    dtype = torch.float32 if backend == "cpu" else torch.float64
    index, weight = torch.zeros(3, 1).long(), torch.ones(3, 1, dtype=dtype, requires_grad=True)
    up = random(3, 6, dtype=dtype, seed=1)
    pairs = pairs_from_slots(index, weight, 2)
    low, b = random(3, 2, dtype=dtype, seed=2), random(2, 6, 2, dtype=dtype, seed=3)
    given = (None, up, None, low, pairs, None, b, None, torch.ones(2))
    if reason := FFN.backends[backend].why_not(*given):
        pytest.skip(reason)
    mixed, _ = lora_ffn(*given, activation="silu", rest=True, backend=backend)
    (found,) = torch.autograd.grad(mixed.sum(), weight)
    h = torch.nn.functional.silu(up + low @ b[0].T) - torch.nn.functional.silu(up)
    torch.testing.assert_close(found.squeeze(-1), h.sum(-1))


@pytest.mark.parametrize("backend", ["cpu", "blocked"])
def test_nothing_as_wide_as_the_network_is_kept_for_a_pair(backend):
    kept = []
    index, weight = routed(64, 4, 2, torch.float32, empty=False)
    gate, up = random(64, 96, dtype=torch.float32, seed=1), random(64, 96, dtype=torch.float32, seed=2)
    low, b, a = (
        random(128, 4, dtype=torch.float32, seed=3),
        random(4, 96, 4, dtype=torch.float32, seed=4),
        random(4, 4, 96, dtype=torch.float32, seed=5),
    )
    given = (gate, up, low, low, pairs_from_slots(index, weight, 4), b, b, a, torch.ones(4))
    if reason := FFN.backends[backend].why_not(*given):
        pytest.skip(reason)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_ffn(*given, activation="silu", rest=True, backend=backend)
    wide = {t.data_ptr() for t in kept if t.ndim == 2 and t.shape[1] == 96}
    assert wide == {gate.data_ptr(), up.data_ptr()}


def test_the_plan_and_what_is_refused():
    assert plan(4096, 8, 16) == "concat" and plan(4096, 8, 64) == "grouped" and plan(8, 8, 64) == "concat"
    index, weight = routed(3, 2, 1, torch.float32)
    pairs = pairs_from_slots(index, weight, 2)
    x, a = torch.randn(3, 4), torch.randn(2, 2, 4)
    with pytest.raises(ValueError, match="no backend 'magic'; there are concat, grouped, few, cpu, reference"):
        lora_experts(x, pairs, a, torch.randn(2, 5, 2), torch.ones(2), backend="magic")
    assert {*EXPAND.backends} == {*SHRINK.backends, "few"} == {"concat", "grouped", "few", "reference"}
    assert {*OP.backends} == {*EXPAND.backends, "cpu"}
    # one token's two pairs among eight experts touch two of them; three tokens' pairs are no longer few
    assert [are_few(pairs_from_slots(*routed(tokens, 8, 2, torch.float32), 8)) for tokens in (0, 1, 2, 3)] == [
        True,
        True,
        True,
        False,
    ]
