"""The real SmolLM2-135M-Instruct as GGUF, against transformers' own reading of the same file."""

import pytest
import torch

from moeforge.checkpoint.gguf import GGUFCheckpoint
from moeforge.model.weights import to_torch
from moeforge.testing.real import smollm2_gguf

SMOL = smollm2_gguf()


@pytest.mark.slow
def test_same_weights_and_config_as_transformers():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(SMOL.parent, gguf_file=SMOL.name, dtype=torch.bfloat16)
    expected = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    with GGUFCheckpoint(SMOL) as source:
        assert set(source.tensors) == set(expected)
        for name, value in expected.items():
            assert torch.equal(to_torch(source.read(name)), value.to(torch.bfloat16)), name
        theirs = model.config.to_dict()
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                    "vocab_size", "max_position_embeddings", "tie_word_embeddings", "rope_parameters", "bos_token_id",
                    "eos_token_id", "attention_bias", "mlp_bias"):  # fmt: skip
            assert source.config[key] == theirs[key], key
        assert source.provenance()["license"] == "apache-2.0"
