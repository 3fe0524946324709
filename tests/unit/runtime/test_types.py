"""Types of numbers: short floats, the one buffer that stays long, a base of 4 bits."""

import pytest
import torch
import transformers

import moeforge
from moeforge.mixture.config import ExpertsConfig, MixtureConfig, RouterConfig

from .conftest import SIZES, WORDS, answer, auto_of, inputs_of, mixed


@pytest.mark.parametrize("how", ["stock", "streamed"])
def test_half_the_memory(how, tmp_path):
    entry = MixtureConfig(experts=ExpertsConfig(count=4), router=RouterConfig(bias=True))
    model = mixed("llama", entry, scatter=0.1)
    for _, layer in model.mixtures.values():
        layer.router.selection_bias.add_(torch.tensor([1e-4, -0.3, 1.0001, 0.0]))
    model.save_pretrained(tmp_path)
    if how == "stock":
        short = auto_of("llama").from_pretrained(tmp_path, dtype=torch.bfloat16)
    else:
        short = moeforge.load(str(tmp_path), dtype="bfloat16")
    assert {value.dtype for value in short.parameters()} == {torch.bfloat16}
    for mount, (_, layer) in short.mixtures.items():
        assert torch.equal(layer.router.selection_bias, model.mixtures[mount][1].router.selection_bias)
        assert layer.router.selection_bias.dtype == torch.float32
    wanted = answer(model, **inputs_of("llama"))
    difference = (answer(short, **inputs_of("llama")) - wanted).abs().max() / wanted.abs().max()
    assert 1e-5 < difference < 0.2


def test_a_base_of_four_bits(tmp_path):
    """Attention and what every token visits are packed; experts and routers are not linear layers and stay."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    sizes = {**SIZES, **WORDS, "hidden_size": 64, "intermediate_size": 96}  # blocks of 64 numbers are packed
    dense = auto_of("llama").from_config(transformers.AutoConfig.for_model("llama", **sizes)).eval()
    entry = MixtureConfig(experts=ExpertsConfig(count=4), shared=ExpertsConfig(width=64))
    model = moeforge.mix(dense, [entry])
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    model.save_pretrained(tmp_path / "long")
    packed = auto_of("llama").from_pretrained(
        tmp_path / "long", dtype=torch.float32, quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True)
    )
    layer = packed.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, bnb.nn.Linear4bit) and isinstance(
        layer.mlp.shared.down_proj, bnb.nn.Linear4bit
    )
    assert torch.equal(layer.mlp.experts.gate_up_proj, model.model.layers[0].mlp.experts.gate_up_proj)
    found = answer(packed, **inputs_of("llama"))
    wanted = answer(model, **inputs_of("llama"))
    assert 1e-4 < (found - wanted).abs().max() / wanted.abs().max() < 0.6
    packed.save_pretrained(tmp_path / "packed")
    again = auto_of("llama").from_pretrained(tmp_path / "packed")
    assert torch.equal(answer(again, **inputs_of("llama")), found)
