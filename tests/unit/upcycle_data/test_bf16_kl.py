"""What rounding every activation to bfloat16 does to a mixture that is exact in float32: recorded, never a gate."""

import pytest
import torch

from moeforge.errors import UsageProblem
from moeforge.model.proof import token_batches
from moeforge.testing import inprocess
from moeforge_upcycle.options import Options


def test_it_is_that_of_the_stock_models(spoken, tmp_path):
    from transformers import AutoModelForCausalLM

    source = spoken(1)
    options = {"experts": 4, "top_k": 2, "granularity": 2, "router_std": 0.5, "verify": True}
    done = inprocess.run("upcycle", source, tmp_path / "out", "split", bf16_kl=True, **options)
    found = done.manifest["verdicts"]["bf16_kl"]
    batches = token_batches({}, 199, 64, 0)
    logits = []
    for directory in (source, done.path):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            logits.append(torch.cat([model(ids).logits[0].double() for ids in batches]))
    p, q = (side.log_softmax(1) for side in logits)
    wanted = float((p.exp() * (p - q)).sum(1).mean())
    assert found > 100 * done.manifest["verdicts"]["measured"]["kl"]
    assert found == pytest.approx(wanted, rel=0.5)
    without = inprocess.run("upcycle", source, tmp_path / "plain", "split", **options)
    assert "bf16_kl" not in without.manifest["verdicts"]


def test_without_a_proof_there_is_none():
    with pytest.raises(UsageProblem, match="--no-verify forbids"):
        Options(bf16_kl=True, verify=False)
