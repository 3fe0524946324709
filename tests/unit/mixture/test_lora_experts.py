"""Low-rank experts against the loop that gives every expert a whole network, or a whole matrix, of its own; gradients included."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from moeforge.errors import BadInput
from moeforge.mixture.always import Always
from moeforge.mixture.config import ExpertsConfig, RouterConfig
from moeforge.mixture.experts.base import Place
from moeforge.mixture.experts.lora import LoraExperts
from moeforge.mixture.experts.lora_ffn import LoraFFNExperts
from moeforge.mixture.layer import MixtureLayer
from moeforge.mixture.router import Router
from moeforge_kernels.activations import activation

T, D, WIDE, OUT, E, R, ALPHA = 9, 10, 14, 6, 5, 3, 5.0
KINDS = {
    "llama": ({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}, "silu", False),
    "biased": ({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}, "silu", True),
    "plain": ({"up": "fc1", "down": "fc2"}, "gelu_tanh", True),
    "fused": ({"gate_up": "gate_up_proj", "down": "down_proj"}, "silu", False),
}
POLICIES = {
    "topk": {"top_k": 2}, "not to one": {"top_k": 3, "renormalise": False}, "top-p": {"select": "topp", "top_p": 0.4, "renormalise": False},
    "null": {"top_k": 2, "null_experts": 2}, "straight": {"top_k": 1, "renormalise": False, "gate_scale": "straight_through"},
    "expert choice": {"select": "expert_choice", "top_k": 2, "causal": False, "renormalise": False},
}  # fmt: skip


def scatter(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def ffn(kind="llama", dtype=torch.float64, learning_base=True, **options):
    torch.manual_seed(1)
    names, act, bias = KINDS[kind]
    sizes = {role: (D, 2 * WIDE if role == "gate_up" else WIDE) for role in names} | {"down": (WIDE, D)}
    config = ExpertsConfig(type="lora_ffn", count=E, width=WIDE, activation=act, gated="up" not in names or "gate" in names, bias=bias,
                           options={"rank": R, "alpha": ALPHA, **options})  # fmt: skip
    made = LoraFFNExperts.at(Place(D, D, names), config)
    made.adopt({role: (name, nn.Linear(*sizes[role], bias=bias)) for role, name in names.items()}, act)
    scatter(made).to(dtype)
    return made.requires_grad_(True) if learning_base else made


def matrix(experts, base, prefix, e):
    """W + s B A of expert e, and the bias; with magnitudes the paper's m W' / ||W'||."""
    a, b = getattr(experts, f"{prefix}lora_A", None), getattr(experts, f"{prefix}lora_B", None)
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    if b is None:
        return weight, base.bias
    a, b = (value[e] if value.ndim == 3 else value for value in (a, b))
    weight = weight + experts.scales[e] * b @ a
    magnitude = getattr(experts, f"{prefix}magnitude", None)
    if magnitude is not None:
        weight = (magnitude[e] / weight.detach().norm(dim=1))[:, None] * weight
    return weight, base.bias


def network(experts, x, e):
    """f_e(x), or f(x) for e None."""
    act = activation(experts.base.activation)

    def through(role, value):
        base = experts.base.map(role)
        return (
            F.linear(value, base.weight, base.bias)
            if e is None
            else F.linear(value, *matrix(experts, base, f"{role}_", e))
        )

    if "gate_up" in experts.base.paths:
        gate, up = through("gate_up", x).chunk(2, -1)
        return through("down", act(gate) * up)
    if "gate" in experts.base.paths:
        return through("down", act(through("gate", x)) * through("up", x))
    return through("down", act(through("up", x)))


def agree(found, expected, inputs, rtol=1e-9):
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    gradients = torch.autograd.grad((found * upstream).sum(), inputs, retain_graph=True)
    wanted = torch.autograd.grad((expected * upstream).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-11)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-10)
        assert other.abs().max() > 0


