"""The dense model around a mixture of several parents, as a checkpoint that is merged while it is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeforge.checkpoint.architectures import FFN
from moeforge.checkpoint.base import Checkpoint
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
        self._roles = {part.name: role for (role, _), part in first.parts.items() if role not in FFN}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        sources = [parent.checkpoint for parent in self._parents]
        role = self._roles.get(name)
        merge = None if role is None else self._method.merge(role, self.tensors[name], self._options)
        if merge is None:
            return sources[0].read(name, rows)
        return merge(*(source.read(name, rows) for source in sources))

    def companions(self) -> Sequence[Companion]:
        return self._parents[0].checkpoint.companions()

    def provenance(self) -> dict[str, Any]:
        return {"ref": self.ref, "parents": [parent.checkpoint.provenance() for parent in self._parents]}
