"""LoRA experts beside one frozen linear map (MoLA, arXiv:2402.08562; LoRA-Mixer, arXiv:2507.00029).

    y = W x + b + sum_e g_e s_e B_e A_e x

and with magnitudes (DoRA, arXiv:2402.09353) y = sum_e g_e n_e (W x + s_e B_e A_e x) + (1 - sum_e g_e) W x + b, n_e = m_e / ||W + s_e B_e A_e||.
The base is the module that stood at the site, whatever it is: packed in 4 bits it stays so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeforge_kernels.lora_experts import lora_experts
from moeforge_kernels.pairs import Pairs

from ...errors import BadInput
from ..config import ExpertsConfig
from ..low_rank import LowRank
from .base import Experts, Place, Stored
from .low_rank import Scales, row_norms, start, weight_of


class LoraExperts(Experts):
    """E deltas of rank r on a map D -> D'.

    Parameters: `lora_A` [E, r, D], or [r, D] where all experts share it; `lora_B` [E, D', r]; with DoRA `magnitude` [E, D']. A single
    expert's have no expert axis, and are called on disk what PEFT calls them.

    Args:
        count, width, out_width: E, D, D'.
    """

    adopts = True

    def __init__(self, count: int, width: int, out_width: int, options: LowRank) -> None:
        super().__init__()
        self.count, self.width, self.options = count, width, options
        axis = () if count == 1 else (count,)
        rank = options.rank
        self.lora_A = nn.Parameter(torch.empty(*(() if options.share_a else axis), rank, width))
        self.lora_B = nn.Parameter(torch.empty(*axis, out_width, rank))
        self.magnitude = nn.Parameter(torch.empty(*axis, out_width)) if options.dora else None
        self.scales = options.scale_of(count)
        self._scales = Scales(self.scales)
        self.base: nn.Module = nn.Identity()
        if options.frozen:
            self.requires_grad_(False)

    @classmethod
    def at(cls, place: Place, config: ExpertsConfig) -> Self:
        if len(place.names) != 1:
            raise BadInput(
                f"experts of type {config.type!r} at {place.root}: they stand at one linear map, such as the site 'q'"
            )
        options = LowRank.read(config, without=("targets", "base_weight"))
        return cls(config.count, place.width, place.out_width, options)

    def adopt(self, maps: Mapping[str, tuple[str, nn.Module]], activation: str | None) -> None:
        ((_, self.base),) = maps.values()
        self.base.requires_grad_(False)

    def reset_parameters(self, std: float) -> None:
        start(dict(self.named_parameters(recurse=False)))

    @torch.no_grad()
    def start_magnitudes(self) -> None:
        """m = ||W||, with which nothing differs from the base."""
        if self.magnitude is not None:
            norms = row_norms(weight_of(self.base), self.a, self.b, self._scale())
            self.magnitude.copy_(norms.view_as(self.magnitude))

    @property
    def a(self) -> Tensor:
        """[E, r, D], or [1, r, D] where there is one for all."""
        return self.lora_A if self.lora_A.ndim == 3 else self.lora_A.unsqueeze(0)

    @property
    def b(self) -> Tensor:
        """[E, D', r]."""
        return self.lora_B if self.lora_B.ndim == 3 else self.lora_B.unsqueeze(0)

    def _scale(self) -> Tensor:
        return self._scales.beside(self.lora_B)

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        base = self.base(x)
        low = F.dropout(x, self.options.dropout, self.training) if self.options.dropout else x
        low = low.to(self.lora_A.dtype)
        b = self.b
        if self.magnitude is not None:
            # the norm carries no gradient, as in the paper's section 4.3
            with torch.no_grad():
                norms = row_norms(weight_of(self.base), self.a, b, self._scale())
            ratio = self.magnitude.view_as(norms) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
            gates = pairs.gates().to(ratio.dtype)
            plain = base if getattr(self.base, "bias", None) is None else base - self.base.bias
            base = base + (plain * (gates @ ratio - gates.sum(-1, keepdim=True))).to(base.dtype)
            b = (b * ratio.unsqueeze(-1)).to(b.dtype)
        return base + lora_experts(low, pairs, self.a, b, self._scale()).to(base.dtype)

    def stored(self) -> dict[str, Stored]:
        one, rank = self.count == 1, self.options.rank
        found = {"lora_A": Stored(("lora_A.weight",), (rank,), shared=one or self.options.share_a),
                 "lora_B": Stored(("lora_B.weight",), (self.lora_B.shape[-2],), shared=one)}  # fmt: skip
        if self.magnitude is not None:
            found["magnitude"] = Stored(("lora_magnitude_vector",), (self.magnitude.shape[-1],), shared=one)
        return found | {
            f"base.{name}": Stored((name,), (p.shape[0],), shared=True) for name, p in self.base.named_parameters()
        }

    def extra_repr(self) -> str:
        return f"{self.count} LoRA of rank {self.options.rank}"
