"""Rows as tensors, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..mixture.routing import Routing
from ..model.mixing import LABELS
from .packing import Row
from .routing import Site, contexts_of, watch


@dataclass
class Batch:
    """Rows as tensors [B, T]."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    real: Tensor
    about: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> Batch:
        def stack(name: str) -> Tensor:
            return torch.stack([torch.from_numpy(getattr(row, name)) for row in rows]).to(device)

        return cls(stack("tokens"), stack("labels"), stack("positions"), stack("real"), stack("about"))

    @property
    def predicted(self) -> int:
        return int((self.labels >= 0).sum())


def forward(model: nn.Module, sites: list[Site], batch: Batch) -> tuple[Tensor, dict[str, Routing]]:
    """Logits [B, T, V], and what the routers said by site. Positions that restart keep documents apart. Routers that choose by label
    are told what tokens are about."""
    asked = any(site.asks for site in sites) or any(context.force == "label" for context in contexts_of(sites))
    labels = {LABELS: batch.about} if asked and batch.about is not None else {}
    with watch(sites, batch.real) as seen:
        logits = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False, **labels).logits
    return logits, seen
