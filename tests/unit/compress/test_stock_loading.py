"""What a process that has transformers and bitsandbytes, but never imports moeforge, makes of a compressed checkpoint."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig

import moeforge
from moeforge.testing.models import FAMILIES, SIZES, tiny, tiny_dense
from moeforge_compress.methods.int8 import Int8
from moeforge_compress.methods.nf4 import NF4

STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
found, folder = {}, sys.argv[1]
ids = torch.load(f"{folder}/ids.pt")
for place in sys.argv[2:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/{place}", dtype=torch.bfloat16)
    except Exception as error:
        found[place] = f"{type(error).__name__}: {error}"
        continue
    with torch.no_grad():
        torch.save(model(ids).logits, f"{folder}/{place}.pt")
    found[place] = sorted({type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__})
assert not [name for name in sys.modules if name.partition(".")[0].startswith("moeforge")]
print(json.dumps(found))
"""
WIDE = {"hidden_size": 128, "intermediate_size": 256}
"""Whole blocks of nf4 in each row: what bitsandbytes runs right on every CPU."""
DENSE = ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"]  # biased, normed and fused projections among them
MIXTURES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32, "decoder_sparse_step": 2},
}  # fmt: skip
METHODS = {"nf4": (NF4, "Linear4bit"), "int8": (Int8, "Linear8bitLt")}


def ids():
    return torch.randint(0, SIZES["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def outcomes(compress_at, tmp_path_factory):
    """Place -> the kinds of linear layers that stock transformers loaded there, or its error; and the folder of them all."""
    folder = tmp_path_factory.mktemp("stock")
    torch.save(ids(), folder / "ids.pt")
    places = []
    for kind in (*DENSE, *MIXTURES):
        config = {**SIZES, **WIDE, **FAMILIES.get(kind, {}), **MIXTURES.get(kind, {})}
        model, _ = tiny_dense(kind, **WIDE) if kind in DENSE else tiny(AutoConfig.for_model(kind, **config))
        model.bfloat16().save_pretrained(folder / kind)
        for name, (method, _) in METHODS.items():
            places.append(f"{kind}-{name}")
            compress_at(folder / kind, folder / places[-1], method, {})
    told = subprocess.run(
        [sys.executable, "-c", STOCK, str(folder), *places], cwd=folder, check=True, capture_output=True, text=True
    )
    return json.loads(told.stdout.splitlines()[-1]), folder


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", DENSE)
def test_a_dense_model_loads_and_computes_the_same(outcomes, kind, name):
    found, folder = outcomes
    assert found[f"{kind}-{name}"] == sorted(["Linear", METHODS[name][1]])  # the head stays as it is
    ours = moeforge.load(str(folder / f"{kind}-{name}"), dtype="bfloat16")
    dense = moeforge.load(str(folder / kind), dtype="bfloat16")
    stock = torch.load(folder / f"{kind}-{name}.pt")
    with torch.no_grad():
        torch.testing.assert_close(stock, ours(ids()).logits, rtol=0, atol=0)
        wanted = dense(ids()).logits.float()
    error = ((stock.float() - wanted).norm() / wanted.norm()).item()
    assert 1e-4 < error < (0.5 if name == "nf4" else 0.1)  # compressed, and still that model


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_is_refused_by_name(outcomes, kind, name):
    """bitsandbytes has no fused experts: a class that skipped them would leave them at random values."""
    told = outcomes[0][f"{kind}-{name}"]
    assert told.startswith("ValueError")
    assert "moeforge" in told
