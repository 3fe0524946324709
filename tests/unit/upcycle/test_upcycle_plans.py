"""What a plan says is what is written: tensors, sizes, advice."""

import numpy as np
import pytest

from moeforge.checkpoint import open_checkpoint
from moeforge.errors import UsageProblem
from moeforge.pipeline.artifact import Artifact
from moeforge.testing import inprocess


def test_a_plan_is_what_is_written(dense, upcycle):
    src = dense("qwen3")
    for method, options in (
        ("copy", {"layers": "0,2"}),
        ("shared", {"rank": "norm", "target": "glm4_moe"}),
        ("split", {}),
    ):
        plan = inprocess.plan("upcycle", src, method, experts=4, **options)
        done = upcycle(src, method, **options)
        with open_checkpoint(str(done.path)) as made:
            assert {info.name: (info.dtype, info.shape) for info in made.tensors.values()} == plan.tensors
            assert made.config == plan.config
        size = sum(info["bytes"] for name, info in done.manifest["files"].items() if name.endswith(".safetensors"))
        assert size == plan.facts["write_bytes"]


def test_a_plan_can_be_planned_upon(dense):
    """The next stage of a dry-run pipe sees a checkpoint without bytes."""
    src = dense("llama")
    with open_checkpoint(str(src)) as checkpoint:
        tensors = {info.name: [info.dtype, list(info.shape)] for info in checkpoint.tensors.values()}
        artifact = Artifact("plan", "-", plan={"verb": "tune", "config": checkpoint.config, "tensors": tensors})
    request = inprocess.request("upcycle", None, {"experts": 4})
    plan = request.stage.plan(artifact, request.options, request.method)
    assert plan.tensors == inprocess.plan("upcycle", src, experts=4).tensors


def test_sizes_of_a_real_model():
    """Qwen3-0.6B with 8 experts and 2 active: 2.45 B parameters, 0.86 B of them active (one FFN set is 264 M)."""
    config = {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    from moeforge.checkpoint.architectures import architecture

    family = architecture(config)
    hidden, ffn = 1024, 3072
    sizes = {"embed": (151936, hidden), "q": (2048, hidden), "k": (1024, hidden), "v": (1024, hidden), "o": (hidden, 2048),
             "gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn), "q_norm": (128,), "k_norm": (128,)}  # fmt: skip
    tensors = {
        part.name: ["BF16", list(sizes.get(role, (hidden,)))]
        for (role, _), part in family.locate(family.resolve(config)).items()
    }
    artifact = Artifact("plan", "-", plan={"verb": "tune", "config": config, "tensors": tensors})
    request = inprocess.request("upcycle", "copy", {})
    facts = request.stage.plan(artifact, request.options, request.method).facts
    before = sum(int(np.prod(shape)) for _, shape in tensors.values())
    assert facts["parameters_total"] == before + 28 * (3 * hidden * ffn * 7 + 8 * hidden)
    assert facts["parameters_active"] == before + 28 * (3 * hidden * ffn * 1 + 8 * hidden)
    assert round(facts["parameters_total"] / 1e9, 2) == 2.45
    assert round(facts["parameters_active"] / 1e9, 2) == 0.86


@pytest.mark.parametrize(
    ("planned", "said"), [("100B", "upcycle; it pays less"), ("4T", "training a mixture from scratch does better")]
)
def test_advice_on_tokens_changes_nothing(planned, said, dense):
    """2 T tokens of a dense model against what the mixture, with about as many active parameters, is to see."""
    plan = inprocess.plan("upcycle", dense("llama"), top_k=1, dense_tokens="2T", planned_tokens=planned)
    assert said in plan.facts["advice"]
    assert "optimiser state" in plan.facts["not_carried"]
    bare = inprocess.plan("upcycle", dense("llama"), top_k=1)
    assert "advice" not in bare.facts
    assert bare.tensors == plan.tensors
    with pytest.raises(UsageProblem, match="go together"):
        inprocess.plan("upcycle", dense("llama"), planned_tokens=planned)
    with pytest.raises(UsageProblem, match="--dense-tokens 'lots': not a number of tokens"):
        inprocess.plan("upcycle", dense("llama"), dense_tokens="lots", planned_tokens=planned)
