"""The routers of several adapters as one: every token is sent by its own adapter's router to that adapter's experts.

The label of a token is the number of its adapter; the experts of all adapters lie one after the other. A token whose label nobody
owns goes to no expert: experts that stand beside a frozen base then leave it what the base computes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeforge_kernels.pairs import Pairs, pairs_from_slots

from ..errors import BadInput
from .config import RouterConfig
from .context import Force, MixtureContext
from .router import Router
from .routing import Routing

KIND = "joined"
"""`RouterConfig.kind`; `options.parts` are the :class:`Part` of it as JSON."""


@dataclass(frozen=True)
class Part:
    """Adapters whose routers have one policy, and are one :class:`Router`: its rows are theirs, one after the other.

    Attributes:
        owners: their numbers.
        counts: how many experts each of them has here.
        router: the policy of one of them; `owners` is one adapter where the policy cannot be split by label.
    """

    owners: tuple[int, ...]
    counts: tuple[int, ...]
    router: RouterConfig

    @property
    def experts(self) -> int:
        return sum(self.counts)

    def as_json(self) -> dict[str, Any]:
        return {"owners": list(self.owners), "counts": list(self.counts), "router": self.router.as_json()}

    @classmethod
    def from_json(cls, raw: Any) -> Part:
        """Raises BadInput: no such object."""
        if not isinstance(raw, Mapping) or set(raw) != {"owners", "counts", "router"}:
            raise BadInput(f"router: options.parts: expected objects with owners, counts and router, found {raw!r}")
        return cls(tuple(raw["owners"]), tuple(raw["counts"]), RouterConfig.from_json(raw["router"]))


def joined_config(parts: Sequence[Part]) -> RouterConfig:
    """What an entry of `mixtures` says of the routers of several adapters."""
    return RouterConfig(kind=KIND, select="all", options={"parts": [part.as_json() for part in parts]})


class Joined(nn.Module):
    """See the module. It says nothing that losses or statistics could use: what is joined is served, not trained.

    Args:
        config: of kind `joined`.
        width, experts: D, E.

    Attributes:
        context: of the model; where all adapters have one expert each here, what is decided is decided once a forward pass for all sites
            of which that is true. None: nobody shares.

    Raises:
        BadInput: parts that do not have E experts, or a policy without meaning.
    """

    def __init__(self, config: RouterConfig, width: int, experts: int) -> None:
        super().__init__()
        found = [Part.from_json(raw) for raw in config.options.get("parts", ())]
        if sum(part.experts for part in found) != experts:
            raise BadInput(
                f"router: options.parts have {sum(part.experts for part in found)} experts, the mixture {experts}"
            )
        self.experts = experts
        self.context: MixtureContext | None = None
        self._by_label_alone = all(part.router.select == "fixed" for part in found)
        self._key = json.dumps(joined_config(found).as_json(), sort_keys=True)
        self.shifts = (0, *accumulate(part.experts for part in found))[:-1]
        self.parts = nn.ModuleList()
        numbers = 1 + max(owner for part in found for owner in part.owners)
        table = torch.full((len(found), numbers + 2), -1)
        for row, part in zip(table, found, strict=True):
            part.router.check(part.experts)
            if part.router.select == "expert_choice":
                raise BadInput(
                    "router: options.parts: select = 'expert_choice': experts would choose among the tokens of all adapters"
                )
            self.parts.append(Router(part.router, width, part.experts))
            row[torch.tensor(part.owners) + 1] = torch.arange(len(part.owners))
        # the first and the last column are for labels that nobody owns
        self.register_buffer("table", table, persistent=False)
        self.table: Tensor

    def forward(self, x: Tensor, *, real: Tensor | None = None, labels: Tensor | None = None,
                force: Force | None = None) -> Routing:  # fmt: skip
        """[T, D] -> Routing; padding, and tokens of no adapter, go to no expert.

        Args:
            labels: [T] the number of every token's adapter.

        Raises:
            BadInput: nobody gave labels, or a route is forced, which has no meaning over several adapters.
        """
        if labels is None:
            raise BadInput(
                "router: adapters are joined, and nobody said which one each token is for; pass mixture_labels, [B, 1] or [B, T], "
                "-1 for the base alone"
            )
        if force is not None:
            raise BadInput(
                f"router: a forced route, {force!r}, among the experts of several adapters; load the adapter by itself"
            )
        context = self.context
        if context is None or not self._by_label_alone or labels is not context.labels or real is not context.real:
            return self._decide(x, real, labels)
        key = (self._key, x.dtype, x.device)
        if key not in context.decided:
            context.decided[key] = self._decide(x, real, labels)
        return context.decided[key]

    def _decide(self, x: Tensor, real: Tensor | None, labels: Tensor) -> Routing:
        column = (labels.long() + 1).clamp(0, self.table.shape[1] - 1)
        lists: list[Pairs] = []
        for own, part in zip(self.table, self.parts, strict=True):
            local = own[column]
            mine = local >= 0 if real is None else (local >= 0) & real
            lists.append(part(x, real=mine, labels=local).pairs)
        return Routing(lists[0] if len(lists) == 1 else self._one(lists), None, None, real)

    def _one(self, lists: Sequence[Pairs]) -> Pairs:
        """The lists of all parts as one; a token has experts in one part only."""
        slots = [pairs.slots or 0 for pairs in lists]
        indices, weights = [], []
        for pairs, shift, own in zip(lists, self.shifts, slots, strict=True):
            expert, weight = (flat.view(pairs.tokens, own) for flat in pairs.token_order())
            missing = (0, max(slots) - own)
            expert = (expert + shift).masked_fill(expert == pairs.experts, self.experts)
            indices.append(F.pad(expert, missing, value=self.experts))
            weights.append(F.pad(weight, missing))
        # empty slots hold the largest number and no weight
        return pairs_from_slots(torch.stack(indices).amin(0), torch.stack(weights).sum(0), self.experts)

    def extra_repr(self) -> str:
        return f"{self.table.shape[1] - 2} adapters, {self.experts} experts"
