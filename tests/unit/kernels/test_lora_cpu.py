"""The compiled back end of lora_ffn: agreement on widths that cut tiles and parts, determinism, torch.compile, and what it refuses."""

import pytest
import torch

from moeforge_kernels import agreement
from moeforge_kernels.activations import FUNCTIONS
from moeforge_kernels.cpu import library
from moeforge_kernels.lora_ffn import OP, lora_ffn
from moeforge_kernels.pairs import pairs_from_experts, pairs_from_slots

DTYPES = [dtype for dtype in library.DTYPES if library.lacks(dtype == torch.bfloat16, tiles=False) is None]
compiled = pytest.mark.skipif(not DTYPES, reason=f"no compiled kernels here: {library.lacks(False)}")
in_both = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
LIMITS = agreement.LIMITS
NAMES = ("gate", "up", "low_gate", "low_up", "b_gate", "b_up", "a_down", "weight")
SHAPES = {
    "part of a tile": (13, 5, 2, 3, 19),
    "one token": (1, 4, 2, 8, 64),
    "one expert, rank 1": (7, 1, 1, 1, 150),
    "several tiles and blocks": (90, 3, 2, 16, 200),
    "more tiles than parts": (9, 4, 2, 20, 2300),
    "several groups of tokens": (1100, 6, 3, 5, 33),
    "ranks of two kinds of registers": (40, 3, 2, 48, 80),
    "no tokens": (0, 3, 2, 4, 64),
}
"""T, E, K, r, F."""


def tensors(shape, dtype, *, seed=0, sums_to_one=False):
    """(index [T, K], name -> leaf); some slots are empty, and one token has no expert at all, unless the weights are to sum to 1."""
    tokens, experts, slots, rank, ffn = shape
    g = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=g).to(dtype).requires_grad_()

    index = torch.rand(tokens, experts, generator=g).topk(slots).indices
    weight = torch.rand(tokens, slots, generator=g) + 0.1
    if sums_to_one:
        weight = weight / weight.sum(-1, keepdim=True)
    elif tokens > 3:
        index.view(-1)[4::5] = experts
        index[1] = experts
    pairs = tokens * slots
    made = dict(zip(NAMES, (random(tokens, ffn), random(tokens, ffn), random(pairs, rank), random(pairs, rank), random(experts, ffn, rank),
                            random(experts, ffn, rank), random(experts, rank, ffn), weight.requires_grad_()), strict=True))  # fmt: skip
    return index, made


def run(index, given, backend, *, rest=True, activation="silu", without=()):
    """(mixed, low_down) and the gradients of what `given` holds, by name; `without`: names that are None."""
    experts = given["b_up"].shape[0]
    scale = torch.rand(experts, generator=torch.Generator().manual_seed(9)) + 0.5
    pairs = pairs_from_slots(index, given["weight"], experts)
    used = {name: None if name in without else value for name, value in given.items()}
    outs = lora_ffn(used["gate"], used["up"], used["low_gate"], used["low_up"], pairs, used["b_gate"], used["b_up"], used["a_down"], scale,
                    activation=activation, rest=rest, backend=backend)  # fmt: skip
    outs = [out for out in outs if out is not None]
    g = torch.Generator().manual_seed(7)
    towards = [torch.randn(out.shape, generator=g).to(given["up"].dtype).to(out.dtype) for out in outs]
    leaves = [value for value in used.values() if value is not None]
    grads = torch.autograd.grad(outs, leaves, towards, allow_unused=True)
    named = dict(zip((name for name, value in used.items() if value is not None), grads, strict=True))
    return dict(zip(("mixed", "low_down"), outs, strict=False)) | {
        f"gradient of {name}": grad for name, grad in named.items()
    }


def wide(given):
    return {name: value.detach().double().requires_grad_() for name, value in given.items()}


def check(found, true, limit):
    assert found.keys() == true.keys()
    for name, other in true.items():
        one = found[name]
        if other is None:
            assert one is None or not one.any(), name
        elif other.numel():
            assert one.shape == other.shape, name
            error = (one.detach().double() - other.detach()).abs().max() / other.abs().max().clamp_min(1e-30)
            assert error <= limit, (name, float(error))  # a nan fails too


