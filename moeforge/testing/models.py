"""Tiny random models of every dense family, for tests: real architectures with sizes that run in milliseconds.

Norm weights and biases are perturbed, so that a tensor that is dropped, swapped or left at its initial value shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
"""Odd on purpose: the vocabulary is prime, the FFN is not a power of two, heads share keys and values."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
    },
    "cohere2": {"sliding_window": 8, "num_hidden_layers": 4, "logit_scale": 0.5},
    "ernie4_5": {"head_dim": 16},
    "smollm3": {"no_rope_layer_interval": 1000},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "exaone4": {"sliding_window": 8},
}
"""Model type -> what its tiny config sets beside SIZES, chosen so that the family's own features are at work."""

OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 96},
    "gpt_neox": {"partial_rotary_factor": 0.25},
    "phi": {"partial_rotary_factor": 0.5},
    "falcon": {"ffn_hidden_size": 96, "bias": True},
    "bert": {"pad_token_id": 0, "type_vocab_size": 2},
    "roberta": {"pad_token_id": 1},
    "vit": {"image_size": 16, "patch_size": 4, "num_labels": 5},
    "dinov2": {"image_size": 16, "patch_size": 4, "num_labels": 5, "mlp_ratio": 2},
}
"""The same of families that no native mixture holds and whose blocks are built otherwise: plain FFNs, biases, pixels."""
MIXERS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "falcon_mamba": {"state_size": 4, "time_step_rank": 4},
}
"""The same of state-space models, which have neither attention nor FFN."""
HEADS = {
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "vit": "ViTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
}
"""Model type -> the class of its tiny model, where that is no causal language model."""


def tiny_dense(
    model_type: str, seed: int = 0, head: str | None = None, **overrides: Any
) -> tuple[PreTrainedModel, PretrainedConfig]:
    """A random float32 model of that family, in evaluation mode, and its config; `head`: its class, if not the usual one."""
    from transformers import AutoConfig

    sizes = SIZES
    if model_type not in FAMILIES:  # none of the keys that the family does not have
        known = AutoConfig.for_model(model_type)
        sizes = {key: value for key, value in SIZES.items() if hasattr(known, key)}
    own = {**FAMILIES, **OTHERS, **MIXERS}[model_type]
    config = AutoConfig.for_model(model_type, **{**sizes, **own, **overrides})
    return tiny(config, seed, head or HEADS.get(model_type))


def tiny_llava(seed: int = 0) -> tuple[PreTrainedModel, PretrainedConfig]:
    """A LLaVA of two towers whose images are four patches; token 198 stands for one of them."""
    from transformers import AutoConfig

    towers = {
        "text_config": {"model_type": "llama", **SIZES},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 8, "patch_size": 4,
        },
    }  # fmt: skip
    config = AutoConfig.for_model("llava", **towers, image_token_id=SIZES["vocab_size"] - 1)
    return tiny(config, seed, "LlavaForConditionalGeneration")


def tiny(config: PretrainedConfig, seed: int = 0, head: str | None = None) -> tuple[PreTrainedModel, PretrainedConfig]:
    """A random float32 model of any config, its norms and biases perturbed; `head`: its class, default the causal one."""
    import torch
    import transformers

    torch.manual_seed(seed)
    build = transformers.AutoModelForCausalLM.from_config if head is None else getattr(transformers, head)
    model = build(config).float().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.add_(0.2 * torch.randn_like(value))
            elif not any(part in name for part in ("embed", "wte", "wpe", "lm_head", "classifier", "decoder")):
                value.mul_(4)  # so that attention and FFN weigh as much as the residual stream
    return model, config


def save_tiny(directory: Path, model_type: str, seed: int = 0, head: str | None = None, **overrides: Any) -> Path:
    """The same, written to `directory` as transformers writes it."""
    model, _ = tiny_dense(model_type, seed, head, **overrides)
    model.save_pretrained(directory)
    return directory


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One byte a token, as many as the vocabulary of `SIZES` has room for; 0 starts a text, 1 ends it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: SIZES["vocab_size"] - 2]
    vocab = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(letters)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<s>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
