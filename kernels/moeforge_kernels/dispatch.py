"""Which backend runs an op.

An op declares its backends in order of preference; each says in one sentence why it cannot take given tensors, or None. A
backend asked for by name that cannot is an error: nothing falls back in silence.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

ENVIRONMENT = "MOEFORGE_KERNELS"
"""Names one backend for every op, as `backend=` does for one call."""


_wished: str | None = None


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Within the block every op runs on that backend, in all threads: the reference where a result must not depend on the machine."""
    global _wished
    before, _wished = _wished, backend
    try:
        yield
    finally:
        _wished = before


def wished() -> str | None:
    """The back end that :func:`using` or the environment names for every op, or None."""
    return _wished or os.environ.get(ENVIRONMENT)


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: tensors are then wrappers without memory, or carry tangents."""
    stack = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return stack is not None or forward_ad._current_level >= 0


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: `reference`, `torch`, `cpu`, `triton`.
        target: "module:function" below this package.
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
        for backend in backends:
            # now, as torch.compile does not trace an import; Triton only where it may run, as importing it takes a second
            if backend.name != "triton" or None in map(triton_is_usable, ("cuda", "cpu")):
                _ = backend.function

    def choose(self, asked: str | None, *args: Any, default: str | None = None, **kwargs: Any) -> Backend:
        """The backend for these arguments.

        Args:
            default: the one to take where nobody asked for another, for ops whose plan depends on sizes.

        Raises:
            ValueError: `asked` (or :func:`using`, or the environment's wish) is unknown or cannot take them.
        """
        wish = asked or wished() or default
        if wish is not None:
            if wish not in self.backends:
                raise ValueError(f"{self.name}: no backend {wish!r}; there are {', '.join(self.backends)}")
            reason = self.backends[wish].why_not(*args, **kwargs)
            if reason is not None:
                raise ValueError(f"{self.name}: backend {wish!r} cannot run this: {reason}")
            return self.backends[wish]
        return next(b for b in self.backends.values() if b.why_not(*args, **kwargs) is None)

    def run(self, asked: str | None, *args: Any, default: str | None = None, **kwargs: Any) -> Any:
        """What the chosen backend makes of these arguments; see :meth:`choose`."""
        return self.choose(asked, *args, default=default, **kwargs).function(*args, **kwargs)


def always(*_: Any, **__: Any) -> None:
    """`why_not` of a backend that takes everything."""


HAS_TRITON = importlib.util.find_spec("triton") is not None


def triton_is_usable(device_type: str) -> str | None:
    """Why Triton cannot run on a device, or None: it needs a GPU, or its interpreter (`TRITON_INTERPRET=1`) on a CPU."""
    if not HAS_TRITON:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU"
    if device_type == "cpu" and not interpreted:
        return "Triton runs on a CPU only under its interpreter (TRITON_INTERPRET=1)"
    return None if device_type in ("cuda", "xpu", "cpu") else f"Triton does not run on {device_type}"


def triton_lacks(*tensors: torch.Tensor | None) -> str | None:
    """Why the Triton backends cannot take these tensors (the first one's type rules), or None."""
    first = tensors[0]
    assert first is not None
    if (reason := triton_is_usable(first.device.type)) is not None:
        return reason
    if first.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels compute in float32, bfloat16 and float16, not {first.dtype}"
    for tensor in tensors:
        if tensor is not None and tensor.dtype != first.dtype:
            return f"the tensors differ in type: {first.dtype} and {tensor.dtype}"
    return None
