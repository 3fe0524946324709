"""Makes the benchmark's inputs; run in processes of its own, so that the measuring process stays small.

python inputs.py dense GGUF OUT            # the dense model as Hugging Face would hold it, made by transformers
python inputs.py deeper|wider SOURCE OUT   # a synthetic checkpoint about 8 times SOURCE's size, from a fixed seed
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

SEED = 0


def dense(gguf: Path, out: Path) -> None:
    """The bf16 safetensors directory of a GGUF file, through transformers only: no contestant makes its own input."""
    import torch
    import transformers

    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    extra: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep GGUF weights packed unless told otherwise
        extra["quantization_config"] = transformers.GgufConfig(gguf_file=gguf.name, dequantize=True)
    transformers.AutoModelForCausalLM.from_pretrained(**where, **extra, dtype=torch.bfloat16).save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(out)


def grown(config: dict[str, Any], shape: str) -> dict[str, Any]:
    """The config of a checkpoint about 8 times larger: 8 times the layers, or 3 times the width (9 times a layer)."""
    if shape == "deeper":
        return {**config, "num_hidden_layers": config["num_hidden_layers"] * 8}
    wider = {
        name: config[name] * 3
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    }
    return {**config, **wider, "num_hidden_layers": round(config["num_hidden_layers"] * 0.92)}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama checkpoint with tied embeddings."""
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        table |= {
            f"{at}.input_layernorm.weight": (width,), f"{at}.post_attention_layernorm.weight": (width,),
            f"{at}.self_attn.q_proj.weight": (queries, width), f"{at}.self_attn.o_proj.weight": (width, queries),
            f"{at}.self_attn.k_proj.weight": (keys, width), f"{at}.self_attn.v_proj.weight": (keys, width),
            f"{at}.mlp.gate_proj.weight": (inner, width), f"{at}.mlp.up_proj.weight": (inner, width),
            f"{at}.mlp.down_proj.weight": (width, inner),
        }  # fmt: skip
    return table | {"model.norm.weight": (width,)}


def synthetic(shape: str, source: Path, out: Path) -> None:
    """Writes it tensor by tensor: normal values of deviation 0.02, cut to bfloat16; one shard per 2 GB."""
    import numpy as np

    config = grown(json.loads((source / "config.json").read_text()), shape)
    out.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            (out / file.name).write_bytes(file.read_bytes())
    (out / "config.json").write_text(json.dumps(config, indent=2))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, dims in shapes(config).items():
        if sum(2 * int(np.prod(d)) for d in shards[-1].values()) > 2e9:
            shards.append({})
        shards[-1][name] = dims
    weight_map = {}
    draw = np.random.default_rng(SEED)
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {}, 0
        for name, dims in shard.items():
            end = offset + 2 * int(np.prod(dims))
            header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, end]}
            offset, weight_map[name] = end, file
        head = json.dumps(header).encode()
        with open(out / file, "wb") as stream:
            stream.write(struct.pack("<Q", len(head)) + head)
            for dims in shard.values():
                values = draw.standard_normal(dims, dtype=np.float32) * np.float32(0.02) + (len(dims) == 1)
                stream.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    index = {
        "metadata": {"total_size": sum(2 * int(np.prod(d)) for d in shapes(config).values())},
        "weight_map": weight_map,
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    kind, first, second = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    dense(first, second) if kind == "dense" else synthetic(kind, first, second)