@compiled
@in_both
@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_agrees_with_the_reference(shape, rest, dtype):
    index, given = tensors(SHAPES[shape], dtype, sums_to_one=shape == "several tiles and blocks")
    check(run(index, given, "cpu", rest=rest), run(index, wide(given), "reference", rest=rest), LIMITS[dtype])


@compiled
@in_both
@pytest.mark.parametrize("variant", [name for name, (op, _) in agreement.VARIANTS.items() if op is OP])
def test_it_agrees_on_the_cases_of_every_op(variant, dtype):
    for seed, case in enumerate(agreement.CASES):
        found = agreement.errors(variant, "cpu", dtype, case, seed=seed)
        assert not isinstance(found, str), found
        assert max(found.values()) <= LIMITS[dtype], (case, found)


@compiled
@pytest.mark.parametrize("without", [
    ("gate", "low_gate", "b_gate"), ("low_gate", "b_gate"), ("low_up", "b_up"), ("a_down",), ("low_gate", "b_gate", "low_up", "a_down"),
    ("gate", "low_gate", "b_gate", "a_down"),
], ids=" ".join)  # fmt: skip
def test_maps_without_deltas(without):
    index, given = tensors((30, 4, 2, 6, 90), torch.float32)
    check(run(index, given, "cpu", without=without), run(index, wide(given), "reference", without=without), 1e-5)


@compiled
@in_both
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_every_activation_and_its_slope(activation, dtype):
    index, given = tensors((40, 3, 2, 8, 72), dtype)
    with torch.no_grad():
        for name in ("gate", "up"):
            given[name] *= torch.logspace(-3, 1, 40)[:, None].to(dtype)  # from 0.001 to saturation
    check(
        run(index, given, "cpu", activation=activation),
        run(index, wide(given), "reference", activation=activation),
        LIMITS[dtype],
    )


@compiled
@in_both
def test_slices_of_one_tensor_are_read_in_place(dtype):
    index, given = tensors((20, 3, 2, 8, 72), dtype)
    both = torch.cat((given["gate"], given["up"]), 1).detach()
    b = torch.cat((given["b_gate"], given["b_up"]), 1).detach()
    cut = {"gate": both[:, :72], "up": both[:, 72:], "b_gate": b[:, :72], "b_up": b[:, 72:]}
    turned = given["a_down"].detach().transpose(1, 2).contiguous().transpose(1, 2)
    views = given | {name: part.requires_grad_() for name, part in (cut | {"a_down": turned}).items()}
    assert not views["gate"].is_contiguous() and views["a_down"].stride(-1) != 1
    found, expected = run(index, views, "cpu"), run(index, given, "cpu")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@compiled
@in_both
def test_frozen_maps_of_one_type_and_deltas_of_another(dtype):
    index, given = tensors((20, 3, 2, 8, 72), dtype)
    other = torch.bfloat16 if dtype is torch.float32 else torch.float32
    if other not in DTYPES:
        pytest.skip("one type only here")
    given |= {name: given[name].detach().to(other).requires_grad_() for name in ("b_gate", "b_up", "a_down")}
    found = run(index, given, "cpu")
    assert found["gradient of b_up"].dtype == other and found["gradient of up"].dtype == dtype
    check(found, run(index, wide(given), "reference"), 2e-2)


@compiled
@in_both
def test_the_same_bits_whatever_the_number_of_threads(dtype):
    index, given = tensors((700, 6, 2, 16, 900), dtype)
    here = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(index, given, "cpu")
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            found = run(index, given, "cpu")
            assert all(torch.equal(found[name], value) for name, value in expected.items()), threads
    finally:
        torch.set_num_threads(here)


