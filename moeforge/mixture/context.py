"""What the mixtures of one model share during a forward pass: no globals, no module attributes that outlive a batch.

The model hands one context to all of its mixture layers. Before a forward pass it is told which tokens are real and what they
are about; while it is open each layer leaves its Routing there. It closes when the forward pass ends, so that the second
forward of gradient checkpointing, which runs inside backward, reads the same mask and records nothing twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from .routing import Routing

Force = int | Literal["label", "all"]
"""Another choice than the routers': an expert's number, every token's label, or all experts by their scores."""


@dataclass
class MixtureContext:
    """One per model and process.

    Attributes:
        real: [T] bool over the flat batch, False for padding; None: every token is real.
        labels: [T] int64: the domain, modality or task of every token, for routers and statistics that ask; None: nobody said.
        seen: layer name -> what its router said in the latest recorded forward pass.
        given: the mask that `record` was told, which stands in for the model's own.
        force: what stands in for the routers' own choice (:meth:`forcing`).
        decided: what follows from `labels` and `real` alone, by whoever asked first in this forward pass.
    """

    real: Tensor | None = None
    labels: Tensor | None = None
    seen: dict[str, Routing] = field(default_factory=dict)
    recording: bool = False
    given: Tensor | None = None
    force: Force | None = None
    decided: dict[Hashable, Routing] = field(default_factory=dict)

    def begin(self, real: Tensor | None = None, labels: Tensor | None = None) -> None:
        """A forward pass starts: [B, T] or [T] masks and labels of its tokens."""
        real = real if self.given is None else self.given
        self.real = None if real is None else real.reshape(-1).bool()
        self.labels = None if labels is None else labels.reshape(-1)
        self.decided = {}

    def of(self, tokens: int) -> tuple[Tensor | None, Tensor | None]:
        """(real, labels) of a call with that many tokens: the mask of a whole prompt does not describe the one token of a decoding
        step."""
        real, labels = (None if v is None or len(v) != tokens else v for v in (self.real, self.labels))
        return real, labels

    @contextlib.contextmanager
    def record(self, real: Tensor | None = None) -> Iterator[dict[str, Routing]]:
        """Collect what routers say while the block runs. Leave it before `backward`.

        Args:
            real: [B, T] or [T], for a caller who knows better than the model's own mask which tokens are real: packed rows end in
                padding that no attention mask marks. It stays in force after the block, for what runs again in `backward`.
        """
        self.seen, self.recording, self.given = {}, True, real
        if real is not None:
            self.begin(real, self.labels)
        try:
            yield self.seen
        finally:
            self.recording, self.given = False, None

    @contextlib.contextmanager
    def forcing(self, force: Force | None) -> Iterator[None]:
        """Within the block routers choose otherwise. Unlike `record` it must hold until after `backward`: gradient checkpointing
        chooses again there."""
        before, self.force = self.force, force
        try:
            yield
        finally:
            self.force = before

    def note(self, layer: str, routing: Routing) -> None:
        """Called by a layer."""
        if self.recording:
            self.seen[layer] = routing
