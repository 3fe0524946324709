"""Bytes of memory that a compression holds at once, phase by phase, foreseen from headers alone.

Upper bounds that lie near what is measured (tests/unit/compress/test_compress_memory.py). V: vocabulary, D: model width,
T: tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.ops import TensorOp
from moeforge.checkpoint.roles import role_of
from moeforge.checkpoint.tensor import TensorInfo
from moeforge.checkpoint.writer import op_memory
from moeforge.model.memory import layer_bytes

RUNNING = 600_000_000
"""The interpreter with torch, bitsandbytes and transformers' model classes."""
TOKENIZING = 60_000_000
"""The tokenizer library with a vocabulary, and the text."""
ENCODING = 17
"""Bytes a weight while bitsandbytes encodes a matrix, its source and its codes included (measured: 14 to 16.3)."""
COMPARED = 128
"""Tokens of which both models' distributions are in float64 at once (moeforge.train.evaluation.TOKENS_AT_ONCE)."""
DISTRIBUTIONS = 11
"""Arrays of so many float64 distributions that comparing two models takes."""


def by_phase(
    checkpoint: Checkpoint, ops: Sequence[TensorOp], compressed: Collection[str], tokens: int | None
) -> dict[str, int]:
    """Phase -> bytes, in the order of the phases.

    Args:
        compressed: names of the matrices that are encoded.
        tokens: that quality is measured on; None: it is not.
    """
    found = {"compressing": RUNNING + max(_encoding(op) if op.compute else op_memory(op) for op in ops)}
    if tokens is not None:
        found["measuring"] = _measuring(checkpoint, compressed, tokens)
    return found


def _encoding(op: TensorOp) -> int:
    source = op.inputs[0]
    info = source.checkpoint.tensors[source.name]
    return source.checkpoint.read_memory(source.name, info.nbytes) - info.nbytes + ENCODING * info.size


def _measuring(checkpoint: Checkpoint, compressed: Collection[str], tokens: int) -> int:
    """Both models in float32, one after the other layer by layer, then the heads of both side by side."""
    tensors = checkpoint.tensors.values()
    vocabulary, width = max(
        (info.shape for info in tensors if role_of(info) in ("embeddings", "lm_head")), default=(0, 0)
    )
    hidden = 2 * 2 * 4 * tokens * width
    heads = 2 * 4 * vocabulary * width + 2 * 4 * COMPARED * vocabulary + DISTRIBUTIONS * 8 * COMPARED * vocabulary
    reading = max(_reading(checkpoint, info, compressed) for info in tensors)
    return RUNNING + TOKENIZING + hidden + max(layer_bytes(tensors) + reading, heads)


def _reading(checkpoint: Checkpoint, info: TensorInfo, compressed: Collection[str]) -> int:
    """A whole tensor as it comes from its file; what is compressed is decoded in float32."""
    return max(
        checkpoint.read_memory(info.name, info.nbytes), info.nbytes, 3 * 4 * info.size if info.name in compressed else 0
    )
