"""This process among those that a launcher (torchrun, accelerate launch) started together. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """One of `world` processes.

    Attributes:
        index: its number among all; the first one talks, and writes.
        local: its number on its machine.
    """

    index: int = 0
    world: int = 1
    local: int = 0
    launched: bool = False
    """Whether a launcher started it."""

    @property
    def silent(self) -> bool:
        """Whether another process of this machine meets the same errors of use and says so."""
        return self.index > 0 and self.local > 0


def here() -> Rank:
    """What the launcher's variables say; alone where one of them is missing: cluster software sets some of them as well."""
    found = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    return Rank(*map(int, found), launched=True) if all(value.isdigit() for value in found) else Rank()
