"""The compiled ops of a decoding step against the reference in float64: few pairs, no way back."""

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from moeforge_kernels import lora_experts, lora_network, routing
from moeforge_kernels.activations import FUNCTIONS
from moeforge_kernels.cpu import library
from moeforge_kernels.lora_experts.cpu import PAIRS
from moeforge_kernels.pairs import pairs_from_experts, pairs_from_slots
from moeforge_kernels.routing.cpu import TOKENS

pytestmark = pytest.mark.skipif(library.lacks(False) is not None, reason=str(library.lacks(False)))

SIZES = [(1, 8, 2, 16, 96, 100), (3, 4, 2, 5, 33, 19), (5, 3, 1, 40, 64, 17), (4, 1, 1, 1, 20, 33), (2, 5, 3, 8, 1, 1), (0, 3, 2, 4, 8, 8),
         (1, 6, 2, 64, 4096, 1000)]  # fmt: skip
"""T, E, K, r, D, outputs (F, too); the last is worth more than one thread."""
DTYPES = [dtype for dtype in library.DTYPES if library.lacks(dtype == torch.bfloat16, tiles=False) is None]
in_both = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def routed(tokens, experts, slots, *, seed=0):
    """Every token's experts, some of the slots empty."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=generator).topk(slots, -1).indices
    index.view(-1)[3::4] = experts
    return pairs_from_slots(index, torch.rand(index.shape, generator=generator) + 0.1, experts)


def wide(given):
    """The same in float64."""

    def one(value):
        if isinstance(value, torch.Tensor):
            return value.double()
        return value if value is None else value._replace(weight=value.weight.double())

    return [one(value) for value in given]


def narrow(given, dtype):
    """The same numbers in another type, but for the scales and the weights of the pairs."""
    tensors = [value.to(dtype) if isinstance(value, torch.Tensor) else value for value in given[:-1]]
    return [*tensors, given[-1]]


def check(found, true, dtype=torch.float32):
    for one, other in zip(found, true, strict=True):
        if other is None:
            assert one is None
            continue
        assert one.shape == other.shape and one.dtype == dtype
        assert bool(one.isfinite().all())
        assert float((one.double() - other).norm()) <= LIMITS[dtype] * float(other.norm())


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("share", [False, True])
@in_both
def test_experts_beside_a_map(sizes, share, dtype):
    tokens, experts, slots, rank, width, outputs = sizes
    a = random(1 if share else experts, rank, width, seed=2)
    given = [random(tokens, width, seed=1), routed(tokens, experts, slots), a, random(experts, outputs, rank, seed=3),
             random(experts, seed=4)]  # fmt: skip
    given = narrow(given, dtype)
    found = lora_experts.lora_experts(*given, backend="cpu")
    check([found], [lora_experts.lora_experts(*wide(given), backend="reference")], dtype)


def network(sizes, kind="gated", *, seed=0):
    """The arguments of lora_network before its options."""
    tokens, experts, slots, rank, width, ffn = sizes
    both = random(tokens, 2 * ffn, seed=seed + 1)
    gate, up = both.chunk(2, -1)  # rows with a stride
    a_gate, a_up = random(experts, rank, width, seed=seed + 2), random(experts, rank, width, seed=seed + 3)
    b_both = random(experts, 2 * ffn, rank, seed=seed + 4)
    b_gate, b_up = b_both.split(ffn, 1)
    a_down, b_down = random(experts, rank, ffn, seed=seed + 5), random(experts, width, rank, seed=seed + 6)
    if kind == "one A":
        a_up = a_gate
    if kind == "plain":
        gate = a_gate = b_gate = None
    if kind == "no gate deltas":
        a_gate = b_gate = None
    if kind == "no up deltas":
        a_up = b_up = None
    if kind == "only down":
        a_gate = b_gate = a_up = b_up = None
    if kind == "no down deltas":
        a_down = b_down = None
    x = random(tokens, 2 * width, seed=seed)[:, ::2]  # elements apart
    return [x, gate, up, routed(tokens, experts, slots), a_gate, a_up, b_gate, b_up, a_down, b_down, random(experts, seed=seed + 7)]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize(
    "kind", ["gated", "one A", "plain", "no gate deltas", "no up deltas", "only down", "no down deltas"]
)
@in_both
def test_experts_around_a_network(sizes, kind, rest, dtype):
    given, how = narrow(network(sizes, kind), dtype), {"activation": "silu", "rest": rest}
    check(
        lora_network.lora_network(*given, **how, backend="cpu"),
        lora_network.lora_network(*wide(given), **how, backend="reference"),
        dtype,
    )


@torch.no_grad()
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_every_activation(activation):
    given, how = network(SIZES[1]), {"activation": activation, "rest": True}
    check(
        lora_network.lora_network(*given, **how, backend="cpu"),
        lora_network.lora_network(*wide(given), **how, backend="reference"),
    )


@torch.no_grad()
def test_weights_that_sum_to_one_leave_the_network_nothing():
    given = network((3, 4, 2, 5, 33, 19))
    index = torch.tensor([[0, 1], [2, 3], [1, 2]])
    weight = torch.tensor([[0.1, 0.9], [0.3, 0.7], [1 / 3, 2 / 3]])
    given[3] = pairs_from_slots(index, weight, 4)
    one, other = (lora_network.lora_network(*given, activation="gelu", rest=rest, backend="cpu")[0] for rest in (True, False))  # fmt: skip
    assert torch.equal(one, other)


@torch.no_grad()
def test_experts_that_choose_tokens():
    index = torch.tensor([[0, 3], [3, 4], [4, 1]])  # 4: an empty place; token 2 is chosen by nobody
    pairs = pairs_from_experts(index, torch.rand(3, 2) + 0.1, 4)
    given = network((4, 3, 1, 6, 24, 40))
    given[3] = pairs
    check(
        lora_network.lora_network(*given, activation="silu", rest=True, backend="cpu"),
        lora_network.lora_network(*wide(given), activation="silu", rest=True, backend="reference"),
    )


@torch.no_grad()
def test_the_same_bits_whatever_the_number_of_threads():
    given, before = network(SIZES[-1]), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(lora_network.lora_network(*given, activation="silu", rest=True, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for made in found[1:] for one, other in zip(made, found[0], strict=True))


ROUTED = [(1, 8, 2), (5, 4, 1), (13, 7, 3), (0, 3, 2), (TOKENS, 60, 8), (3, 1, 1)]


@torch.no_grad()
@pytest.mark.parametrize("sizes", ROUTED)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_routing(sizes, score):
    tokens, experts, top_k = sizes
    flags = itertools.product([False, True], repeat=5)
    for seed, (first, renormalise, biased, padded, ties) in enumerate(flags):
        logits = random(tokens, experts, seed=seed)
        logits = logits.round() if ties else logits
        how = {
            "score": score, "select_first": first, "renormalise": renormalise, "factor": 1.7,
            "bias": random(experts, seed=99) if biased else None, "real": random(tokens, seed=7) > -0.5 if padded else None,
        }  # fmt: skip
        found, true = (routing.route(logits, top_k, **how, backend=name) for name in ("cpu", "reference"))
        assert found.tokens == true.tokens and found.slots == true.slots
        for name in ("token", "expert", "offsets", "by_token"):
            one, other = getattr(found, name), getattr(true, name)
            assert one.dtype == other.dtype and torch.equal(one, other), (name, how)
        torch.testing.assert_close(found.weight, true.weight, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("at", [0, 5])
def test_a_router_that_says_nan_is_seen(score, at):
    logits = random(2, 6, seed=1)
    logits[1, at] = torch.nan
    found = routing.route(logits, 2, score=score, backend="cpu")
    weight = found.weight[found.by_token].view(2, 2)
    assert not weight[0].isnan().any() and weight[1].isnan().any()


def test_when_it_is_chosen():
    given = network(SIZES[0])
    how = {"activation": "silu", "rest": True}
    logits = random(2, 6, seed=1)
    learnt = given[4].clone().requires_grad_()
    asked = [*given[:4], learnt, *given[5:]]
    assert lora_network.OP.choose(None, *given, **how).name == "cpu"
    assert lora_network.OP.choose(None, *asked, **how).name == "reference"
    with pytest.raises(ValueError, match="it has no way back, and a_gate asked for a gradient"):
        lora_network.lora_network(*asked, **how, backend="cpu")
    with torch.no_grad():
        assert lora_network.OP.choose(None, *asked, **how).name == "cpu"
    with FakeTensorMode() as fake, torch.no_grad():
        unreal = [fake.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in given]
        with pytest.raises(ValueError, match="x is a FakeTensor on cpu"):
            lora_network.lora_network(*unreal, **how, backend="cpu")
    mixed = [*given[:4], given[4].bfloat16(), *given[5:]]
    assert lora_network.OP.choose(None, *mixed, **how).name == "reference"
    many = network((PAIRS // 2 + 1, 4, 2, 4, 8, 8))
    with pytest.raises(ValueError, match=f"at most {PAIRS} pairs; here are {PAIRS + 2}"):
        lora_network.lora_network(*many, **how, backend="cpu")
    options = {"bias": None, "real": None, "score": "softmax"}
    assert routing.OP.choose(None, logits, 2, **options).name == "cpu"
    assert routing.OP.choose(None, logits.requires_grad_(), 2, **options).name != "cpu"
    assert routing.OP.choose(None, random(TOKENS + 1, 4, seed=1), 2, **options).name != "cpu"
    mapped = (given[0], given[3], given[4], given[6], given[10])
    weighted = given[3]._replace(weight=given[3].weight.clone().requires_grad_())
    with pytest.raises(ValueError, match="and weight asked for a gradient"):
        lora_experts.lora_experts(mapped[0], weighted, *mapped[2:], backend="cpu")
    found = lora_experts.lora_experts(mapped[0], weighted, *mapped[2:])
    assert found.requires_grad  # another one, as nobody named this one


@torch.no_grad()
@pytest.mark.parametrize("kind", ["double by default", "bfloat16 by default", "another device by default"])
def test_what_torch_makes_by_default_does_not_matter(kind):
    """The kernels write to memory of the size that they know."""
    given, how, logits = network(SIZES[-1]), {"activation": "silu", "rest": True}, random(9, 60, seed=3)
    mapped = (given[0], given[3], given[4], given[6], given[10])

    def run():
        made = routing.route(logits, 8, backend="cpu")
        return [*lora_network.lora_network(*given, **how, backend="cpu"), lora_experts.lora_experts(*mapped, backend="cpu"),
                made.weight, made.expert, made.offsets, made.by_token]  # fmt: skip

    wanted, before = run(), torch.get_default_dtype()
    try:
        if kind == "another device by default":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.float64 if kind.startswith("double") else torch.bfloat16)
        found = run()
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_transforms_of_functions_take_another_one():
    given = network(SIZES[1])
    x, pairs, a, b, scale = given[0], given[3], given[4], given[6], given[10]

    def run(x):
        return lora_experts.lora_experts(x, pairs, a, b, scale)

    true = lora_experts.lora_experts(*wide((x, pairs, a, b, scale)), backend="reference")
    tangent = random(*x.shape, seed=5)
    for found in (torch.func.vmap(run)(x[None])[0], torch.func.jvp(run, (x,), (tangent,))[0], run(x)):
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-5)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(run(forward_ad.make_dual(x.contiguous(), tangent))).tangent
    torch.testing.assert_close(found, run(tangent), rtol=1e-5, atol=1e-5)  # it is linear in x


@torch.no_grad()
def test_an_a_without_its_b_or_its_map_changes_nothing():
    given, how = network((2, 3, 2, 4, 8, 8)), {"activation": "silu", "rest": True}
    without = {"b_gate": 6, "b_up": 7, "b_down": 9}
    for position in without.values():
        lone = [None if at == position else value for at, value in enumerate(given)]
        check(
            lora_network.lora_network(*lone, **how, backend="cpu"),
            lora_network.lora_network(*wide(lone), **how, backend="reference"),
        )
    lone = [None if at == 1 else value for at, value in enumerate(given)]
    check(
        lora_network.lora_network(*lone, **how, backend="cpu"),
        lora_network.lora_network(*wide(lone), **how, backend="reference"),
    )


@torch.no_grad()
def test_one_a_for_all_experts_around_a_network():
    given, how = network((3, 4, 2, 5, 33, 19)), {"activation": "silu", "rest": True}
    given[4], given[5] = given[4][:1], given[5][:1]
    check(
        lora_network.lora_network(*given, **how, backend="cpu"),
        lora_network.lora_network(*wide(given), **how, backend="reference"),
    )


@torch.no_grad()
def test_weights_that_all_vanish_stay_nothing():
    logits = torch.full((2, 4), -200.0)
    for name in ("cpu", "reference"):
        found = routing.route(logits, 2, score="sigmoid", renormalise=True, backend=name)
        assert found.weight.tolist() == [0.0] * 4


def test_masks_are_of_booleans():
    with torch.no_grad(), pytest.raises(ValueError, match=r"real is torch.int64 on cpu"):
        routing.route(torch.zeros(2, 4), 2, real=torch.tensor([1, 1]), backend="cpu")


def test_torch_compile_sees_through_another_one():
    given = [*network(SIZES[1])]

    @torch.compile(fullgraph=True, backend="eager")
    def run(*given):
        return lora_network.lora_network(*given, activation="silu", rest=True)

    with torch.no_grad():
        check(run(*given), lora_network.lora_network(*wide(given), activation="silu", rest=True, backend="reference"))
