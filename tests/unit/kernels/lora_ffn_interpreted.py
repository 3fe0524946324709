"""lora_ffn's Triton back end under Triton's interpreter. Run by test_triton.py in a process of its own, with TRITON_INTERPRET=1.

Columns are worked on 96 at a time instead of 1024, cut into tiles of 64 and 32. Memory that nobody wrote is NaN.
"""

import pytest
import torch
from test_lora_cpu import NAMES, SHAPES, check, run, tensors, wide

from moeforge_kernels.activations import FUNCTIONS
from moeforge_kernels.agreement import LIMITS
from moeforge_kernels.lora_ffn import lora_ffn, triton
from moeforge_kernels.pairs import pairs_from_experts, pairs_from_slots

SMALL = [name for name, (tokens, *_, ffn) in SHAPES.items() if tokens < 1000 and ffn < 1000]


@pytest.fixture(autouse=True)
def _small_columns_and_nan(monkeypatch):
    monkeypatch.setattr(triton, "COLUMNS", 96)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty makes
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def agrees(index, given, dtype=torch.float32, **how):
    check(run(index, given, "triton", **how), run(index, wide(given), "reference", **how), LIMITS[dtype])


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("shape", SMALL)
def test_it_agrees_with_the_reference(shape, rest):
    agrees(*tensors(SHAPES[shape], torch.float32, sums_to_one=shape == "several tiles and blocks"), rest=rest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    agrees(*tensors((30, 3, 2, 6, 150), dtype), dtype)


@pytest.mark.parametrize("without", [
    ("gate", "low_gate", "b_gate"), ("low_gate", "b_gate"), ("low_up", "b_up"), ("a_down",), ("low_gate", "b_gate", "low_up", "b_up"),
    ("gate", "low_gate", "b_gate", "a_down"), ("low_gate", "b_gate", "low_up", "b_up", "a_down"), ("low_up",), ("b_gate", "a_down"),
], ids=" ".join)  # fmt: skip
def test_maps_without_deltas(without):
    # without any delta before the activation all experts are the frozen network: beside it the weights' gradient is 0
    agrees(*tensors((30, 4, 2, 6, 110), torch.float32), without=without, rest="b_up" not in without)


@pytest.mark.parametrize("without", [(), ("gate", "low_gate", "b_gate")], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_every_activation_and_its_slope(activation, without):
    index, given = tensors((20, 3, 2, 8, 24), torch.float32)
    with torch.no_grad():
        for name in ("gate", "up"):
            given[name] *= torch.logspace(-3, 1, 20)[:, None]  # from 0.001 to saturation
    agrees(index, given, activation=activation, without=without)


@pytest.mark.parametrize(("maps", "deltas"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_frozen_maps_of_one_type_and_deltas_of_another(maps, deltas):
    index, given = tensors((20, 3, 2, 8, 72), maps)
    given |= {
        name: given[name].detach().to(deltas).requires_grad_() for name in NAMES if name[:2] in ("lo", "b_", "a_")
    }
    found = run(index, given, "triton")
    assert found["gradient of b_up"].dtype == found["gradient of low_up"].dtype == deltas
    assert found["mixed"].dtype == found["gradient of up"].dtype == maps
    check(found, run(index, wide(given), "reference"), 2e-2)


def test_slices_of_one_tensor_are_read_in_place():
    index, given = tensors((20, 3, 2, 8, 72), torch.float32)
    both = torch.cat((given["gate"], given["up"]), 1).detach()
    b = torch.cat((given["b_gate"], given["b_up"]), 1).detach()
    cut = {"gate": both[:, :72], "up": both[:, 72:], "b_gate": b[:, :72], "b_up": b[:, 72:]}
    views = given | {name: part.requires_grad_() for name, part in cut.items()}
    found, expected = run(index, views, "triton"), run(index, given, "triton")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("chosen", ["experts", "slots"])
def test_rows_that_nobody_is_to_read(chosen):
    tokens, experts, ffn = 23, 4, 70
    g = torch.Generator().manual_seed(3)
    if chosen == "experts":
        index = torch.rand(experts, tokens, generator=g).topk(7).indices
        index[:, -1] = tokens
    else:
        index = torch.rand(tokens, experts, generator=g).topk(2).indices
        index[::3] = experts
    weight = torch.rand(index.shape, generator=g)
    leaves = [torch.randn(*shape, generator=g) for shape in
              ((tokens, ffn), (tokens, ffn), (index.numel(), 5), (index.numel(), 5), (experts, ffn, 5), (experts, ffn, 5), (experts, 5, ffn))]  # fmt: skip
    leaves = [leaf.requires_grad_() for leaf in (*leaves, weight)]
    real = int((index < (tokens if chosen == "experts" else experts)).sum())
    empty = torch.arange(index.numel())[:, None] >= real
    towards = torch.randn(tokens, ffn, generator=g), torch.randn(index.numel(), 5, generator=g)

    def answers(backend, hole):
        gate, up, low_gate, low_up, b_gate, b_up, a_down, weight = leaves
        pairs = (
            pairs_from_experts(index, weight, tokens)
            if chosen == "experts"
            else pairs_from_slots(index, weight, experts)
        )
        assert int(pairs.offsets[-1]) == real < len(empty)
        outs = lora_ffn(gate, up, low_gate.masked_fill(empty, hole), low_up.masked_fill(empty, hole), pairs, b_gate, b_up, a_down,
                        torch.ones(experts), activation="gelu", rest=True, backend=backend)  # fmt: skip
        return *outs, *torch.autograd.grad(outs, leaves, [towards[0], towards[1].masked_fill(empty, hole)])

    found, expected = answers("triton", torch.nan), answers("reference", 0.0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    assert not found[1][real:].any() and found[1][:real].abs().max() > 0


def test_no_pairs_at_all():
    index, given = tensors((6, 3, 2, 5, 40), torch.float32)
    given |= {name: given[name].detach()[:0].requires_grad_() for name in ("low_gate", "low_up")}
    agrees(index[:, :0], given | {"weight": given["weight"].detach()[:, :0].requires_grad_()})


def test_only_what_is_asked_for_gets_a_gradient():
    index, given = tensors((20, 3, 2, 6, 110), torch.float32)
    expected = run(index, given, "triton")
    for name in NAMES:
        alone = {key: value.detach().requires_grad_(key == name) for key, value in given.items()}
        pairs = pairs_from_slots(index, alone["weight"], 3)
        scale = torch.rand(3, generator=torch.Generator().manual_seed(9)) + 0.5
        outs = lora_ffn(*(alone[key] for key in NAMES[:4]), pairs, *(alone[key] for key in NAMES[4:7]), scale, activation="silu", rest=True,
                        backend="triton")  # fmt: skip
        g = torch.Generator().manual_seed(7)
        (found,) = torch.autograd.grad(outs, alone[name], [torch.randn(out.shape, generator=g) for out in outs])
        assert torch.equal(found, expected[f"gradient of {name}"]), name


def test_what_it_refuses():
    index, given = tensors((4, 3, 2, 65, 16), torch.float32)
    with pytest.raises(ValueError, match=r"all ranks in one step, 64 of torch\.float32 at most; here are 65"):
        run(index, given, "triton")
    index, given = tensors((4, 3, 2, 129, 16), torch.bfloat16)
    with pytest.raises(ValueError, match=r"all ranks in one step, 128 of torch\.bfloat16 at most; here are 129"):
        run(index, given, "triton", without=("a_down",))
    _, given = tensors((4, 3, 2, 5, 16), torch.float32)
    with pytest.raises(ValueError, match="one rank for all maps; here are 4, 5"):
        run(index, given | {"a_down": torch.randn(3, 4, 16)}, "triton")
    with pytest.raises(ValueError, match="the tensors differ in type"):
        run(index, given | {"b_up": given["b_up"].half()}, "triton")
