"""Bytes of memory that running models layer by layer takes, foreseen from headers alone. No torch.

Upper bounds that lie near what is measured (tests/unit/upcycle/test_upcycle_memory.py). D: model width, F: FFN width,
K: active experts, T: tokens, V: vocabulary.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence

from ..checkpoint.anatomy import anatomy, plain_config
from ..checkpoint.base import Checkpoint
from ..checkpoint.planned import PlannedCheckpoint
from ..checkpoint.roles import place_of, role_of
from ..checkpoint.tensor import TensorInfo
from .proof import HEAD, POSITIONS, token_lengths

RUNNING = 600_000_000
"""The interpreter with torch, transformers' model classes and what a first forward leaves."""


def proof_bytes(first: Checkpoint, second: Checkpoint, texts: Sequence[int] = ()) -> int:
    """What :func:`moeforge.model.proof.prove` takes: the larger model's largest layer (or embedding), one sequence's logits,
    all hidden states.

    Args:
        second: may be a plan; it counts as what will be written, plain tensors in a directory.
        texts: T of each sequence of real text that is run beside the random ids.
    """
    lengths = [*token_lengths(first.config), *texts]
    tensors, longest = second.tensors.values(), max(lengths)
    vocabulary, width = max(
        (info.shape for info in tensors if role_of(info) in ("embeddings", "lm_head") and len(info.shape) == 2),
        default=(0, 0),
    )  # V, D
    weights = max(weight_bytes(first), weight_bytes(second))
    hidden = 8 * 4 * sum(lengths) * width
    masks = 2 * 4 * sum(length**2 for length in lengths)
    logits = 4 * (longest + HEAD) * vocabulary + 6 * 8 * POSITIONS * vocabulary
    ffn = 4 * 4 * longest * _active_width(second)
    return RUNNING + weights + hidden + masks + max(logits, ffn)


def fits(needed: int, limit: int | None = None) -> bool:
    """Whether what takes `needed` bytes may be done unasked: within three quarters of the free memory.

    Args:
        limit: a further bound; one above what the machine has makes it no larger.
    """
    free = available_memory() * 3 // 4
    return needed <= (free if limit is None else min(limit, free))


def weight_bytes(checkpoint: Checkpoint) -> int:
    """One layer in float32, while its last tensor is read and put in place."""
    return layer_bytes(checkpoint.tensors.values()) + max(
        (_placing(checkpoint, info) for info in checkpoint.tensors.values()), default=0
    )


def layer_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Bytes in float32 of the largest decoder layer, or of the largest tensor outside the layers where that is more."""
    sizes: Counter[int | str] = Counter()
    for info in tensors:
        layer, _ = place_of(info.name)
        sizes[info.name if layer is None else layer] += 4 * info.size
    return max(sizes.values(), default=0)


def available_memory() -> int:
    """Bytes of memory that can be had without swapping, or all the memory where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 8 << 30


def _placing(checkpoint: Checkpoint, info: TensorInfo) -> int:
    """Bytes beside the layer: a whole tensor as it comes from its file, and a float32 copy of what is computed on the way
    (decoded, merged) or rearranged once read (experts that are stored in one tensor)."""
    computed = not isinstance(checkpoint, PlannedCheckpoint) and checkpoint.extent(info.name) is None
    copied = 4 * info.size if computed or len(info.shape) == 3 else 0
    return max(checkpoint.read_memory(info.name, info.nbytes), info.nbytes + copied)


def _active_width(checkpoint: Checkpoint) -> int:
    """F of a dense layer or K * F of a sparse one, whichever is more; all experts where the config does not say how many."""
    given = plain_config(checkpoint.config).get("intermediate_size")
    mixtures = anatomy(checkpoint.config, checkpoint.tensors).mixtures
    return max(
        given if isinstance(given, int) else 0,
        *((found.top_k or found.experts) * (found.width or 0) + (found.shared_width or 0) for found in mixtures),
        0,
    )
