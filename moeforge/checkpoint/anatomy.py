"""What a checkpoint consists of, from its config and headers alone: parameters total and active, layers, mixtures, bytes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .roles import Role, place_of, role_of
from .tensor import TensorInfo

TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
"""What model families call the number of experts that a token visits."""
WIDTH_ROLES = ("down_proj", "w2", "output_linear", "fc2", "wo", "c_proj")
"""Name components of the matrix that leads out of an expert: [D, F], whichever way round it is stored."""
SCALES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "weight_format", "weight_scale", "weight_scale_inv",
          "input_scale", "qzeros", "scales", "g_idx")  # fmt: skip
"""Last name components of tensors that describe a quantised matrix; they are storage, not parameters."""


@dataclass(frozen=True)
class Mixture:
    """Layers whose experts are alike."""

    layers: tuple[int, ...]
    experts: int
    top_k: int | None
    """Experts a token visits; None when the config does not say."""
    width: int | None
    """FFN width of one expert."""
    shared_width: int | None
    """FFN width of what every token visits beside them; None: nothing."""

    def describe(self) -> str:
        """`30 layers (0-29): 8 experts, 2 active, width 1536`"""
        text = f"{_count(len(self.layers), 'layer')} ({spans(self.layers)}): {_count(self.experts, 'expert')}"
        if self.top_k is not None:
            text += f", {self.top_k} active"
        if self.width is not None:
            text += f", width {self.width}"
        return text + (f", shared width {self.shared_width}" if self.shared_width is not None else "")


@dataclass(frozen=True)
class Anatomy:
    """See the module; `parameters_active` is what one token visits, None where the config does not say how many experts."""

    model_type: str | None
    architectures: tuple[str, ...]
    parameters_total: int
    parameters_active: int | None
    layers: int
    mixtures: tuple[Mixture, ...]
    parameters_by_role: Mapping[Role, int]
    bytes_by_role: Mapping[Role, int]
    bytes_by_dtype: Mapping[str, int]

    @property
    def tensor_bytes(self) -> int:
        return sum(self.bytes_by_dtype.values())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def anatomy(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Anatomy:
    """Count a checkpoint.

    Quantised weights count as the parameters they stand for (bitsandbytes, GPTQ, AWQ, fp8), their scales as none.
    """
    settings = plain_config(config)
    by_role: dict[Role, int] = defaultdict(int)
    bytes_by_role: dict[Role, int] = defaultdict(int)
    bytes_by_dtype: dict[str, int] = defaultdict(int)
    blocks: dict[int, list[tuple[TensorInfo, Role, int]]] = defaultdict(list)
    layers = set()
    for info in tensors.values():
        role, size = role_of(info), parameters_of(info, tensors, settings)
        by_role[role] += size
        bytes_by_role[role] += info.nbytes
        bytes_by_dtype[info.dtype] += info.nbytes
        layer, _ = place_of(info.name)
        if layer is not None:
            layers.add(layer)
            if role in ("experts", "shared experts"):
                blocks[layer].append((info, role, size))
    top_k = next((int(settings[key]) for key in TOP_K if isinstance(settings.get(key), int | float)), None)
    entries = _entries(settings)
    alike: dict[tuple[int, int | None, int | None, int | None], list[int]] = defaultdict(list)
    known = True
    idle = 0.0
    for layer, block in sorted(blocks.items()):
        experts = _experts(block)
        if experts == 0:
            continue
        width, shared = (_width(block, role, settings, experts) for role in ("experts", "shared experts"))
        chosen = top_k
        if layer in entries:
            chosen, width, shared = entries[layer].top_k, entries[layer].width, entries[layer].shared_width
        alike[experts, chosen, width, shared].append(layer)
        if chosen is None:
            known = False
        else:
            stored = sum(size for _, role, size in block if role == "experts")
            idle += stored * max(experts - chosen, 0) / experts
    mixtures = tuple(
        Mixture(tuple(found), experts, chosen, width, shared)
        for (experts, chosen, width, shared), found in alike.items()
    )
    total = sum(by_role.values())
    return Anatomy(
        model_type=config.get("model_type"), architectures=_classes(config),
        parameters_total=total,
        parameters_active=total - round(idle) if known else None,
        layers=len(layers), mixtures=mixtures, parameters_by_role=dict(by_role), bytes_by_role=dict(bytes_by_role),
        bytes_by_dtype=dict(bytes_by_dtype),
    )  # fmt: skip


def _classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The model's class; of a model of ours, and the dense class that it is made of."""
    base = config.get("base_config")
    named = tuple(config.get("architectures") or ())
    return named + (_classes(base) if isinstance(base, Mapping) else ())


