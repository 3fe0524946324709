"""The whole FFN shared at half weight beside routed experts at half weight: the layout of Qwen2-MoE without a lost neuron."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from moeforge.errors import UsageProblem
from moeforge.testing import inprocess
from moeforge_upcycle import pairs
from moeforge_upcycle.methods.shared import Options

FAMILIES = ("llama", "qwen2", "qwen3", "granite", "cohere2", "ernie4_5")
CASES = [
    (family, pair.target.model_type) for family in FAMILIES for pair in pairs.load(family)[0] if pair.target.shared
]


def logits(directory):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.randint(0, 199, (2, 30), generator=torch.Generator().manual_seed(7))).logits


def test_every_layout_with_a_shared_expert_is_tried():
    assert {target for _, target in CASES} == {
        "qwen2_moe", "glm4_moe", "dots1", "granitemoeshared", "cohere2_moe", "ernie4_5_moe"
    }  # fmt: skip


@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize(("family", "target"), CASES)
def test_it_is_the_same_function(spoken, tmp_path, family, target, granularity):
    source = spoken(3, family)
    done = inprocess.run("upcycle", source, tmp_path / "out", "shared", fill="half", granularity=granularity, experts=4,
                         top_k=2, target=target, router_std=0.5, verify=False)  # fmt: skip
    assert done.manifest["verdicts"]["exact"] is True
    wanted, found = logits(source), logits(done.path)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


def test_qwen2_moe_holds_the_dense_ffn_and_halves(spoken, tmp_path):
    source = spoken(3, "qwen2")
    done = inprocess.run("upcycle", source, tmp_path / "out", "shared", fill="half", experts=4, target="qwen2_moe",
                         verify=False)  # fmt: skip
    made, dense = load_file(done.path / "model.safetensors"), load_file(source / "model.safetensors")
    for i in range(3):
        layer, down = f"model.layers.{i}.mlp.", dense[f"model.layers.{i}.mlp.down_proj.weight"]
        # a gate of zeros gives the shared expert its half, so its weights are the dense ones
        assert not made[layer + "shared_expert_gate.weight"].any()
        assert np.array_equal(made[layer + "shared_expert.down_proj.weight"], down)
        for expert in range(4):
            assert np.array_equal(made[layer + f"experts.{expert}.down_proj.weight"], down / 2)
            assert np.array_equal(made[layer + f"experts.{expert}.up_proj.weight"], dense[layer + "up_proj.weight"])


@pytest.mark.parametrize(("options", "told"), [({"shared": 2}, "--shared 2"), ({"rank": "norm"}, "--rank norm")])
def test_options_without_effect_are_refused(options, told):
    with pytest.raises(UsageProblem, match=f"{told} has no effect"):
        Options(fill="half", **options)
