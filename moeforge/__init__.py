"""moeforge: turn the checkpoint you have into the mixture of experts you want, and ship it.

Importing this package imports no torch: the command line must answer at once. The heavy entry points
(:func:`load`) are resolved on first use.
"""

from typing import Any

__version__ = "0.1.0"

_LAZY = {"load": "moeforge.model.load:load"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from moeforge.registry import load_object

        return load_object(_LAZY[name])
    raise AttributeError(f"module 'moeforge' has no attribute {name!r}")
