"""A plain feed-forward network that every token visits: the shared expert, or a dense network that stays beside a mixture."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moeforge_kernels.activations import activation as find

from ..config import ExpertsConfig
from .base import Place


class FeedForward(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) where there is no gate. Its linear maps have the dense model's paths.

    Args:
        maps: role (gate, up or gate_up; down) -> (path, linear map).
    """

    def __init__(self, maps: Mapping[str, tuple[str, nn.Module]], activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.paths = {role: path for role, (path, _) in maps.items()}
        for path, module in maps.values():
            *holders, leaf = path.split(".")
            owner: nn.Module = self
            for holder in holders:
                if holder not in owner._modules:
                    owner.add_module(holder, nn.Module())
                owner = owner.get_submodule(holder)
            owner.add_module(leaf, module)

    @classmethod
    def at(cls, place: Place, config: ExpertsConfig) -> FeedForward:
        """A new one at a site, its values not set.

        Raises:
            BadInput: the site has no such network.
        """
        place.require_ffn(config)
        sizes = {role: (place.width, config.width * (2 if role == "gate_up" else 1)) for role in place.names}
        sizes["down"] = (config.width, place.width)
        linear = TransposedLinear if place.transposed else nn.Linear
        maps = {role: (path, linear(*sizes[role], bias=config.bias)) for role, path in place.names.items()}
        return cls(maps, config.activation)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        act = find(self.activation)
        if "gate_up" in self.paths:
            gate, up = self.project("gate_up", hidden).chunk(2, -1)
            inner = act(gate) * up
        elif "gate" in self.paths:
            inner = act(self.project("gate", hidden)) * self.project("up", hidden)
        else:
            inner = act(self.project("up", hidden))
        return self.project("down", inner)

    def map(self, role: str) -> nn.Module:
        """The linear map of a role."""
        return self.get_submodule(self.paths[role])

    def project(self, role: str, x: Tensor) -> Tensor:
        """What the linear map of a role gives."""
        return self.map(role)(x)


class TransposedLinear(nn.Module):
    """x W + b with W [inputs, outputs], as GPT-2 stores it. No nn.Linear, whose weight others may take for [outputs, inputs]."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.T, self.bias)