@pytest.mark.parametrize("base_weight", ["one", "paper"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_base_for_all_is_a_network_each(kind, policy, base_weight):
    experts = ffn(kind, base_weight=base_weight)
    router = Router(RouterConfig(init_std=1.0, **POLICIES[policy]), D, E).double()
    real = torch.arange(T) != 4
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    found = experts(x, router(x, real=real).pairs)
    gates = router(x, real=real).pairs.gates()
    expected = sum(gates[:, e, None] * network(experts, x, e) for e in range(E))
    if base_weight == "one":
        expected = expected + (1 - gates.sum(-1, keepdim=True)) * network(experts, x, None)
        torch.testing.assert_close(found[4], network(experts, x, None)[4])
    else:
        assert not found[4].any()
    agree(found, expected, [x, router.weight, *experts.parameters()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"dora": True}, {"targets": ["down"]}, {"targets": ["up", "gate_up"]}, {"rslora": True},
                                     {"scales": [0.5, 1.0, -2.0, 0.0, 3.0]}])  # fmt: skip
def test_options_of_a_network(kind, options):
    experts = ffn(kind, **options)
    router = Router(RouterConfig(init_std=1.0, top_k=2), D, E).double()
    x = torch.randn(40, D, dtype=torch.float64, requires_grad=True)
    pairs = router(x).pairs
    expected = sum(pairs.gates()[:, e, None] * network(experts, x, e) for e in range(E))
    agree(experts(x, pairs), expected, [x, *(p for n, p in experts.named_parameters() if "base" not in n)], rtol=1e-7)


def linear(base=None, dtype=torch.float64, count=E, **options):
    torch.manual_seed(2)
    base = base or nn.Linear(D, OUT)
    made = LoraExperts.at(
        Place(D, OUT, {"q": ""}),
        ExpertsConfig(type="lora", count=count, options={"rank": R, "alpha": ALPHA, **options}),
    )
    made.adopt({"q": ("", base)}, None)
    return scatter(made).to(dtype).requires_grad_(True)


@pytest.mark.parametrize(
    "base", [lambda: nn.Linear(D, OUT), lambda: nn.Linear(D, OUT, bias=False), lambda: Conv1D(OUT, D)]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dora": True},
        {"share_a": True},
        {"rslora": True},
        {"ranks": [3, 0, 1, 2, 3]},
        {"scales": [1.0, 2.0, 0.0, -1.0, 0.5]},
    ],
)
@pytest.mark.parametrize("policy", ["topk", "not to one", "null"])
def test_beside_one_map(policy, options, base):
    experts = linear(base(), **options)
    router = Router(RouterConfig(init_std=1.0, **POLICIES[policy]), D, E).double()
    x = torch.randn(40, D, dtype=torch.float64, requires_grad=True)
    pairs = router(x).pairs
    gates, plain = pairs.gates(), experts.base(x)
    expected = plain + sum(
        gates[:, e, None] * (F.linear(x, *matrix(experts, experts.base, "", e)) - plain) for e in range(E)
    )
    agree(
        experts(x, pairs),
        expected,
        [x, *(p for n, p in experts.named_parameters() if not n.startswith("base"))],
        rtol=1e-7,
    )


def test_scales_follow_rank_and_alpha():
    assert linear().scales == (ALPHA / R,) * E
    assert linear(rslora=True).scales == pytest.approx((ALPHA / R**0.5,) * E)
    assert linear(ranks=[3, 0, 1, 2, 3]).scales == pytest.approx((ALPHA / 3, 0, ALPHA, ALPHA / 2, ALPHA / 3))


def test_one_expert_without_a_router_is_plain_lora():
    experts = linear(count=1)
    x = torch.randn(3, 4, D, dtype=torch.float64)
    layer = MixtureLayer(Always(), experts)
    expected = experts.base(x) + ALPHA / R * x @ experts.lora_A.T @ experts.lora_B.T
    torch.testing.assert_close(layer(x), expected)
    assert experts.lora_A.shape == (R, D) and experts.stored()["lora_A"].parts == ("lora_A.weight",)


