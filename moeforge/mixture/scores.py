"""Where router logits come from.

A kind of scores says which parameters it needs and how they make logits. The parameters belong to the Router, under the names
given here (`router.weight` in a checkpoint); a kind that needs modules of its own may be an `nn.Module`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput
from .config import RouterConfig


class Scores:
    """Base class of the kinds.

    Args:
        config: the router's; `config.options` holds what only this kind knows.
        width: D.
        total: E', null experts included.

    Raises:
        BadInput: an option that this kind does not know, or a value that it cannot take.
    """

    OPTIONS: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Option -> its possible values, the default first."""

    def __init__(self, config: RouterConfig, width: int, total: int) -> None:
        self.width, self.total = width, total
        for key, value in config.options.items():
            known = self.OPTIONS.get(key)
            if known is None:
                raise BadInput(
                    f"router: options.{key}: kind {config.kind!r} knows {', '.join(self.OPTIONS) or 'no options'}"
                )
            if value not in known:
                raise BadInput(f"router: options.{key} = {value!r}: expected {' or '.join(map(repr, known))}")
        self.options = {key: config.options.get(key, known[0]) for key, known in self.OPTIONS.items()}

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape. Matrices start normal with `init_std`, vectors at zero."""
        return {"weight": (self.total, self.width)}

    def __call__(self, x: Tensor, parameters: Mapping[str, Tensor], training: bool) -> Tensor:
        """[T, D] and parameters, both float32 (float64 stays) -> logits [T, E']."""
        raise NotImplementedError


class Linear(Scores):
    """w_e . x, plus a learnt bias where `logit_bias` is set."""

    def __init__(self, config: RouterConfig, width: int, total: int) -> None:
        super().__init__(config, width, total)
        self.biased = config.logit_bias

    def parameters(self) -> dict[str, tuple[int, ...]]:
        return super().parameters() | ({"bias": (self.total,)} if self.biased else {})

    def __call__(self, x: Tensor, parameters: Mapping[str, Tensor], training: bool) -> Tensor:
        return F.linear(x, parameters["weight"], parameters.get("bias"))


class Cosine(Scores):
    """cos(w_e, x): the rows are prototypes (X-MoE, arXiv:2204.09179). `absolute` ignores the sign, for prototypes that are
    singular vectors (Arrow, arXiv:2405.11157)."""

    OPTIONS: ClassVar[Mapping[str, tuple[Any, ...]]] = {"absolute": (False, True)}

    def __call__(self, x: Tensor, parameters: Mapping[str, Tensor], training: bool) -> Tensor:
        logits = F.linear(F.normalize(x, dim=-1), F.normalize(parameters["weight"], dim=-1))
        return logits.abs() if self.options["absolute"] else logits


class Static(Scores):
    """One learnt vector of logits for every token: the weights of a merge (LoRAHub, arXiv:2307.13269)."""

    def parameters(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.total,)}

    def __call__(self, x: Tensor, parameters: Mapping[str, Tensor], training: bool) -> Tensor:
        return parameters["weight"].expand(len(x), -1)


class Random(Scores):
    """Drawn anew in training, for all tokens of a call (MoSA, arXiv:2312.02923) or for each; all equal afterwards."""

    OPTIONS: ClassVar[Mapping[str, tuple[Any, ...]]] = {"draw": ("batch", "token")}

    def parameters(self) -> dict[str, tuple[int, ...]]:
        return {}

    def __call__(self, x: Tensor, parameters: Mapping[str, Tensor], training: bool) -> Tensor:
        if not training:
            return x.new_zeros(len(x), self.total)
        rows = len(x) if self.options["draw"] == "token" else 1
        return torch.randn(rows, self.total, device=x.device, dtype=x.dtype).expand(len(x), -1)


class Label(Scores):
    """Nothing to score: the token's label is its expert (`select = fixed`)."""

    def parameters(self) -> dict[str, tuple[int, ...]]:
        return {}


KINDS: dict[str, type[Scores]] = {
    "linear": Linear,
    "cosine": Cosine,
    "label": Label,
    "static": Static,
    "random": Random,
}


def register_scores(name: str, kind: type[Scores]) -> None:
    """Make a further kind known under a name that RouterConfig.kind may give.

    Raises:
        ValueError: the name is taken by another class.
    """
    if KINDS.setdefault(name, kind) is not kind:
        raise ValueError(f"router kind {name!r} is already {KINDS[name].__qualname__}, not {kind.__qualname__}")


def make_scores(config: RouterConfig, width: int, total: int) -> Scores:
    """The scores that a config names.

    Raises:
        BadInput: nobody registered that kind.
    """
    if config.kind not in KINDS:
        raise BadInput(f"router: kind = {config.kind!r}: not registered; known are {', '.join(sorted(KINDS))}")
    return KINDS[config.kind](config, width, total)
