"""The dense model around a mixture of several parents, as a checkpoint that is merged while it is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.family import FFN_ROLES
from moeforge.checkpoint.tensor import Companion

from .experts import Parent


class Trunk(Checkpoint):
    """The merged trunk of several parents, with the first one's FFNs.

    It stands in for the mixture while router inputs are measured: what reaches a router comes through the merged attention,
    norms and embeddings.

    Args:
        parents: of one architecture.
        method: its `merge(role, output, options)` says how a tensor is made of the parents'; None takes the first's.
    """

    root = None

    def __init__(self, parents: Sequence[Parent], method: Any, options: Any) -> None:
        first = parents[0]
        self.ref = " + ".join(parent.checkpoint.ref for parent in parents)
        self.config, self.tensors = first.checkpoint.config, first.checkpoint.tensors
        self._parents, self._method, self._options = parents, method, options
        self._pieces: dict[str, list[tuple[str, slice]]] = {}
        for (role, _), part in first.parts.items():
            if role not in FFN_ROLES:
                self._pieces.setdefault(part.name, []).append((role, part.rows or slice(None)))
        self._last: tuple[str, np.ndarray] | None = None

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        pieces = [(self._method.merge(role, self.tensors[name], self._options), where)
                  for role, where in self._pieces.get(name, ())]  # fmt: skip
        if all(merge is None for merge, _ in pieces):
            return self._parents[0].checkpoint.read(name, rows)
        # some merges look at a role's whole tensor, and some parents have fewer rows; whoever asks for some rows, of an
        # embedding, will ask for the others
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self._merged(name, pieces)
        whole = self._last[1]
        return whole if rows is None else whole[rows]

    def _merged(self, name: str, pieces: Sequence[tuple[Any, slice]]) -> np.ndarray:
        sources = [parent.checkpoint.read(name) for parent in self._parents]
        made = [sources[0][where] if merge is None else merge(*(source[where] for source in sources))
                for merge, where in pieces]  # fmt: skip
        return made[0] if len(made) == 1 else np.concatenate(made)

    def companions(self) -> Sequence[Companion]:
        return self._parents[0].checkpoint.companions()

    def provenance(self) -> dict[str, Any]:
        return {"ref": self.ref, "parents": [parent.checkpoint.provenance() for parent in self._parents]}
