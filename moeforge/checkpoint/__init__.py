"""Bytes to named tensors and back. Knows no model and imports no torch."""

from .base import Checkpoint
from .open import open_checkpoint
from .ops import Input, TensorOp
from .tensor import Companion, Extent, TensorInfo

__all__ = ["Checkpoint", "Companion", "Extent", "Input", "TensorInfo", "TensorOp", "open_checkpoint"]
