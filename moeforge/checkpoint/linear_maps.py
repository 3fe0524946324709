"""The linear maps of a model's layers, told from tensor names alone: what a plan needs to know before a model is built.

    q, k, v, qkv, o             of attention
    gate, up, gate_up, down     of the feed-forward network
    in                          into a state-space mixer (Mamba)

moeforge.model.sites finds the same places by structure when the model is there; whoever plans with these checks against those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput
from .architectures import find, known
from .tensor import TensorInfo

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.(.+)\.weight$")
_SENSES = re.compile(r"(^|[._])(vision|visual|audio|image|speech)")
"""Other towers of a model of several modalities."""
ATTENTION = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "qkv_proj": "qkv", "query_key_value": "qkv", "c_attn": "qkv",
    "o_proj": "o", "out_proj": "o", "c_proj": "o", "dense": "o", "query": "q", "key": "k", "value": "v",
}  # fmt: skip
FFN = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up", "fc1": "up", "fc2": "down", "c_fc": "up",
    "c_proj": "down", "dense_h_to_4h": "up", "dense_4h_to_h": "down", "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip
HELD = {"intermediate": "up", "output": "down"}
"""BERT and its kin call both maps of the FFN `dense`; what holds them tells which."""
MIXER = {"in_proj": "in"}


@dataclass(frozen=True)
class LinearMap:
    """One linear map of one layer.

    Attributes:
        role: see the module.
        layer: its number.
        path: the module as the checkpoint calls it: the tensor's name without `.weight`.
        inputs, outputs: D, D'.
        bias: whether it adds one.
        transposed: whether its matrix is stored [D, D'].
    """

    role: str
    layer: int
    path: str
    inputs: int
    outputs: int
    bias: bool
    transposed: bool = False


def linear_maps(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], ref: str
) -> dict[tuple[str, int], LinearMap]:
    """(role, layer) -> linear map; of the text model, where there are several towers.

    Raises:
        BadInput: there is none, the model is a mixture already, or two have one role in one layer.
    """
    kind = config.get("model_type")
    turned = find(kind).transposed if isinstance(kind, str) and kind in known() else ()
    found: dict[tuple[str, int], LinearMap] = {}
    for name, info in tensors.items():
        place = _LAYER.search(name)
        if place is None or len(info.shape) != 2 or _SENSES.search(name[: place.start(1)]):
            continue
        below = place[2].split(".")
        if "experts" in below or "shared_expert" in below:
            raise BadInput(
                f"{ref}: {name}: this is a mixture of experts already, and LoRA experts stand beside dense linear maps"
            )
        role = _role(below)
        if role is None:
            continue
        shape = info.shape[::-1] if role in turned else info.shape
        biased = f"{name[:-6]}bias" in tensors
        path = name.removesuffix(".weight")
        one = LinearMap(role, int(place[1]), path, shape[1], shape[0], biased, transposed=role in turned)
        if (other := found.setdefault((role, one.layer), one)) is not one:
            raise BadInput(f"{ref}: {one.path} and {other.path} are both {role!r} of layer {one.layer}")
    if not found:
        raise BadInput(f"{ref}: no linear maps of layers found; names look like {next(iter(tensors), 'nothing')}")
    return dict(sorted(found.items(), key=lambda item: (item[0][1], _ORDER.index(item[0][0]))))


_ORDER: tuple[str, ...] = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "in")


def _role(below: list[str]) -> str | None:
    *holders, leaf = below
    if any("attn" in holder or "attention" in holder for holder in holders):
        return ATTENTION.get(leaf)
    if "mixer" in holders or "mamba" in holders:
        return MIXER.get(leaf)
    return HELD.get(holders[-1]) if leaf == "dense" and holders else FFN.get(leaf)
