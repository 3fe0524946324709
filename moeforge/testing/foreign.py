"""Adapters as other programs write them, with random weights: names spelled out here once more, not taken from what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
FIRST = {"gate_proj": "w1_proj", "up_proj": "w3_proj", "down_proj": "w2_proj"}
"""MixLoRA's first names."""


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Projection of a Llama-like layer -> (inputs, outputs)."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    size = config.get("head_dim") or width // config["num_attention_heads"]
    heads, pairs = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    return {"q_proj": (width, heads), "k_proj": (width, pairs), "v_proj": (width, pairs), "o_proj": (heads, width),
            "gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}  # fmt: skip


def base_config(base: Path) -> dict[str, Any]:
    return json.loads((base / "config.json").read_text())


def mixlora(
    base: Path, *, count: int = 3, rank: int = 5, expert_rank: int | None = None, first: bool = False
) -> dict[str, Tensor]:
    """Tensors of MixLoRA's adapter_model.bin."""
    config, made = base_config(base), {}
    for i in range(config["num_hidden_layers"]):
        at = f"mixlora.layers.{i}"
        made[f"{at}.gate.weight" if first else f"{at}.mlp.moe_gate.weight"] = torch.randn(count, config["hidden_size"])
        for name in ATTENTION:
            made |= _pair(f"{at}.self_attn.{name}", shapes(config)[name], rank)
        for name in FFN:
            for e in range(count):
                where = f"{at}.experts.{e}.{FIRST[name]}" if first else f"{at}.mlp.{name}.experts.{e}"
                made |= _pair(where, shapes(config)[name], expert_rank or rank)
    return made


def moe_peft(base: Path, kind: str, *, count: int = 3, rank: int = 5) -> dict[str, Tensor]:
    """Tensors of MoE-PEFT's `mola` or `loramoe`."""
    config, made = base_config(base), {}
    for i in range(config["num_hidden_layers"]):
        for name, shape in shapes(config).items():
            at = f"{kind}.layers.{i}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
            if kind == "loramoe" and name in ATTENTION:
                made |= _pair(at, shape, rank)
                continue
            made[f"{at}.moe_gate.weight"] = torch.randn(count, shape[0])
            for e in range(count):
                made |= _pair(f"{at}.experts.{e}", shape, rank)
    return made


def mola(base: Path, counts: list[int], ranks: list[int]) -> dict[str, Tensor]:
    """Tensors of MoLA's modified PEFT."""
    config, made = base_config(base), {}
    for i, (count, rank) in enumerate(zip(counts, ranks, strict=True)):
        for name, (inputs, outputs) in shapes(config).items():
            at = f"base_model.model.model.layers.{i}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
            made[f"{at}.router.router.weight"] = torch.randn(count, inputs)
            for e in range(count):
                made[f"{at}.lora_A_{e}.weight"] = torch.randn(rank, inputs) / inputs**0.5
                made[f"{at}.lora_B_{e}.weight"] = 0.1 * torch.randn(outputs, rank)
    return made


def _pair(at: str, shape: tuple[int, int], rank: int) -> dict[str, Tensor]:
    return {
        f"{at}.lora_A.weight": torch.randn(rank, shape[0]) / shape[0] ** 0.5,
        f"{at}.lora_B.weight": 0.1 * torch.randn(shape[1], rank),
    }


def mixlora_settings(base: Path, *, count: int = 3, rank: int = 5, **more: Any) -> dict[str, Any]:
    return {"bias": "none", "peft_type": "MIXLORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": rank,
            "lora_alpha": 2 * rank + 1, "lora_dropout": 0.05, "target_modules": [*ATTENTION, *FFN], "routing_strategy": "mixlora",
            "num_experts": count, "top_k": 2, **more}  # fmt: skip


def save(directory: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], *, pickled: bool = False) -> Path:
    """adapter_config.json and adapter_model.bin or .safetensors."""
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    if pickled:
        torch.save(dict(tensors), directory / "adapter_model.bin")
    else:
        save_file(dict(tensors), directory / "adapter_model.safetensors")
    return directory
