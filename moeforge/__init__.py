"""moeforge: turn the checkpoint you have into the mixture of experts you want, and ship it.

Importing this package imports no torch: the command line must answer at once. The heavy entry points
(:func:`load`) are resolved on first use, and transformers' Auto classes learn about our checkpoints when they are imported.
"""

from typing import Any

from .auto import register_later

__version__ = "0.1.0"

_LAZY = {
    "load": "moeforge.model.load:load",
    "mix": "moeforge.model.runtime:mix",
    "use_kernels": "moeforge.model.kernels:use_kernels",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from moeforge.registry import load_object

        return load_object(_LAZY[name])
    raise AttributeError(f"module 'moeforge' has no attribute {name!r}")


register_later()
