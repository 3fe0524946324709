"""The options of low-rank experts, as data: what `ExpertsConfig.options` of the kinds `lora` and `lora_ffn` says. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..errors import BadInput
from .config import ExpertsConfig

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
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.options.items()}
        made = cls(**given)
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
        for key in ("ranks", "scales", "targets"):
            if type(getattr(self, key)) is not tuple:
                refuse(key, "a list")
        if self.ranks and (
            len(self.ranks) != count or any(type(r) is not int or not 0 <= r <= self.rank for r in self.ranks)
        ):
            refuse("ranks", f"{count} whole numbers between 0 and rank = {self.rank}")
        if self.scales and (
            len(self.scales) != count or any(type(s) not in (int, float) or not math.isfinite(s) for s in self.scales)
        ):
            refuse("scales", f"{count} finite numbers")
        if not self.targets or any(target not in FFN_TARGETS for target in self.targets):
            refuse("targets", f"some of {', '.join(FFN_TARGETS)}")
        if self.base_weight not in ("one", "paper"):
            refuse("base_weight", "'one' or 'paper'")

    def scale_of(self, count: int) -> tuple[float, ...]:
        """s of each expert."""
        if self.scales:
            return tuple(map(float, self.scales))
        ranks = self.ranks or (self.rank,) * count
        return tuple(0.0 if r == 0 else self.alpha / (math.sqrt(r) if self.rslora else r) for r in ranks)
