"""How a method becomes a model again: the base class of every codec. The runtime, and with it torch, is imported at that moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeforge.checkpoint.base import Checkpoint

from .codec import Codec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Loads:
    """What `moeforge.load` calls when config.json names a method."""

    def load_model(self: Codec, checkpoint: Checkpoint, **how: Any) -> PreTrainedModel:
        from .runtime import load_model

        return load_model(self, checkpoint, **how)
