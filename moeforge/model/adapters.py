"""LoRA experts beside a loaded model: put in place, filled from an adapter, read back out of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.expert_adapter import ExpertAdapter
from ..errors import BadInput
from ..mixture.config import MixtureConfig
from .layout import OwnTensor, own_tensors
from .runtime import mix
from .weights import to_torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_adapter(
    adapter: ExpertAdapter, *, dtype: Any = None, device: Any = "cpu", attention: str | None = None
) -> Any:
    """The base with the adapter's experts in place, in evaluation mode. Nothing of the base asks for gradients.

    Args:
        adapter: left open. The others are those of :func:`moeforge.model.load.load`, and are handed to the base's.

    Raises:
        BadInput: the adapter's entries have no meaning, or do not fit the model.
    """
    from .load import load

    model = load(adapter.base, dtype=dtype, device=device, attention=attention)
    put(model, [MixtureConfig.from_json(entry) for entry in adapter.entries], adapter.ref)
    fill(model, adapter)
    return model


def put(model: PreTrainedModel, entries: Sequence[MixtureConfig], ref: str) -> list[OwnTensor]:
    """Freeze a model and put mixtures beside what it has, their values not set yet.

    Raises:
        BadInput: mixtures that do not fit it.
    """
    model.requires_grad_(False)
    mix(model, entries)
    try:
        return own_tensors(model)
    except BadInput as error:
        raise BadInput(f"{ref}: {error}") from error


@torch.no_grad()
def fill(model: Any, adapter: ExpertAdapter) -> None:
    """Set every parameter of the mixtures from the adapter's tensors.

    Raises:
        BadInput: the mixtures of the model and the adapter's tensors are not the same.
    """
    own = fitting(own_tensors(model), adapter)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    for item in own:
        for name, part in item.split(state[item.parameter]).items():
            part.copy_(to_torch(adapter.read(name)))


def fitting(own: list[OwnTensor], adapter: ExpertAdapter) -> list[OwnTensor]:
    """The same list, if an adapter holds just these tensors.

    Raises:
        BadInput: names one that only one side knows, or that has two shapes.
    """
    asked = {name: shape for item in own for name, shape in item.shapes().items()}
    held = {name: adapter.tensors[name].shape for name in adapter.own}
    if wrong := sorted(name for name in asked.keys() | held.keys() if asked.get(name) != held.get(name)):
        name = wrong[0]
        raise BadInput(
            f"{adapter.ref}: {name}: the model asks for {_shape(asked.get(name))}, the adapter holds {_shape(held.get(name))}"
        )
    return own


@torch.no_grad()
def read_own(adapter: ExpertAdapter, item: OwnTensor) -> Tensor:
    """A parameter's float32 value from an adapter's tensors, unrounded by what the model computes in."""
    value = torch.empty(item.shape)
    for name, part in item.split(value).items():
        part.copy_(to_torch(adapter.read(name)))
    return value


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))


def values_of(model: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Name on disk -> value of every tensor of the adapter.

    Args:
        state: parameter name -> value, for those that are held elsewhere more precisely.
    """
    held = dict(model.named_parameters()) | dict(model.named_buffers()) | dict(state or {})
    return {
        name: part for item in own_tensors(model) for name, part in item.split(held[item.parameter].detach()).items()
    }


@contextlib.contextmanager
def forced(model: Any, expert: int) -> Iterator[None]:
    """Within the block every token visits one expert with weight 1: that of number `expert`, modulo how many a site has."""
    contexts = {id(layer.context): layer.context for _, layer in model.mixtures.values() if layer.context is not None}
    with contextlib.ExitStack() as stack:
        for context in contexts.values():
            stack.enter_context(context.forcing(expert))
        yield
