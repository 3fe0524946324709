"""GGUF files made with the `gguf` package alone, so that the reader is not tested against our own writer."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, quants

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """The GGUF name of a dense Hugging Face tensor."""
    stem, _, end = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{NAMES[part]}.{end}"
    return f"{NAMES[stem]}.{end}"


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: rows j and j + d/2 of a head become rows 2j and 2j + 1."""
    out, size = np.empty_like(values), len(values) // heads
    for head in range(heads):
        for j in range(size // 2):
            out[head * size + 2 * j] = values[head * size + j]
            out[head * size + 2 * j + 1] = values[head * size + j + size // 2]
    return out


def add(writer: GGUFWriter, key: str, value) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


@pytest.fixture
def make_gguf():
    """Write a model as GGUF. `kind` encodes the matrices. Returns the matrices and vectors that the file now holds."""

    def make(path: Path, model, kind: Kind = Kind.F32, arch: str = "llama", extra: dict | None = None, **metadata):
        config = model.config
        writer = GGUFWriter(path, arch)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        keys = {
            "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_parameters["rope_theta"],
            "attention.key_length": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        }  # fmt: skip
        for key, value in ({f"{arch}.{key}": value for key, value in keys.items()} | metadata).items():
            add(writer, key, value)
        held = {}
        state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
        if config.tie_word_embeddings:
            del state["lm_head.weight"]
        for name, value in state.items():
            stored = Kind.F32 if value.ndim == 1 else kind
            part = name.split(".")[-2]
            moved = interleave(value, heads[part]) if arch == "llama" and part in heads else value
            raw = quants.quantize(moved, stored)
            writer.add_tensor(gguf_name(name), raw, raw_dtype=stored)
            held[name] = quants.dequantize(quants.quantize(value, stored), stored).reshape(value.shape)
        for name, value in (extra or {}).items():
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return held

    return make
