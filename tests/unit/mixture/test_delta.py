"""Deltas over a shared base against the loop that gives every expert a whole network of its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeforge.errors import BadInput
from moeforge.mixture.config import ExpertsConfig, RouterConfig
from moeforge.mixture.experts.base import Place
from moeforge.mixture.experts.delta import DeltaExperts
from moeforge.mixture.experts.ffn import FFNExperts
from moeforge.mixture.layer import MixtureLayer
from moeforge.mixture.router import Router
from moeforge_kernels.activations import activation

D, WIDE, E, R = 10, 14, 5, 3
FUSED = {"gate_up": "gate_up_proj", "down": "down_proj"}


def make(dtype=torch.float64, **options):
    torch.manual_seed(1)
    experts = DeltaExperts(E, D, WIDE, rank=R, alpha=5.0, **options).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.4)
    return experts


def whole(experts, e):
    """Expert e's full matrices (up, up bias, down, down bias)."""
    s, parts = 5.0 / R, len(experts.inner)
    a, b = experts.up_lora_A[e].chunk(parts), experts.up_lora_B[e].chunk(parts)
    up = experts.base_up_proj + s * torch.cat([y @ x for x, y in zip(a, b, strict=True)])
    down = experts.base_down_proj + s * experts.down_lora_B[e] @ experts.down_lora_A[e]
    return up, experts.base_up_proj_bias, down, experts.base_down_proj_bias


def naive(experts, x, gates):
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for e in range(E):
            if gates[t, e] == 0:
                continue
            up, up_bias, down, down_bias = whole(experts, e)
            hidden = F.linear(x[t], up, up_bias)
            if experts.gated:
                gate, value = hidden.chunk(2)
                hidden = activation(experts.activation)(gate) * value
            else:
                hidden = activation(experts.activation)(hidden)
            out = out.index_add(0, torch.tensor([t]), (gates[t, e] * F.linear(hidden, down, down_bias))[None])
    return out


KINDS = {
    "llama": {}, "biased": {"bias": True}, "gpt2": {"gated": False, "activation": "gelu_new", "bias": True},
    "fused": {"names": FUSED},
}  # fmt: skip
POLICIES = {
    "topk": {"top_k": 2, "init_std": 1.0}, "not to one": {"top_k": 3, "renormalise": False, "init_std": 1.0},
    "expert choice": {"select": "expert_choice", "top_k": 2, "causal": False, "renormalise": False, "init_std": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_base_for_all_is_a_network_each_gradients_included(kind, policy):
    experts = make(**KINDS[kind])
    assert not any(p.requires_grad for name, p in experts.named_parameters() if name.startswith("base"))
    experts.requires_grad_(True)  # so that the identities are seen to hold for the base as well
    router = Router(RouterConfig(**POLICIES[policy]), D, E).double()
    real = torch.arange(9) != 4
    x = torch.randn(9, D, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(9, D, dtype=torch.float64)
    inputs = [x, router.weight, *experts.parameters()]
    pairs = router(x, real=real).pairs
    found = experts(x, pairs)
    gradients = torch.autograd.grad((found * upstream).sum(), inputs)
    expected = naive(experts, x, router(x, real=real).pairs.gates())
    wanted = torch.autograd.grad((expected * upstream).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert not found[4].any()
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        assert other.abs().max() > 0


def test_no_delta_is_the_base_for_weights_that_add_up_to_one():
    experts = DeltaExperts(E, D, WIDE, rank=R, alpha=5.0, bias=True)
    experts.reset_parameters(0.3)
    nn.init.normal_(experts.base_up_proj_bias)
    nn.init.normal_(experts.base_down_proj_bias)
    x = torch.randn(20, D)
    layer = MixtureLayer(Router(RouterConfig(top_k=2), D, E), experts)
    gate, value = F.linear(x, experts.base_up_proj, experts.base_up_proj_bias).chunk(2, -1)
    dense = F.linear(F.silu(gate) * value, experts.base_down_proj, experts.base_down_proj_bias)
    torch.testing.assert_close(layer(x), dense, rtol=1e-5, atol=1e-6)
    layer(x).sum().backward()
    assert experts.up_lora_B.grad.abs().max() > 0 and experts.base_up_proj.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    experts = make(dtype, bias=True)
    wide = make(torch.float64, bias=True)
    wide.load_state_dict(experts.state_dict())
    x = torch.randn(40, D).to(dtype)
    pairs = Router(RouterConfig(top_k=2, init_std=1.0), D, E)(x).pairs
    found, expected = experts(x, pairs), wide(x.double(), pairs)
    assert found.dtype == dtype
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_says_where_it_lies_on_disk(kind):
    experts = make(**KINDS[kind])
    stored = experts.stored()
    parameters = dict(experts.named_parameters())
    assert set(stored) == set(parameters)
    for name, where in stored.items():
        shape = parameters[name].shape
        assert sum(where.rows) == shape[0 if where.shared else 1]
        assert where.shared is name.startswith("base")
    names = [part for where in stored.values() for part in where.parts]
    assert len(set(names)) == len(names)
    if kind == "llama":
        assert stored["base_up_proj"].parts == ("gate_proj.weight", "up_proj.weight")
        assert stored["up_lora_A"].parts == ("gate_proj.lora_A.weight", "up_proj.lora_A.weight")
        assert stored["up_lora_A"].rows == (R, R)
    if kind == "fused":
        assert stored["up_lora_B"].parts == ("gate_up_proj.lora_B.weight",)


def test_built_from_an_entry():
    place = Place(D, D, {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})
    config = ExpertsConfig(type="delta", count=E, width=WIDE, options={"rank": 2, "alpha": 6})
    experts = DeltaExperts.at(place, config)
    assert (experts.rank, experts.scale) == (2, 3.0)
    for options, message in (
        ({"ranks": 2}, "options.ranks is not known"),
        ({"rank": 1.5}, "options.rank = 1.5"),
        ({"alpha": -1}, "alpha = -1"),
    ):
        with pytest.raises(BadInput, match=message):
            DeltaExperts.at(place, ExpertsConfig(type="delta", count=E, width=WIDE, options=options))


def test_the_base_is_held_once():
    many, one = DeltaExperts(16, D, WIDE, rank=R, alpha=1.0), DeltaExperts(1, D, WIDE, rank=R, alpha=1.0)
    shared = sum(p.numel() for name, p in many.named_parameters() if name.startswith("base"))
    assert shared == 3 * D * WIDE == sum(p.numel() for name, p in one.named_parameters() if name.startswith("base"))
    full = sum(p.numel() for p in FFNExperts(16, D, WIDE).parameters())
    assert full == 16 * shared
