"""LoRA experts for the few pairs of a decoding step: one compiled call, which reads the A and B that were chosen, where they lie.

There is no way back: gradients are for other back ends.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..cpu import library
from ..pairs import Pairs

PAIRS = 32
"""Up to which it is taken unasked: with more, products that read an A once for all of its pairs are faster."""


def why_not(x: Tensor, pairs: Pairs, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> str | None:
    """What is in the way, in one sentence."""
    return library.lacks_way_there(x=x, lora_a=lora_a, lora_b=lora_b, weight=pairs.weight)


def lora_experts(x: Tensor, pairs: Pairs, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> Tensor:
    """See :func:`moeforge_kernels.lora_experts.lora_experts`."""
    lists, x, a, b = Lists.of(pairs, scale), library.rows(x), library.rows(lora_a), library.rows(lora_b)
    count, (experts, outputs, rank), (tokens, width) = lists.token.shape[0], b.shape, x.shape
    low, out = library.empty(count, rank), library.empty(tokens, outputs)
    call = library.LoraFew(
        tokens, count, width, outputs, experts, rank, torch.get_num_threads(), *(t.data_ptr() for t in lists), x.data_ptr(), x.stride(0),
        a.data_ptr(), a.stride(0) if a.shape[0] > 1 else 0, a.stride(1), b.data_ptr(), b.stride(0), b.stride(1),
        low.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    library.run("lora_few", call, x.dtype)
    return out.to(x.dtype)


class Lists(NamedTuple):
    """The pairs and scales as the kernels read them, to be kept until the call has ended."""

    token: Tensor
    weight: Tensor
    offsets: Tensor
    scale: Tensor

    @classmethod
    def of(cls, pairs: Pairs, scale: Tensor) -> Self:
        weight = pairs.weight.detach().float().contiguous()
        return cls(
            pairs.token.long().contiguous(), weight, pairs.offsets.int().contiguous(), scale.float().contiguous()
        )
