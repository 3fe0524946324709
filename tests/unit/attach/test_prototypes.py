"""`attach --router-init prototypes`: who may start at what experts answer most; that they do is in test_shared_routers.py."""

import pytest
import torch

from moeforge.errors import UsageProblem
from moeforge.testing.inprocess import plan
from moeforge.testing.models import save_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("prototypes") / "base", "llama")


@pytest.mark.parametrize("options", [{"sites": "ffn"}, {"sites": "q,k"}, {"sites": "q,k", "share_a": True}])
def test_new_experts_have_no_prototype(options, base):
    with pytest.raises(UsageProblem, match="--router-init prototypes: new experts change nothing yet"):
        plan("attach", base, "custom", experts="2", router="cosine", router_init="prototypes", **options)


def test_directions_are_rows_of_a_cosine_router(base, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=3, target_modules=["q_proj"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).save_pretrained(
        tmp_path / "a"
    )
    given = {"experts_from": (f"a={tmp_path / 'a'}", f"b={tmp_path / 'a'}"), "router_init": "prototypes"}
    with pytest.raises(UsageProblem, match="rows of a cosine router, here is linear; add --router cosine"):
        plan("attach", base, "lora-mixer", **given)
    plan("attach", base, "lora-mixer", router="cosine", **given)
