"""What every kind of low-rank experts reads from `ExpertsConfig.options`, and how they start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from ...errors import BadInput
from ..config import ExpertsConfig

FFN_TARGETS = ("gate", "up", "gate_up", "down")


@dataclass(frozen=True)
class LowRank:
    """Options of the kinds `lora` and `lora_ffn`.

    Attributes:
        rank: r; of experts of different ranks the largest, the others are padded with zeros.
        alpha, rslora: s = alpha / r, or alpha / sqrt(r) (arXiv:2312.03732).
        dropout: on what the low-rank path reads, one mask a token for all experts; in training.
        dora: each expert has a magnitude per output (arXiv:2402.09353).
        share_a: one A for all experts (HydraLoRA, arXiv:2404.19245); `lora` only.
        frozen: they do not learn: imported, for a router to choose among.
        ranks: the true rank of each expert; 0: it changes nothing here.
        scales: s of each expert, instead of what alpha says.
        targets: which linear maps of the network have deltas; `lora_ffn` only.
        base_weight: `one`: y = f(x) + sum_e g_e (f_e(x) - f(x)); `paper`: y = sum_e g_e f_e(x). The same where the weights sum to 1.
    """

    rank: int = 8
    alpha: float = 16
    rslora: bool = False
    dropout: float = 0.0
    dora: bool = False
    share_a: bool = False
    frozen: bool = False
    ranks: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    targets: tuple[str, ...] = FFN_TARGETS
    base_weight: Literal["one", "paper"] = "one"

    @classmethod
    def read(cls, config: ExpertsConfig, *, without: tuple[str, ...] = ()) -> LowRank:
        """The options of an entry.

        Raises:
            BadInput: an unknown one, or a value without meaning.
        """
        known = {item.name for item in fields(cls)} - set(without)
        where = f"experts of type {config.type!r}: options"
        for key in config.options:
            if key not in known:
                raise BadInput(f"{where}.{key} is not known; known are {', '.join(sorted(known))}")
        made = cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in config.options.items()})
        made._check(config.count, where)
        return made

    def _check(self, count: int, where: str) -> None:
        def refuse(key: str, expected: str) -> None:
            raise BadInput(f"{where}.{key} = {getattr(self, key)!r}: expected {expected}")

        if type(self.rank) is not int or self.rank < 1:
            refuse("rank", "a positive whole number")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < math.inf:
            refuse("alpha", "a positive number")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            refuse("dropout", "a share in [0, 1)")
        for key in ("rslora", "dora", "share_a", "frozen"):
            if type(getattr(self, key)) is not bool:
                refuse(key, "true or false")
        if self.ranks and (
            len(self.ranks) != count or any(type(r) is not int or not 0 <= r <= self.rank for r in self.ranks)
        ):
            refuse("ranks", f"{count} whole numbers between 0 and rank = {self.rank}")
        if self.scales and (
            len(self.scales) != count or any(type(s) not in (int, float) or not math.isfinite(s) for s in self.scales)
        ):
            refuse("scales", f"{count} finite numbers")
        if not self.targets or set(self.targets) - set(FFN_TARGETS):
            refuse("targets", f"some of {', '.join(FFN_TARGETS)}")
        if self.base_weight not in ("one", "paper"):
            refuse("base_weight", "'one' or 'paper'")

    def scale_of(self, count: int) -> tuple[float, ...]:
        """s of each expert."""
        if self.scales:
            return tuple(map(float, self.scales))
        ranks = self.ranks or (self.rank,) * count
        return tuple(0.0 if r == 0 else self.alpha / (math.sqrt(r) if self.rslora else r) for r in ranks)


def start(parameters: Mapping[str, nn.Parameter]) -> None:
    """B = 0, so that nothing differs from the base yet; A as in a linear layer, kaiming_uniform(sqrt 5); magnitudes are set when the
    base's weights are known."""
    for name, parameter in parameters.items():
        if name.endswith("lora_A"):
            bound = 1 / math.sqrt(parameter.shape[-1])
            nn.init.uniform_(parameter, -bound, bound)
        else:
            nn.init.zeros_(parameter)


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """||W + s_e B_e A_e|| of every row, [E, D'], without making that matrix: ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>.

    Args:
        weight: W [D', D]. a: [E or 1, r, D]. b: [E, D', r]. scale: [E].
    """
    wide = torch.promote_types(b.dtype, torch.float32)
    weight, a, b = weight.to(wide), a.to(wide), b.to(wide)
    s = scale.to(wide).view(-1, 1)
    cross = (torch.einsum("od,erd->eor", weight, a) * b).sum(-1)
    own = (b @ (a @ a.transpose(1, 2)) * b).sum(-1)
    return (weight.square().sum(-1) + 2 * s * cross + s * s * own).clamp_min(0).sqrt()


def weight_of(module: nn.Module) -> Tensor:
    """[D', D] of a linear map, however it is held.

    Raises:
        BadInput: it is packed.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise BadInput(
            f"DoRA needs the base's weights, and {type(module).__name__} holds them packed; attach to the plain base, or leave dora out"
        )
    outputs = getattr(module, "out_features", getattr(module, "nf", weight.shape[0]))
    turned = type(module).__name__ in ("Conv1D", "TransposedLinear") and (weight.shape[1] == outputs)
    return weight.T if turned else weight
