"""Adapters of LoRA experts with any entries and random weights: made from their layout alone, with no model and no verb."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ..checkpoint import open_checkpoint
from ..checkpoint.adapter_layout import CONFIG, FORMAT_VERSION, PEFT_TYPE, PREFIX, WEIGHTS, maps_of, root_of, shapes_of
from ..checkpoint.expert_adapter import plain_tensors, shapes_digest
from ..checkpoint.expert_names import dense_name
from ..checkpoint.linear_maps import LinearMap, linear_maps
from ..checkpoint.quantized import wrap
from ..mixture.config import ExpertsConfig, MixtureConfig, RouterConfig

ALWAYS = RouterConfig(kind="always", select="all", top_k=1)
"""The router of plain LoRA."""
TOP_2 = RouterConfig()


def lora(site: str, count: int, layers: Sequence[int], router: RouterConfig = TOP_2, **options: Any) -> MixtureConfig:
    """LoRA experts at one linear map of each layer; a single one needs no router."""
    experts = ExpertsConfig(type="lora", count=count, options={"rank": 3, "alpha": 6.0, **options})
    return MixtureConfig(site=site, layers=tuple(layers), experts=experts, router=ALWAYS if count == 1 else router)


def lora_ffn(count: int, layers: Sequence[int], router: RouterConfig = TOP_2, **options: Any) -> MixtureConfig:
    """LoRA experts inside the FFN of each layer, whatever its shape."""
    experts = ExpertsConfig(type="lora_ffn", count=count, options={"rank": 3, "alpha": 6.0, **options})
    return MixtureConfig(site="ffn", layers=tuple(layers), experts=experts, router=router)


def save_adapter(
    directory: Path,
    base: Path,
    entries: Sequence[MixtureConfig],
    *,
    seed: int = 0,
    scatter: float = 0.2,
    dtype: Any = np.float32,
    **settings: Any,
) -> Path:
    """Write an adapter of these entries for a base and return its directory.

    Args:
        scatter: standard deviation of every B, so that experts differ from the base and each other; 0: they start as the base.
        dtype: of its tensors.
        settings: keys of adapter_config.json to set otherwise.
    """
    with open_checkpoint(str(base), compressed=True) as source:
        plain = plain_tensors(source)
        maps = linear_maps(source.config, plain, source.ref)
        raw = [_whole(entry, maps) for entry in entries]
        shapes = shapes_of(raw, maps, str(directory))
        generator = np.random.default_rng(seed)
        values = {name: _value(name, shape, generator, scatter) for name, shape in shapes.items()}
        weights = source if plain is source.tensors else wrap(source, dequantize=True)
        for name in shapes:
            if name.endswith("lora_magnitude_vector"):
                weight = weights.read(f"{dense_name(name)[0].removesuffix('.lora_magnitude_vector')}.weight").astype(
                    np.float32
                )
                norms = np.linalg.norm(weight if len(weight) == len(values[name]) else weight.T, axis=1)
                values[name] = norms * values[name]
        for entry in raw:
            for layer in entry["layers"]:
                _pad(
                    values,
                    root_of(maps_of(entry, layer, maps, str(directory))),
                    entry["experts"]["options"].get("ranks") or (),
                )
        config = {
            "peft_type": PEFT_TYPE, "format_version": FORMAT_VERSION, "base_model_name_or_path": str(base), "revision": None,
            "base_model_type": source.config.get("model_type"), "base_shapes_sha256": shapes_digest(plain), "mixtures": raw,
            "attach": {"method": "custom"}, "experts": [],
        }  # fmt: skip
    directory.mkdir(parents=True)
    (directory / CONFIG).write_text(json.dumps(config | settings))
    save_file({f"{PREFIX}{name}": value.astype(dtype) for name, value in values.items()}, directory / WEIGHTS)
    return directory


def _whole(entry: MixtureConfig, maps: Mapping[tuple[str, int], LinearMap]) -> dict[str, Any]:
    """The entry with the shape of its network filled in, as it stands in an adapter."""
    raw, layer = entry.as_json(), entry.layers[0]
    if entry.site == "ffn":
        down, gated = maps["down", layer], not {("gate", layer), ("gate_up", layer)}.isdisjoint(maps)
        raw["experts"] |= {"width": down.inputs, "bias": down.bias, "gated": gated}
    return raw


def _value(name: str, shape: tuple[int, ...], generator: np.random.Generator, scatter: float) -> np.ndarray:
    std = {"lora_A": 1 / np.sqrt(shape[-1]), "lora_B": scatter}.get(name.split(".")[-2], 1.0 / np.sqrt(shape[-1]))
    if name.endswith("lora_magnitude_vector"):  # as a factor of the base's norms
        return np.exp(scatter * generator.standard_normal(shape)).astype(np.float32)
    return (std * generator.standard_normal(shape)).astype(np.float32)


def _pad(values: dict[str, np.ndarray], root: str, ranks: Sequence[int]) -> None:
    """Zeros beyond the true rank of each expert."""
    for e, rank in enumerate(ranks):
        for name, value in values.items():
            if name.startswith(f"{root}.experts.{e}."):
                if name.endswith("lora_A.weight"):
                    value[rank:] = 0
                elif name.endswith("lora_B.weight"):
                    value[:, rank:] = 0
