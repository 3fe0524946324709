"""One optimizer step: forward and backward passes, and their sums over micro-batches and ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GateRefused
from ..mixture.losses import Terms, Weights, assignments, layer_losses, weighed
from ..mixture.routing import Routing
from ..mixture.statistics import Statistics
from .batch import Batch, forward
from .distill import Teacher, divergence_sum
from .losses import token_loss_sum
from .metrics import load_metrics
from .ranks import Ranks
from .routing import Site, forcing
from .settings import Settings

TERMS = ("balance", "z", "entropy", "importance")
"""The losses that are recorded."""


@dataclass
class Step:
    """Gradients of the mean over all tokens of a step, added up pass by pass.

    Attributes:
        predicted, real: tokens of the whole step, over micro-batches and ranks.
        ranks: who else takes part in the step.
        scored: whether routers have probabilities to balance.
        statistics: what is to be told of the routers; None: nothing.
        teacher: whose distributions count beside the text's own tokens; None: nobody's.
        counts: layer -> [E] tokens that each expert got so far, over ranks.
    """

    model: nn.Module
    sites: list[Site]
    settings: Settings
    predicted: float
    real: float
    ranks: Ranks
    scored: bool
    statistics: Statistics | None = None
    teacher: Teacher | None = None
    counts: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = self.settings
        self.weights = Weights(balance=settings.balance, z=settings.z, entropy=settings.entropy, entropy_sign=settings.entropy_sign,
                               importance=settings.importance)  # fmt: skip
        kinds = ("loss", *(("kd",) if self.teacher is not None else ()), *(TERMS if self.scored else ()))
        self.sums = dict.fromkeys(kinds, 0.0)
        self._weighed: dict[str, Tensor] = {}
        self._passed = torch.zeros((), dtype=torch.float64)

    def add(self, batch: Batch) -> None:
        """One pass forward and back.

        Raises:
            GateRefused: the loss, or a router's probabilities, are no numbers, on this rank or another.
        """
        route = self.settings.route
        # before the student's pass, whose activations stay
        taught = None if self.teacher is None else self.teacher.logits(batch)
        # the choice holds until the end of backward, where gradient checkpointing makes it again
        with forcing(self.sites, None if route == "config" else route):
            logits, seen = forward(self.model, self.sites, batch)
            trouble = self._broken_gate(seen)
            summed = token_loss_sum(logits, batch.labels)
            # every mean is over all tokens of the step, on all ranks, so uneven padding weighs nothing extra
            loss = summed / self.predicted
            self.sums["loss"] += float(summed.detach()) / self.predicted
            if taught is not None:
                kd = divergence_sum(logits, taught, batch.labels, self.settings.kd_temperature) / self.predicted
                taught = None  # the gradient that lies there now goes as soon as it is taken
                self.sums["kd"] += float(kd.detach())
                trouble = trouble or _broken_distance(float(loss.detach()), float(kd.detach()))
                loss = (1 - self.settings.kd) * loss + self.settings.kd * kd
            if self.statistics is not None:
                self.statistics.add(seen)
            self.counts = self._added(self.counts, assignments(seen))
            if self.scored:
                # what is a mean over real tokens weighs by them, as its share of the whole step's
                share = int(batch.real.sum()) / self.real
                terms = self._terms(seen, batch)
                loss = loss + share * terms.layers * self.weights.total(terms)
                for name in TERMS:
                    self.sums[name] += share * float(getattr(terms, name).detach())
            if trouble is None and not math.isfinite(float(loss.detach())):
                trouble = GateRefused(f"the loss became {float(loss.detach())}")
            self.ranks.agree(trouble)
            (loss * self.ranks.scale).backward()

    def _terms(self, seen: dict[str, Routing], batch: Batch) -> Terms:
        means = None
        if self.settings.importance:
            self._weighed = self._added(self._weighed, weighed(seen))
            self._passed = self._passed + self.ranks.total(batch.real.sum().double().cpu()).cpu()
            means = {name: mass / float(self._passed) for name, mass in self._weighed.items()}
        return layer_losses(seen, self.counts, means=means)

    def _added(self, so_far: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: so_far.get(name, 0) + self.ranks.total(value) for name, value in new.items()}

    def _broken_gate(self, seen: dict[str, Routing]) -> GateRefused | None:
        said = {name: routing.probabilities for name, routing in seen.items() if routing.probabilities is not None}
        # a comparison with NaN is false: such a router would hand tokens to nobody, and the loss would look well
        wrong = torch.stack([found.isnan().any() for found in said.values()]).tolist() if said else []
        for name, bad in zip(said, wrong, strict=True):
            if bad:
                return GateRefused(f"the probabilities of the router of {name} became nan")
        return None

    def record(self) -> dict[str, Any]:
        """The step's losses, means over all of its tokens; `routing`, where it is asked for (:func:`load_metrics`)."""
        summed = self.ranks.total(torch.tensor(list(self.sums.values()), dtype=torch.float64)).tolist()
        record: dict[str, Any] = dict(zip(self.sums, summed, strict=True))
        if self.statistics is not None:
            record["routing"] = load_metrics(self.statistics.over(self.ranks.total))
        return record


def _broken_distance(loss: float, kd: float) -> GateRefused | None:
    # where the student's own loss is no number, that is what is told
    if math.isfinite(loss) and not math.isfinite(kd):
        return GateRefused(f"the distance from the teacher became {kd}")
    return None
