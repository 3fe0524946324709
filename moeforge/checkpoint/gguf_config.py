"""config.json and generation_config.json from a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import BadInput
from .gguf_header import GGUFTensor
from .gguf_names import Family, families

_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The constants of every released Llama 3.x; only the factor differs (8 or 32)."""


def pick_family(metadata: Mapping[str, Any], ref: str) -> Family:
    """The family that reads this file.

    Raises:
        BadInput: none does.
    """
    arch = metadata.get("general.architecture")
    for family in families():
        if family.arch == arch and all(np.all(metadata.get(f"{arch}.{key}", 0)) for key in family.needs):
            return family
    known = ", ".join(sorted({family.arch for family in families()}))
    raise BadInput(f"{ref}: GGUF architecture {arch!r} is not known; known are {known}")


def build_config(
    family: Family,
    metadata: Mapping[str, Any],
    named: Mapping[str, GGUFTensor],
    rope_factors: np.ndarray | None,
    dtype: str,
    ref: str,
) -> dict[str, Any]:
    """The config.json that the file was made from, as far as it determines the function.

    Raises:
        BadInput: a needed key is missing, or a setting has no equivalent.
    """

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{family.arch}.{key}", default)
        if isinstance(value, np.ndarray):  # one value a layer, where the architecture allows them to differ
            if len(set(value.tolist())) != 1:
                raise BadInput(
                    f"{ref}: {family.arch}.{key} differs from layer to layer, which {family.model_type} cannot express"
                )
            value = value[0].item()
        if (
            value is not None
            and type(value) is not type(default)
            and not (default is None and type(value) in (int, float))
        ):
            raise BadInput(f"{ref}: metadata key {family.arch}.{key} is {value!r}, which is not of its kind")
        return _shortest(value) if isinstance(value, float) else value

    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for ours, theirs in family.keys.items():
        value = get(theirs)
        if value is None and ours == "num_key_value_heads":
            value = get("attention.head_count")
        if value is None:
            raise BadInput(f"{ref}: metadata key {family.arch}.{theirs} ({ours}) is missing")
        config[ours] = value
    embedding = named.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise BadInput(f"{ref}: tensor 'token_embd.weight' is missing or not a matrix")
    if config["num_attention_heads"] < 1 or config["num_key_value_heads"] < 1:
        raise BadInput(f"{ref}: {family.arch}.attention.head_count must be at least 1")
    config["vocab_size"] = embedding.shape[0]
    config["head_dim"] = get("attention.key_length") or config["hidden_size"] // config["num_attention_heads"]
    if get("rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        raise BadInput(f"{ref}: {family.arch}.rope.dimension_count = {get('rope.dimension_count')} rotates only part of each head "
                       f"of {config['head_dim']}, which {family.model_type} cannot express")  # fmt: skip
    config["tie_word_embeddings"] = "output.weight" not in named
    config |= {key: rule["value"] for key, rule in family.fixed.items()} | family.biases(named)
    theta = get("rope.freq_base", 10000.0)
    scaling = _rope_scaling(get, rope_factors, config, theta, ref)
    config["rope_parameters"] = {"rope_type": "default"} | (scaling or {}) | {"rope_theta": theta}
    config |= {"rope_theta": theta, "rope_scaling": scaling}  # readers before transformers 5, and C++ ones
    config["dtype"] = config["torch_dtype"] = _TORCH_NAMES[dtype]
    return config | token_ids(metadata)


def token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """bos, eos and pad ids, as far as the file gives them."""
    keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
    found = {f"{ours}_token_id": metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in keys.items()}
    return {key: value for key, value in found.items() if isinstance(value, int)}


def build_generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: the special ids, with the end of a turn beside the end of the text."""
    config: dict[str, Any] = dict(token_ids(metadata))
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    if len(ends) > 1:
        config["eos_token_id"] = ends
    return config


def _shortest(value: float) -> float:
    """A float32 as the decimal that it was rounded from: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    get, factors: np.ndarray | None, config: Mapping[str, Any], theta: float, ref: str
) -> dict[str, Any] | None:
    if factors is not None:
        scaling = {"rope_type": "llama3", "factor": _shortest(float(factors.max())), **_LLAMA3}
        if not np.allclose(factors, llama3_factors(scaling, config["head_dim"], theta), rtol=1e-4):
            raise BadInput(f"{ref}: rope_freqs.weight does not follow from Llama 3's rope scaling with factor {scaling['factor']}, "
                           "so config.json cannot express it")  # fmt: skip
        return scaling
    kind = get("rope.scaling.type", "none")
    factor = get("rope.scaling.factor") or get("rope.scale_linear") or 1.0
    if kind == "none" or factor == 1.0:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = get("rope.scaling.original_context_length")
        if original is None:
            raise BadInput(f"{ref}: yarn rope scaling without rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise BadInput(f"{ref}: rope.scaling.type = {kind!r} is not known; known are none, linear, yarn")


def llama3_factors(scaling: Mapping[str, Any], head_dim: int, theta: float) -> np.ndarray:
    """The divisors of the rotary frequencies, float32 [head_dim / 2] (Llama 3.1's frequency-dependent scaling).

    Wavelengths above original / low are stretched by `factor`, below original / high left alone, blended in between.
    """
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    ratio = scaling["original_max_position_embeddings"] / wavelength
    smooth = np.clip((ratio - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)
