"""Activations by the names that Hugging Face configs use, in one spelling each.

A kernel that fuses the activation implements the names of `FUSED`; anything else falls to the torch backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CANONICAL = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "identity": "identity",
    "linear": "identity",
}
"""What configs write -> the name here. `gelu_new`, `gelu_fast` and the tanh form are one formula."""

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def canonical(name: str) -> str:
    """The one name of an activation.

    Raises:
        ValueError: it is not known.
    """
    if name not in CANONICAL:
        raise ValueError(f"activation {name!r} is not known; known are {', '.join(sorted(CANONICAL))}")
    return CANONICAL[name]


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name (either spelling)."""
    return FUNCTIONS[canonical(name)]


def between(hidden: Tensor, name: str, gated: bool) -> Tensor:
    """What stands between an FFN's two products: [P, 2F] -> [P, F] as act(gate) * value where gated, else act of [P, F]."""
    act = activation(name)
    if not gated:
        return act(hidden)
    gate, value = hidden.chunk(2, -1)
    return act(gate) * value
