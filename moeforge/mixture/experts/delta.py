"""Feed-forward networks that share one frozen base and differ by low-rank deltas (MixLoRA, arXiv:2404.15159).

    u_e = (G + s B_e A_e) x + g,   v_e = (U + s B'_e A'_e) x + c,   h_e = act(u_e) * v_e,   y_e = (W + s B''_e A''_e) h_e + b

The base is never copied, and it costs what the dense network costs whatever K is:

    G x and U x are the same for all experts of a token: computed once, and each pair adds its own delta;
    sum_e w_e W h_e = W (sum_e w_e h_e): summed first, one product a token. The bias comes with the sum of the weights.

Both hold for gradients too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeforge_kernels.activations import activation as find
from moeforge_kernels.activations import canonical
from moeforge_kernels.combine import combine
from moeforge_kernels.grouped_gemm import grouped_gemm
from moeforge_kernels.pairs import Pairs

from ...errors import BadInput
from ..config import ExpertsConfig
from .base import Experts, Place, Stored


class DeltaExperts(Experts):
    """E low-rank deltas of rank r over one frozen network of width F.

    Parameters, shared and frozen: `base_up_proj` [2F, D] (the gate's rows first) or [F, D] without a gate, `base_down_proj` [D, F],
    and with biases `base_up_proj_bias`, `base_down_proj_bias`. An expert's own, M = 2 where gate and up are two matrices in the
    dense model, else 1: `up_lora_A` [E, M r, D], `up_lora_B` [E, 2F or F, r], `down_lora_A` [E, r, F], `down_lora_B` [E, D, r].

    Args:
        count, width, ffn_width: E, D, F.
        rank: r.
        alpha: s = alpha / r.
        names: see FFNExperts.
        transposed: the dense model stores its matrices [in, out]; the deltas' never are.

    Raises:
        ValueError: an activation that no kernel knows.
    """

    def __init__(self, count: int, width: int, ffn_width: int, *, rank: int, alpha: float, activation: str = "silu", gated: bool = True,
                 bias: bool = False, names: Mapping[str, str] | None = None, transposed: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.count, self.width, self.ffn_width = count, width, ffn_width
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.activation, self.gated, self.transposed = canonical(activation), gated, transposed
        self.names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", **(names or {})}
        self.inner = ("gate_up",) if "gate_up" in self.names else ("gate", "up") if gated else ("up",)
        rows = (2 if gated else 1) * ffn_width
        self.base_up_proj = nn.Parameter(torch.empty(rows, width), requires_grad=False)
        self.base_down_proj = nn.Parameter(torch.empty(width, ffn_width), requires_grad=False)
        biases = (rows, width) if bias else (None, None)
        self.base_up_proj_bias, self.base_down_proj_bias = (
            None if size is None else nn.Parameter(torch.empty(size), requires_grad=False) for size in biases
        )
        self.up_lora_A = nn.Parameter(torch.empty(count, len(self.inner) * rank, width))
        self.up_lora_B = nn.Parameter(torch.empty(count, rows, rank))
        self.down_lora_A = nn.Parameter(torch.empty(count, rank, ffn_width))
        self.down_lora_B = nn.Parameter(torch.empty(count, width, rank))

    @classmethod
    def at(cls, place: Place, config: ExpertsConfig) -> Self:
        place.require_ffn(config)
        known: dict[str, float] = {"rank": 8, "alpha": 16}
        for key, value in config.options.items():
            if key not in known:
                raise BadInput(
                    f"experts of type {config.type!r}: options.{key} is not known; known are {', '.join(known)}"
                )
            if type(value) not in (int, float) or not value > 0 or (key == "rank" and type(value) is not int):
                raise BadInput(
                    f"experts of type {config.type!r}: options.{key} = {value!r}: expected a positive number"
                )
        options = known | dict(config.options)
        return cls(config.count, place.width, config.width, rank=int(options["rank"]), alpha=options["alpha"], names=place.names,
                   activation=config.activation, gated=config.gated, bias=config.bias, transposed=place.transposed)  # fmt: skip

    def reset_parameters(self, std: float) -> None:
        """B = 0, so that nothing differs from the base yet; A as in a linear layer."""
        for name, parameter in self.named_parameters():
            if name.endswith("lora_A"):
                bound = 1 / math.sqrt(parameter.shape[-1])
                nn.init.uniform_(parameter, -bound, bound)
            elif name.endswith("lora_B") or parameter.ndim == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        base = F.linear(x, self.base_up_proj, self.base_up_proj_bias)
        before = base[pairs.token] + self.scale * self._up_delta(x, pairs)
        act = find(self.activation)
        if self.gated:
            gate, value = before.chunk(2, -1)
            hidden = act(gate) * value
        else:
            hidden = act(before)
        out = F.linear(combine(hidden, pairs), self.base_down_proj)
        if self.base_down_proj_bias is not None:
            out = out + (pairs.gates().sum(-1, keepdim=True) * self.base_down_proj_bias).to(out.dtype)
        low = grouped_gemm(hidden, self.down_lora_A, pairs, gather=False)
        return out + self.scale * combine(grouped_gemm(low, self.down_lora_B, pairs, gather=False), pairs)

    def _up_delta(self, x: Tensor, pairs: Pairs) -> Tensor:
        """[P, 2F or F]: B_e A_e x of each pair, the gate's columns first."""
        parts = len(self.inner)
        low = grouped_gemm(x, self.up_lora_A, pairs)
        made = [grouped_gemm(z, b, pairs, gather=False) for z, b in
                zip(low.chunk(parts, -1), self.up_lora_B.chunk(parts, 1), strict=True)]  # fmt: skip
        return made[0] if parts == 1 else torch.cat(made, -1)

    def stored(self) -> dict[str, Stored]:
        found = {}
        rows = (self.up_lora_B.shape[1] // len(self.inner),) * len(self.inner)
        for side, roles, sizes in (("up", self.inner, rows), ("down", ("down",), (self.width,))):
            names = [self.names[role] for role in roles]
            for leaf, suffix in (("weight", ""), ("bias", "_bias")):
                if getattr(self, f"base_{side}_proj{suffix}") is not None:
                    parts = tuple(f"{name}.{leaf}" for name in names)
                    found[f"base_{side}_proj{suffix}"] = Stored(
                        parts, sizes, transposed=self.transposed and leaf == "weight", shared=True
                    )
            ranks = (self.rank,) * len(names)
            found[f"{side}_lora_A"] = Stored(tuple(f"{name}.lora_A.weight" for name in names), ranks)
            found[f"{side}_lora_B"] = Stored(tuple(f"{name}.lora_B.weight" for name in names), sizes)
        return found

    def extra_repr(self) -> str:
        gate = "gated " if self.gated else ""
        return f"{self.count} deltas of rank {self.rank}, D {self.width}, F {self.ffn_width}, {gate}{self.activation}"
