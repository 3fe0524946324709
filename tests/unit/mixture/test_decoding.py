"""A decoding step takes shorter ways: what they answer is what the long ones do."""

import pytest
import torch

from moeforge.mixture.always import KEPT, Always
from moeforge.mixture.config import RouterConfig
from moeforge.mixture.experts.low_rank import Scales
from moeforge.mixture.router import Router
from moeforge_kernels.cpu import library
from moeforge_kernels.dispatch import using
from moeforge_kernels.routing import OP

CONFIGS = {
    "mixtral": {"order": "select_score"},
    "qwen": {"order": "score_select", "renormalise": False},
    "renormalised": {"order": "score_select", "renormalise": True},
    "deepseek": {"score": "sigmoid", "bias": True, "renormalise": True, "factor": 2.5},
    "hot": {"temperature": 2.0},
    "straight": {"gate_scale": "straight_through"},
    "null": {"null_experts": 2},
    "groups": {"groups": 2, "top_groups": 1},
    "labels": {"by_label": (2, 4)},
    "capacity": {"capacity_factor": 1.0},
    "noisy": {"noise": "gumbel", "noise_scale": 0.5},
}


def router(**options):
    made = Router(RouterConfig(top_k=2, **options), 12, 6)
    torch.nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(1))
    if made.selection_bias is not None:
        made.selection_bias.normal_(generator=torch.Generator().manual_seed(2))
    return made.eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_router_without_gradients_chooses_as_it_does_with_them(name, tokens):
    made = router(**CONFIGS[name])
    x = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(3))
    real = torch.arange(tokens) % 4 != 1
    how = {"real": real, "labels": torch.arange(tokens) % 2}
    long = made(x, **how)
    assert long.pairs.weight.requires_grad
    with torch.no_grad():
        short = made(x, **how)
    assert short.pairs.tokens == long.pairs.tokens and short.pairs.slots == long.pairs.slots
    for part in ("token", "expert", "offsets", "by_token"):
        assert torch.equal(getattr(short.pairs, part), getattr(long.pairs, part))
    torch.testing.assert_close(short.pairs.weight, long.pairs.weight.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(short.probabilities, long.probabilities.detach())


@pytest.mark.skipif(library.lacks(False) is not None, reason=str(library.lacks(False)))
@pytest.mark.parametrize("name", CONFIGS)
def test_which_policies_take_the_short_way(name, monkeypatch):
    """Those that the compiled call knows; and no other, whose choice it would get wrong."""
    asked = []
    plain = OP.backends["cpu"].function
    monkeypatch.setitem(OP.backends["cpu"].__dict__, "function", lambda *args, **how: asked.append(how) or plain(*args, **how))  # fmt: skip
    with torch.no_grad():
        router(**CONFIGS[name])(torch.randn(1, 12), labels=torch.zeros(1, dtype=torch.long))
    known = ("mixtral", "qwen", "renormalised", "deepseek", "hot", "noisy")
    assert len(asked) == (name in known)


ODD = {
    "nothing is likely": ({"score": "sigmoid", "renormalise": True}, -200.0, 0.0),
    "no number": ({"order": "select_score"}, torch.nan, 0.0),
    "never": ({"order": "select_score"}, -torch.inf, 0.0),
    "switched off": ({"score": "sigmoid", "bias": True, "renormalise": True}, 0.0, -torch.inf),
}
"""Config, what most logits are, what is added to the choice of all experts but one."""


@pytest.mark.parametrize("name", ODD)
def test_odd_logits_lead_to_the_same_place_without_gradients(name, monkeypatch):
    options, value, bias = ODD[name]
    made = router(**options)
    if made.selection_bias is not None:
        made.selection_bias[1:] = bias
    logits = torch.zeros(2, 6, requires_grad=True) + torch.tensor([0.3, *[value] * 5])
    if name == "nothing is likely":
        logits = logits + value
    monkeypatch.setattr(made, "scores", lambda *_: logits if torch.is_grad_enabled() else logits.detach())
    long = made(torch.zeros(2, 12)).pairs
    with torch.no_grad():
        short = made(torch.zeros(2, 12)).pairs
    assert torch.equal(short.expert, long.expert) and torch.equal(short.offsets, long.offsets)
    torch.testing.assert_close(short.weight, long.weight.detach(), equal_nan=True)
    if name == "no number":
        assert short.weight.isnan().any(), "what is no number is seen in the answer"


@pytest.mark.parametrize("backend", ["reference", "cpu", "torch"])
def test_a_wish_for_the_ops_is_not_one_for_the_router(backend):
    made, x = router(order="select_score"), torch.randn(3, 12)
    with using(backend):
        found = made(x).pairs
        with torch.no_grad():
            again = made(x).pairs
    assert torch.equal(found.expert, again.expert) and torch.equal(found.weight, again.weight)


def test_a_transform_leaves_nothing_behind():
    always = Always()
    torch.func.grad(lambda x: (always(x).pairs.weight * x.sum(-1)).sum())(torch.zeros(4, 5))
    weight = always(torch.zeros(4, 5)).pairs.weight
    assert (
        type(weight) is torch.Tensor
        and weight.data_ptr()
        and not torch._C._functorch.is_functorch_wrapped_tensor(weight)
    )


def test_the_router_that_decides_nothing_says_it_again():
    always = Always(1, 3)
    for tokens in (1, 4, 1, KEPT, KEPT + 1, 4):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            pairs = always(torch.zeros(tokens, 5, dtype=dtype)).pairs
            assert pairs.token.tolist() == list(range(tokens)) and pairs.expert.tolist() == [1] * tokens
            assert pairs.offsets.tolist() == [0, tokens, tokens] and pairs.tokens == tokens
            assert pairs.weight.tolist() == [1.0] * tokens
            assert pairs.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.inference_mode():
        always(torch.zeros(4, 5))
    weight = always(torch.zeros(4, 5)).pairs.weight
    (
        weight * torch.ones(4, requires_grad=True)
    ).sum().backward()  # a tensor of inference mode could not be kept for this


def test_scales_follow_their_parameters():
    scales = Scales((0.5, 2.0))
    with torch.inference_mode():
        scales.beside(torch.zeros(1))
    for dtype, wanted in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)):  # fmt: skip
        made = scales.beside(torch.zeros(1, dtype=dtype))
        assert made.dtype == wanted and made.tolist() == [0.5, 2.0]
    (scales.beside(torch.zeros(1)) * torch.ones(2, requires_grad=True)).sum().backward()
    assert scales.beside(torch.zeros(1, device="meta")).device.type == "meta"
    assert scales.beside(torch.zeros(1)).tolist() == [0.5, 2.0]
