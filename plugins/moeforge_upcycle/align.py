"""Match the neurons of one FFN to those of another.

The neurons of an FFN have no order: the same permutation of the rows of gate and up and the columns of down leaves the
function unchanged. So experts of different training runs can be brought into a common order for free before
anything is averaged over them or routed between them (Git Re-Basin 2209.04836; Symphony-MoE 2509.18542).
"""

from __future__ import annotations

import numpy as np

from .calibrate import SAMPLES
from .recipe import Layer

NEEDS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "weights": frozenset(),
    "activations": frozenset({"activations"}),
}
"""Kind -> what calibration must measure first, of every parent on the same tokens."""


def work_bytes(kind: str, model_width: int, ffn_width: int) -> int:
    """Bytes that :func:`align` holds beside the statistics, for one layer."""
    pairs = 32 * ffn_width**2
    return {
        "none": 0,
        "weights": pairs + 32 * ffn_width * model_width,
        "activations": pairs + 48 * ffn_width * SAMPLES,
    }[kind]


def align(kind: str, layer: Layer, parent: int, anchor: int = 0) -> np.ndarray:
    """For every neuron of `anchor` the matching neuron of `parent`: a permutation [F] int64.

    The assignment of largest total similarity (Crouse's shortest augmenting paths, scipy), where similarity is

    - `weights`: of the gate rows, the up rows and the down columns, as they are: <g, g'> + <u, u'> + <d, d'>.
    - `activations`: the correlation over the sampled tokens.

    Ties and clones go to the lower index, so a parent equal to the anchor stays in its order.
    """
    from scipy.optimize import linear_sum_assignment

    similarity = _by_weights(layer, parent, anchor) if kind == "weights" else _by_activations(layer, parent, anchor)
    _, columns = linear_sum_assignment(similarity, maximize=True)
    return columns.astype(np.int64)


def _by_weights(layer: Layer, parent: int, anchor: int) -> np.ndarray:
    total = np.zeros((layer.ffn_width, layer.ffn_width))
    for matrix in layer.matrices:
        ours, theirs = (layer.read(matrix, which).astype(np.float64) for which in (anchor, parent))
        total += ours.T @ theirs if matrix == "down" else ours @ theirs.T
    return total


def _by_activations(layer: Layer, parent: int, anchor: int) -> np.ndarray:
    def standard(which: int) -> np.ndarray:
        stats = layer.stats[which]
        assert stats is not None and stats.activations is not None, "stats as in NEEDS"
        x = stats.activations.astype(np.float64)
        x = x - x.mean(0)
        return x / np.maximum(np.linalg.norm(x, axis=0), 1e-12)

    return standard(anchor).T @ standard(parent)
