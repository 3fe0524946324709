"""Tiny random models of many families, and the same with mixtures."""

import copy
import functools

import pytest
import torch
import transformers

import moeforge
from moeforge.mixture.config import ExpertsConfig, MixtureConfig

SIZES = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
IMAGES = {"image_size": 8, "patch_size": 4}
TEXT = {
    "llama": {"mlp_bias": True, "num_key_value_heads": 2},
    "gemma": {"head_dim": 8, "num_key_value_heads": 2},
    "gemma2": {"head_dim": 8, "num_key_value_heads": 2},
    "gemma3_text": {"head_dim": 8, "num_key_value_heads": 2},
    "smollm3": {"num_key_value_heads": 2, "pad_token_id": None},
    "olmo2": {"num_key_value_heads": 2},
    "phi": {},
    "phi3": {"pad_token_id": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "falcon": {},
    "opt": {"ffn_dim": 44, "word_embed_proj_dim": 32},
}
"""Type -> settings beside SIZES. Biases, one matrix for gate and up, transposed matrices, networks without a gate, parallel blocks."""

ENCODERS = {
    "bert": ("AutoModelForMaskedLM", WORDS),
    "roberta": ("AutoModelForMaskedLM", WORDS),
    "vit": ("AutoModelForImageClassification", IMAGES),
    "dinov2": ("AutoModel", {**IMAGES, "mlp_ratio": 2}),
}
FAMILIES = [*TEXT, *ENCODERS, "llava"]


def config_of(family):
    make = transformers.AutoConfig.for_model
    if family == "llava":
        vision = make("clip_vision_model", **SIZES, **IMAGES)
        return make(
            "llava", text_config=config_of("llama").to_dict(), vision_config=vision.to_dict(), image_token_index=96
        )
    if family in ENCODERS:
        return make(family, **SIZES, **ENCODERS[family][1])
    own = {key: value for key, value in SIZES.items() if family not in ("gpt2",)}
    return make(family, **own, **WORDS, **TEXT[family])


def auto_of(family):
    """The Auto class of a family."""
    if family in ENCODERS:
        return getattr(transformers, ENCODERS[family][0])
    return transformers.AutoModelForImageTextToText if family == "llava" else transformers.AutoModelForCausalLM


@functools.cache
def _built(family):
    torch.manual_seed(sum(map(ord, family)))
    model = auto_of(family).from_config(config_of(family)).float().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model


def dense(family):
    """A random model of a family in evaluation mode: norms and biases are random too. A fresh copy each time."""
    return copy.deepcopy(_built(family))


def inputs_of(family):
    """What its forward takes; two sequences or images."""
    random = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 96, (2, 9), generator=random)
    pixels = torch.randn(2, 3, 8, 8, generator=random)
    if family == "llava":
        ids[:, 2:6] = 96  # the image's four patches
        return {"input_ids": ids, "pixel_values": pixels}
    return {"pixel_values": pixels} if family in ("vit", "dinov2") else {"input_ids": ids}


def answer(model, **inputs):
    """Logits, or hidden states of a model without a head."""
    with torch.no_grad():
        found = model(**inputs)
    return found.logits if "logits" in found else found.last_hidden_state


def mixed(family, entry=None, *, scatter=0.0):
    """The model with mixtures of copied experts; `scatter` makes them differ."""
    model = dense(family)
    torch.manual_seed(1)
    model = moeforge.mix(model, [entry or MixtureConfig(experts=ExpertsConfig(count=4))])
    with torch.no_grad():
        for _, layer in model.mixtures.values():
            for value in layer.parameters():
                value.add_(scatter * torch.randn_like(value))
    return model


@pytest.fixture
def written(tmp_path):
    """Every file below a directory, by name, as bytes."""
    return lambda folder: {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}
