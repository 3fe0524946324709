"""A trained model back into the checkpoint it came from: same names, same dtypes.

Tensors that did not learn are copied byte for byte from the source; only learnt ones come from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..checkpoint.base import Checkpoint
from ..checkpoint.expert_adapter import ExpertAdapter, adapter_ops
from ..checkpoint.ops import Input, TensorOp
from ..checkpoint.tensor import NUMPY_DTYPES, TensorInfo
from ..errors import BadInput
from ..model.layout import own_tensors

if TYPE_CHECKING:
    from ..model.weights import WeightMap


def trained_ops(source: Checkpoint, weights: WeightMap, learnt: Mapping[str, torch.Tensor]) -> list[TensorOp]:
    """The plan that writes the source again with `learnt` (parameter name -> values) in place of what it held.

    Args:
        weights: how the source's tensors make the model's parameters; a stack of experts is taken apart by it.

    Raises:
        BadInput: a parameter has no way back to the names it was read from.
    """
    made: dict[str, TensorOp] = {}
    for name, value in learnt.items():
        for key, part in _parts(source, weights, name, value):
            info = source.tensors[key]
            if tuple(part.shape) != info.shape:
                raise BadInput(f"{key}: trained values of shape {list(part.shape)}, the source has {list(info.shape)}")
            made[key] = TensorOp((info,), compute=partial(_encode, part, info), note="trained")
    return [made.get(name) or TensorOp((info,), (Input(source, name),)) for name, info in source.tensors.items()]


def trained_adapter_ops(
    source: ExpertAdapter, model: torch.nn.Module, learnt: Mapping[str, torch.Tensor]
) -> list[TensorOp]:
    """The plan that writes an adapter again with `learnt` in place of what it held, and nothing of its base."""
    values: dict[str, tuple[TensorInfo, Callable[[], np.ndarray]]] = {}
    for item in own_tensors(model):
        parts = item.split(learnt[item.parameter].detach()) if item.parameter in learnt else {}
        for name in item.shapes():
            info = source.tensors[name]
            make = partial(_encode, parts[name], info) if parts else partial(source.read, name)
            values[name] = (info, make)
    return adapter_ops(values)


def _parts(source: Checkpoint, weights: WeightMap, name: str, value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors as views of the parameter that they were joined into."""
    blocks = weights.sources(name)
    if not blocks:
        raise BadInput(f"{source.ref}: {name} was joined by a rule that cannot be undone, so it cannot be trained; "
                       "freeze it with --train, or report the architecture")  # fmt: skip
    if blocks == [[blocks[0][0]]] and source.tensors[blocks[0][0]].shape == tuple(value.shape):
        return [(blocks[0][0], value)]
    found, start = [], 0
    for experts in blocks:
        rows = source.tensors[experts[0]].shape[0]
        found += [(key, value[expert, start : start + rows]) for expert, key in enumerate(experts)]
        start += rows
    return found


def _encode(value: torch.Tensor, info: TensorInfo) -> np.ndarray:
    """The values in the source's dtype, rounded to nearest."""
    value = value.detach().to("cpu").contiguous()
    if info.dtype == "BF16":
        return value.to(torch.bfloat16).view(torch.int16).numpy().view(NUMPY_DTYPES["BF16"])
    return value.numpy().astype(NUMPY_DTYPES[info.dtype])
