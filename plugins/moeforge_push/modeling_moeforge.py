"""Loads this checkpoint through the package moeforge, which holds the code of its mixture; there is none in this repository."""

try:
    from moeforge.model import runtime
    from moeforge.model.config import MoeforgeConfig as MoeforgeConfig
except ImportError as error:
    raise ImportError(
        f"this checkpoint is a mixture that the package moeforge runs: pip install moeforge ({error})"
    ) from None

runtime.register()
globals().update({head.__name__: head for head in runtime.HEADS})
