"""Which backend runs an op.

An op declares its backends in order of preference; each says in one sentence why it cannot take given tensors, or None. A
backend asked for by name that cannot is an error: nothing falls back in silence.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

ENVIRONMENT = "MOEFORGE_KERNELS"
"""Names one backend for every op, as `backend=` does for one call."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: `reference`, `torch`, `cpu`, `triton`.
        target: "module:function" below this package, imported when first used.
        why_not: called with the op's arguments; one sentence on what is in the way, or None.
    """

    name: str
    target: str
    why_not: Callable[..., str | None]

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)


class Op:
    """Backends in order of preference; the last one is the reference, which takes everything."""

    def __init__(self, name: str, *backends: Backend) -> None:
        self.name = name
        self.backends = {backend.name: backend for backend in backends}

    def choose(self, asked: str | None, *args: Any, **kwargs: Any) -> Backend:
        """The backend for these arguments.

        Raises:
            ValueError: `asked` (or the environment's wish) is unknown or cannot take them.
        """
        wish = asked or os.environ.get(ENVIRONMENT)
        if wish is not None:
            if wish not in self.backends:
                raise ValueError(f"{self.name}: no backend {wish!r}; there are {', '.join(self.backends)}")
            reason = self.backends[wish].why_not(*args, **kwargs)
            if reason is not None:
                raise ValueError(f"{self.name}: backend {wish!r} cannot run this: {reason}")
            return self.backends[wish]
        return next(b for b in self.backends.values() if b.why_not(*args, **kwargs) is None)


def always(*_: Any, **__: Any) -> None:
    """`why_not` of a backend that takes everything."""


@functools.cache
def triton_is_usable(device_type: str) -> str | None:
    """Why Triton cannot run on a device, or None: it needs a GPU, or its interpreter (`TRITON_INTERPRET=1`) on a CPU."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU"
    if device_type == "cpu" and not interpreted:
        return "Triton runs on a CPU only under its interpreter (TRITON_INTERPRET=1)"
    return None if device_type in ("cuda", "xpu", "cpu") else f"Triton does not run on {device_type}"
