"""A checkpoint that exists only as the plan of a dry run: config and headers without bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..errors import BadInput
from .base import Checkpoint
from .tensor import NUMPY_DTYPES, Companion, Extent, TensorInfo


class PlannedCheckpoint(Checkpoint):
    """Config and tensor headers from `Plan.as_json()`; reading raises.

    Raises:
        BadInput: the plan is not that of a checkpoint.
    """

    def __init__(self, plan: Mapping[str, Any], ref: str = "-"):
        self.ref, self.root = ref, None
        config, tensors = plan.get("config"), plan.get("tensors")
        if not isinstance(config, dict) or not isinstance(tensors, dict):
            raise BadInput(
                f"{ref}: the plan of {plan.get('verb')!r} makes no checkpoint (it has no config and tensors)"
            )
        self.config: dict[str, Any] = config
        self.tensors: Mapping[str, TensorInfo] = {}
        for name, entry in tensors.items():
            match entry:
                case [str(dtype), [*shape]] if dtype in NUMPY_DTYPES and all(type(n) is int and n >= 0 for n in shape):
                    self.tensors[name] = TensorInfo(name, dtype, tuple(shape))
                case _:
                    raise BadInput(f"{ref}: the plan gives tensor {name!r} as {entry!r}, expected [dtype, shape]")
        identity = json.dumps([config, tensors], sort_keys=True)
        self._digest = "sha256:" + hashlib.sha256(identity.encode()).hexdigest()

    def read(self, name: str, rows: slice | None = None) -> NoReturn:
        raise BadInput(
            f"{self.ref}: tensor {name!r} is only planned, it has no bytes yet; run the stage before without --dry-run"
        )

    def extent(self, name: str) -> Extent | None:
        return None

    def companions(self) -> Sequence[Companion]:
        return ()

    def provenance(self) -> dict[str, Any]:
        return {"ref": self.ref, "format": "plan", "digest": self._digest}
