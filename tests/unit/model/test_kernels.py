"""Our kernels under transformers' own mixture models: the same logits and gradients as transformers' loop over experts."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

import moeforge
from moeforge.errors import BadInput
from moeforge.model import kernels

BASE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 97, "head_dim": 8, "max_position_embeddings": 64}  # fmt: skip
NATIVE = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "glm4_moe": {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
    "deepseek_v3": {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
                    "n_group": 4, "topk_group": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                    "v_head_dim": 8, "num_key_value_heads": 4},
}  # fmt: skip


def build(kind, **more):
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **{**BASE, **NATIVE.get(kind, {}), **more})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("eager")
    return model


def differentiate(model, ids):
    model.zero_grad()
    logits = model(ids).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", NATIVE)
def test_a_native_model_computes_the_same_through_our_kernels(kind):
    model = build(kind)
    ids = torch.randint(0, 97, (2, 9))
    logits, grads = differentiate(model, ids)
    assert moeforge.use_kernels(model) is model
    assert model.config._experts_implementation == "moeforge"
    ours, our_grads = differentiate(model, ids)
    assert torch.allclose(ours, logits, rtol=1e-5, atol=1e-6)
    # transformers' loop leaves experts without a token without a gradient only if none had one
    assert set(our_grads) == set(grads) and any("gate.weight" in name for name in grads)
    for name, grad in grads.items():
        assert torch.allclose(our_grads[name], grad, rtol=1e-4, atol=1e-7 + 1e-5 * float(grad.abs().max())), name


def test_the_kernels_are_what_runs(monkeypatch):
    model = moeforge.use_kernels(build("mixtral"))
    ran = []
    monkeypatch.setattr(kernels, "expert_ffn", lambda x, pairs, **_: ran.append(pairs) or torch.zeros_like(x))
    model(torch.randint(0, 97, (1, 4)))
    assert len(ran) == 2 and ran[0].tokens == 4


def test_the_choice_is_not_saved_and_can_be_taken_back(tmp_path):
    model = moeforge.use_kernels(build("mixtral"))
    model.save_pretrained(tmp_path)
    assert "moeforge" not in (tmp_path / "config.json").read_text()
    model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "eager"


@pytest.mark.parametrize(("kind", "more", "reason"), [
    ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}, "GptOssExperts.*interleaves the rows of gate and up"),
    ("llama", {}, "LlamaForCausalLM has no experts behind transformers' experts interface"),
])  # fmt: skip
def test_what_computes_something_else_is_refused_with_the_reason(kind, more, reason):
    model = (
        build(kind, **more) if kind != "llama" else AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **BASE))
    )
    with pytest.raises(BadInput, match=reason):
        moeforge.use_kernels(model)
    assert not kernels.use_kernels_where_faster(model)
    assert model.config._experts_implementation != "moeforge"


def experts(gated, transposed, bias, activation="gelu"):
    """A module as transformers' decorator makes them; its weights are random."""
    up = "gate_up_proj" if gated else "up_proj"

    @use_experts_implementation(is_transposed=transposed, has_bias=bias, has_gate=gated)
    class Some(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, rows = 4, 48 if gated else 24
            shape = (4, 16, rows) if transposed else (4, rows, 16)
            self.register_parameter(up, torch.nn.Parameter(torch.randn(shape) / 4))
            self.down_proj = torch.nn.Parameter(torch.randn((4, 24, 16) if transposed else (4, 16, 24)) / 4)
            if bias:
                self.register_parameter(f"{up}_bias", torch.nn.Parameter(torch.randn(4, rows)))
                self.down_proj_bias = torch.nn.Parameter(torch.randn(4, 16))
            self.act_fn = ACT2FN[activation]

        def forward(self, x, index, weight):
            raise NotImplementedError

    return Some(copy.copy(AutoConfig.for_model("mixtral", experts_implementation="grouped_mm")))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_layout_of_transformers_decorator(gated, transposed, bias):
    module = experts(gated, transposed, bias)
    assert kernels.why_not(module) is None
    module._is_expert_parallel = True  # so that transformers' own function knows sentinels, too
    x, weight = torch.randn(7, 16, requires_grad=True), torch.rand(7, 2)
    index = torch.tensor([[0, 1], [1, 4], [4, 4], [3, 0], [0, 3], [1, 3], [3, 4]])
    weight = weight.masked_fill(index == 4, 0).requires_grad_()
    theirs = module(x, index, weight)
    ours = kernels.experts_forward(module, x, index, weight)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    seed = torch.randn_like(theirs)
    leaves = [x, weight, *module.parameters()]
    for a, b in zip(torch.autograd.grad(ours, leaves, seed), torch.autograd.grad(theirs, leaves, seed), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_an_unknown_activation_is_refused():
    assert "an activation that no kernel knows" in str(kernels.why_not(experts(True, False, False, "mish")))


def test_weights_stored_otherwise_are_refused():
    module = experts(True, False, False)
    module.down_proj = torch.nn.Parameter(module.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert kernels.why_not(module) == "stores down_proj as torch.float8_e4m3fn"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_native_model_compiles_without_a_break(dtype):
    model = moeforge.use_kernels(build("qwen3_moe")).to(dtype)
    block = model.model.layers[0].mlp
    x = torch.randn(1, 6, 32, dtype=dtype, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    made, plain = compiled(x), block(x)
    made, plain = (out[0] if isinstance(out, tuple) else out for out in (made, plain))
    assert torch.allclose(
        made, plain, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3 if dtype == torch.bfloat16 else 1e-6
    )
    made.float().square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


def test_by_default_only_where_it_was_measured_to_be_faster(monkeypatch):
    model = build("mixtral")
    monkeypatch.setattr(kernels, "_backend", lambda module: "torch")
    assert not kernels.use_kernels_where_faster(model) and model.config._experts_implementation == "eager"
    monkeypatch.setattr(kernels, "_backend", lambda module: "cpu")
    assert kernels.use_kernels_where_faster(model) and model.config._experts_implementation == "moeforge"
