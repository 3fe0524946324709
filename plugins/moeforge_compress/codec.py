"""The contract between the stage and a method, and what both methods share.

A codec stores a matrix `[out, in]` (or fused experts `[E, ...]`) as a few tensors whose names begin with the matrix's own
name; the formats are those that stock transformers writes for bitsandbytes, so a dense model needs no code of ours to load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from moeforge.checkpoint.tensor import TensorInfo
from moeforge.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import nn

Parts = dict[str, "torch.Tensor"]
"""The stored tensors of one matrix, by role; the roles are those of :mod:`moeforge.checkpoint.quantized_schemes`."""


class Codec(Protocol):
    """What `moeforge compress --method NAME` needs, beside moeforge.pipeline.stage.Method. Holds no state."""

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    api_version: ClassVar[int]
    Options: ClassVar[type]
    headers: ClassVar[frozenset[str]]
    """Roles of the parts that describe rather than hold weights; they stay on the CPU."""

    def parts(self, info: TensorInfo, options: Any) -> dict[str, TensorInfo]:
        """The tensors stored for `info`, sizes included; the first one holds the codes. Imports no torch.

        Raises:
            UsageProblem: the options do not fit this shape.
        """
        ...

    def encode(self, array: np.ndarray, info: TensorInfo, options: Any) -> Sequence[np.ndarray]:
        """The stored tensors of one matrix, in the order of :meth:`parts`; the same bytes every time.

        Raises:
            BadInput: NaN or infinity in the weights.
        """
        ...

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """The matrix again."""
        ...

    def split(self, parts: Parts) -> list[Parts]:
        """The parts of every expert of a fused `[E, ...]` tensor, each ready for :meth:`decode`."""
        ...

    def linear(self, parts: Parts, like: nn.Linear, dtype: torch.dtype) -> nn.Module | None:
        """bitsandbytes' own module in place of `like`, computing in `dtype`; None where it would compute something else."""
        ...

    def stock_trap(self, info: TensorInfo, options: Any) -> str:
        """Why stock transformers may compute something else from this matrix; empty when it does not."""
        ...

    def quantization_config(self, options: Any, dtype: str, skip: list[str]) -> dict[str, Any]:
        """What stock transformers must find in config.json; `skip` names the linear modules left as they are."""
        ...


def float_tensor(array: np.ndarray, info: TensorInfo) -> torch.Tensor:
    """`array` for bitsandbytes (float64 as float32), proven finite.

    Raises:
        BadInput: NaN or infinity, with the tensor's name.
    """
    import torch

    from moeforge.model.weights import to_torch

    tensor = to_torch(array)
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise BadInput(f"{info.name} holds NaN or infinity and cannot be quantised; repair or retrain the source")
    return tensor