@pytest.mark.parametrize("make", [ffn, linear])
@pytest.mark.parametrize("dora", [False, True])
def test_they_start_as_the_base(make, dora):
    experts = make(dora=dora)
    experts.reset_parameters(0.3)
    experts.start_magnitudes()
    x = torch.randn(20, D, dtype=torch.float64)
    router = Router(RouterConfig(init_std=1.0, top_k=2), D, E).double()
    base = network(experts, x, None) if make is ffn else experts.base(x)
    torch.testing.assert_close(experts(x, router(x).pairs), base)


def test_the_base_is_adopted_not_copied_and_does_not_learn():
    base = nn.Linear(D, OUT)
    experts = LoraExperts.at(Place(D, OUT, {"q": ""}), ExpertsConfig(type="lora", count=E))
    experts.adopt({"q": ("", base)}, None)
    assert experts.base is base and not any(p.requires_grad for p in base.parameters())
    assert not any(p.requires_grad for n, p in ffn(learning_base=False).named_parameters() if ".base." in f".{n}")
    frozen = LoraExperts.at(Place(D, OUT, {"q": ""}), ExpertsConfig(type="lora", count=E, options={"frozen": True}))
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("make", [ffn, linear])
def test_dropout_acts_in_training_alone_and_is_one_mask_for_all_experts(make):
    experts = make(dropout=0.5)
    x = torch.randn(30, D, dtype=torch.float64)
    pairs = Router(RouterConfig(init_std=1.0, top_k=2), D, E).double()(x).pairs
    experts.eval()
    still = experts(x, pairs)
    torch.testing.assert_close(still, make()(x, pairs))
    experts.train()
    torch.manual_seed(0)
    one = experts(x, pairs)
    assert not torch.allclose(one, still) and not torch.allclose(one, experts(x, pairs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [ffn, linear])
def test_precision(make, dtype):
    experts, wide = make(dtype=dtype), make(dtype=torch.float64)
    wide.load_state_dict(experts.state_dict())
    x = torch.randn(40, D).to(dtype)
    pairs = Router(RouterConfig(top_k=2, init_std=1.0), D, E)(x).pairs
    found, expected = experts(x, pairs), wide(x.double(), pairs)
    assert found.dtype == dtype
    assert ((found - expected).norm() / expected.norm()).item() < {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_says_where_it_lies_on_disk(kind):
    experts = ffn(kind, dora=True)
    stored, parameters = experts.stored(), dict(experts.named_parameters())
    assert set(stored) == set(parameters)
    for name, where in stored.items():
        assert sum(where.rows) == parameters[name].shape[0 if where.shared else 1]
        assert where.shared is name.startswith("base.")
    names = [part for where in stored.values() for part in where.parts]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("options", "message"), [
    ({"width": 2}, "options.width is not known"), ({"rank": 1.5}, "options.rank = 1.5"), ({"rank": 0}, "rank = 0"), ({"alpha": -1}, "alpha = -1"),
    ({"dropout": 1.0}, "dropout = 1.0"), ({"ranks": [1, 2]}, "ranks = "), ({"ranks": [9] * E}, "ranks = "), ({"scales": [1.0]}, "scales = "),
    ({"dora": 1}, "dora = 1"), ({"targets": ["q"]}, "targets"), ({"base_weight": "two"}, "base_weight"),
])  # fmt: skip
def test_options_without_meaning(options, message):
    names, act, _ = KINDS["llama"]
    with pytest.raises(BadInput, match=message):
        LoraFFNExperts.at(
            Place(D, D, names), ExpertsConfig(type="lora_ffn", count=E, width=WIDE, activation=act, options=options)
        )


def test_kinds_stand_where_they_belong():
    with pytest.raises(BadInput, match="they stand at one linear map"):
        LoraExperts.at(Place(D, D, KINDS["llama"][0]), ExpertsConfig(type="lora", count=2))
    with pytest.raises(BadInput, match="the network there has the linear maps q"):
        LoraFFNExperts.at(Place(D, D, {"q": ""}), ExpertsConfig(type="lora_ffn", count=2, width=4))
