"""The definition: a loop over experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pairs import Pairs


def grouped_gemm(x: Tensor, weight: Tensor, pairs: Pairs, *, bias: Tensor | None = None, gather: bool = True) -> Tensor:
    """See :func:`moeforge_kernels.grouped_gemm.grouped_gemm`."""
    rows = x[pairs.token] if gather else x
    ends = pairs.offsets.tolist()
    made, start = [], 0
    for expert, end in enumerate(ends):
        # an expert without rows still takes part, with zero gradients: data parallelism expects every parameter to
        made.append(F.linear(rows[start:end], weight[expert], None if bias is None else bias[expert]))
        start = end
    made.append(rows.new_zeros(len(rows) - start, weight.shape[1]))
    return torch.cat(made)