@compiled
def test_experts_that_choose_tokens_and_rows_that_nobody_is_to_read():
    tokens, experts, places, ffn = 23, 4, 7, 70
    g = torch.Generator().manual_seed(3)
    index = torch.rand(experts, tokens, generator=g).topk(places).indices
    index[:, -1] = tokens
    pairs = pairs_from_experts(index, torch.rand(experts, places, generator=g), tokens)
    real = int(pairs.offsets[-1])
    gate, up, low = torch.randn(tokens, ffn), torch.randn(tokens, ffn), torch.randn(experts * places, 5)
    b, a, scale = torch.randn(experts, ffn, 5), torch.randn(experts, 5, ffn), torch.ones(experts)

    def answers(low, backend):
        return lora_ffn(gate, up, low, low, pairs, b, b, a, scale, activation="gelu", rest=True, backend=backend)

    mixed, low_down = answers(torch.where(torch.arange(len(low))[:, None] < real, low, torch.nan), "cpu")
    expected, expected_low = answers(low, "reference")
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(low_down, expected_low, rtol=1e-5, atol=1e-4)
    assert real < len(low) and not low_down[real:].any() and low_down[:real].abs().max() > 0


@compiled
def test_only_what_is_asked_for_gets_a_gradient():
    index, given = tensors((50, 3, 2, 6, 90), torch.float32)
    expected = run(index, given, "cpu")
    for name in NAMES:
        alone = {key: value.detach().requires_grad_(key == name) for key, value in given.items()}
        pairs = pairs_from_slots(index, alone["weight"], 3)
        scale = torch.rand(3, generator=torch.Generator().manual_seed(9)) + 0.5
        outs = lora_ffn(alone["gate"], alone["up"], alone["low_gate"], alone["low_up"], pairs, alone["b_gate"], alone["b_up"],
                        alone["a_down"], scale, activation="silu", rest=True, backend="cpu")  # fmt: skip
        g = torch.Generator().manual_seed(7)
        (found,) = torch.autograd.grad(outs, alone[name], [torch.randn(out.shape, generator=g) for out in outs])
        assert torch.equal(found, expected[f"gradient of {name}"]), name


@compiled
def test_nothing_comes_back_through_an_answer_that_nobody_used():
    index, given = tensors((30, 3, 2, 6, 90), torch.float32)

    def first(backend, given):
        pairs = pairs_from_slots(index, given["weight"], 3)
        mixed, _ = lora_ffn(given["gate"], given["up"], given["low_gate"], given["low_up"], pairs, given["b_gate"], given["b_up"],
                            given["a_down"], torch.ones(3), activation="silu", rest=True, backend=backend)  # fmt: skip
        towards = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(7)).to(mixed.dtype)
        return dict(
            zip(NAMES, torch.autograd.grad(mixed, list(given.values()), towards, allow_unused=True), strict=True)
        )

    found = first("cpu", given)
    assert not found["a_down"].any()
    check(found, first("reference", wide(given)), 1e-5)


@compiled
def test_it_is_one_node_each_way_to_torch_compile():
    index, given = tensors((33, 4, 2, 8, 70), torch.float32)

    def loss(gate, up, low, b_gate, b_up, a, weight):
        pairs = pairs_from_slots(index, weight, 4)
        mixed, low_down = lora_ffn(
            gate.sin(), up, low, low, pairs, b_gate, b_up, a, torch.ones(4), activation="silu", rest=True
        )
        return mixed.square().mean() + low_down.sum()

    leaves = [given[name] for name in ("gate", "up", "low_up", "b_gate", "b_up", "a_down", "weight")]
    plain = loss(*leaves)
    whole = torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(whole, plain)
    for one, other in zip(torch.autograd.grad(whole, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@compiled
def test_it_is_what_a_processor_takes_and_what_it_refuses():
    index, given = tensors((5, 3, 2, 4, 20), torch.float32)
    pairs = pairs_from_slots(index, given["weight"], 3)

    def choose(**changed):
        now = given | changed
        order = (
            now["gate"],
            now["up"],
            now["low_gate"],
            now["low_up"],
            pairs,
            now["b_gate"],
            now["b_up"],
            now["a_down"],
            torch.ones(3),
        )
        return OP.choose(None, *order).name, OP.backends["cpu"].why_not(*order)

    assert choose() == ("cpu", None)
    name, reason = choose(up=given["up"].double())
    assert name == "blocked" and "up is torch.float64, gate torch.float32" in reason
    name, reason = choose(a_down=given["a_down"].detach()[:, :3])
    assert name == "blocked" and "one rank for all maps; here are 3, 4" in reason