@dataclass(frozen=True)
class _Entry:
    """What our own config says about a layer's mixture."""

    top_k: int | None
    """None where the router decides token by token."""
    width: int | None
    shared_width: int | None


def _entries(settings: Mapping[str, Any]) -> dict[int, _Entry]:
    """Layer -> entry of our own `mixtures`."""
    found: dict[int, _Entry] = {}
    entries = settings.get("mixtures")
    for entry in entries if isinstance(entries, list) else []:
        router, experts, shared = (entry.get(key) or {} for key in ("router", "experts", "shared"))
        fixed = {"topk": router.get("top_k"), "expert_choice": router.get("top_k"), "switch": 1, "fixed": 1,
                 "all": experts.get("count")}  # fmt: skip
        made = _Entry(
            fixed.get(router.get("select", "topk")), experts.get("width") or None, shared.get("width") or None
        )
        found |= dict.fromkeys(entry.get("layers") or (), made)
    return found


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's own settings: what `base_config` (ours) and `text_config` (multimodal models) hold lies on top."""
    found = dict(config)
    for key in ("base_config", "text_config"):
        if isinstance(found.get(key), Mapping):
            found |= plain_config(found[key])
    return found


def parameters_of(info: TensorInfo, tensors: Mapping[str, TensorInfo], settings: Mapping[str, Any]) -> int:
    """How many parameters a stored tensor stands for."""
    leaf = info.name.rpartition(".")[2]
    if leaf in SCALES or ".quant_state." in info.name:
        return 0
    if info.dtype == "U8" and f"{info.name}.absmax" in tensors:
        return 2 * info.size
    if leaf == "qweight" and info.dtype == "I32":
        scheme = settings.get("quantization_config")
        bits = scheme.get("bits", 4) if isinstance(scheme, Mapping) else 4
        return info.size * 32 // int(bits)
    return info.size


def _experts(block: list[tuple[TensorInfo, Role, int]]) -> int:
    """Experts of a layer: distinct numbers in the names, else the first axis of what is stored stacked."""
    numbered = {number for info, _, _ in block if (number := place_of(info.name)[1]) is not None}
    stacked = {info.shape[0] for info, role, _ in block if role == "experts" and len(info.shape) == 3}
    return len(numbered) or max(stacked, default=0)


def _width(
    block: list[tuple[TensorInfo, Role, int]], wanted: Role, settings: Mapping[str, Any], experts: int
) -> int | None:
    """FFN width of the experts (or of what is shared), from the parameters of the matrix that leads out of them."""
    hidden = settings.get("hidden_size", settings.get("n_embd"))
    sizes = [size for info, role, size in block if role == wanted and set(info.name.split(".")) & set(WIDTH_ROLES)
             and not info.name.endswith("bias")]  # fmt: skip
    if not sizes or not isinstance(hidden, int) or hidden < 1:
        return None
    # at most one stored matrix an expert, so the sum does not depend on stacking
    return math.ceil(sum(sizes) / hidden / (experts if wanted == "experts" else 1))


def spans(numbers: tuple[int, ...]) -> str:
    """`0-3, 7, 9-11`"""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][-1] + 1:
            found[-1] = [found[-1][0], number]
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
