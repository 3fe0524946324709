"""Whole feed-forward networks, gated or plain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from moeforge_kernels.activations import canonical
from moeforge_kernels.expert_ffn import expert_ffn
from moeforge_kernels.pairs import Pairs

from ..config import ExpertsConfig
from .base import Experts, Place, Stored


class FFNExperts(Experts):
    """E feed-forward networks of width F: down(act(gate x) * up x), or down(act(up x)) where there is no gate.

    Parameters: `gate_up_proj` [E, 2F, D] (the gate's rows first) or `up_proj` [E, F, D]; `down_proj` [E, D, F]; with biases
    `gate_up_proj_bias` [E, 2F] or `up_proj_bias` [E, F], and `down_proj_bias` [E, D].

    Args:
        count: E.
        width: D.
        ffn_width: F.
        names: the dense model's own names of gate, up and down (`gate_proj`, `c_fc`, ...), used on disk; `gate_up` where the
            two are one matrix there.
        transposed: the dense model stores its matrices [in, out].

    Raises:
        ValueError: an activation that no kernel knows.
    """

    def __init__(self, count: int, width: int, ffn_width: int, *, activation: str = "silu", gated: bool = True, bias: bool = False,
                 names: Mapping[str, str] | None = None, transposed: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.count, self.width, self.ffn_width = count, width, ffn_width
        self.activation, self.gated = canonical(activation), gated
        self.names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", **(names or {})}
        self.transposed = transposed
        self.up_name = "gate_up_proj" if gated else "up_proj"
        rows = (2 if gated else 1) * ffn_width
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(count, rows, width)))
        self.down_proj = nn.Parameter(torch.empty(count, width, ffn_width))
        self.register_parameter(f"{self.up_name}_bias", nn.Parameter(torch.empty(count, rows)) if bias else None)
        self.register_parameter("down_proj_bias", nn.Parameter(torch.empty(count, width)) if bias else None)

    @classmethod
    def at(cls, place: Place, config: ExpertsConfig) -> Self:
        place.require_ffn(config)
        return cls(config.count, place.width, config.width, activation=config.activation, gated=config.gated, bias=config.bias,
                   names=place.names, transposed=place.transposed)  # fmt: skip

    def weights(self) -> tuple[Tensor, Tensor]:
        """(up [E, 2F or F, D], down [E, D, F]) as they act: what a kind that stores them otherwise (ternary, packed) overrides."""
        up: Tensor = getattr(self, self.up_name)
        return up, self.down_proj

    def bias(self, name: str) -> Tensor | None:
        """The bias of a projection by the name of its weight."""
        return getattr(self, f"{name}_bias")

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        up, down = self.weights()
        return expert_ffn(
            x, pairs, up, down, activation=self.activation, gated=self.gated,
            up_bias=self.bias(self.up_name), down_bias=self.bias("down_proj"),
        )  # fmt: skip

    def stored(self) -> dict[str, Stored]:
        inner = ("gate_up",) if "gate_up" in self.names else ("gate", "up") if self.gated else ("up",)
        rows = (getattr(self, self.up_name).shape[1] // len(inner),) * len(inner)
        found = {}
        for leaf, suffix in (("weight", ""), ("bias", "_bias")):
            for name, roles, sizes in ((self.up_name, inner, rows), ("down_proj", ("down",), (self.width,))):
                if getattr(self, name + suffix, None) is not None:
                    parts = tuple(f"{self.names[role]}.{leaf}" for role in roles)
                    found[name + suffix] = Stored(parts, sizes, transposed=self.transposed and leaf == "weight")
        return found

    def extra_repr(self) -> str:
        gate = "gated " if self.gated else ""
        return f"{self.count} experts, D {self.width}, F {self.ffn_width}, {gate}{self.activation}"
