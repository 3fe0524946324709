"""An adapter of another program as this one sees it, and the fitting of its tensors to a base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import BadInput
from ..adapter_layout import Maps
from ..tensor import FLOATS
from .places import Place, places
from .source import CONFIG, Source

Naming = Callable[[Place], str]
"""What a format calls a tensor."""


@dataclass(frozen=True)
class Held:
    """One tensor: how to read it, its shape and dtype as stored."""

    read: Callable[[], np.ndarray]
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Foreign:
    """See the module.

    Attributes:
        entries: `mixtures` (JSON of moeforge.mixture.config.MixtureConfig; what is left out is as its defaults say).
        tensors: our name -> tensor; all that the entries need.
        settings: adapter_config.json as it was.
        warnings: where what is computed differs from what the other program computes.
        notes: what was read and does not matter to what is computed.
    """

    entries: list[dict[str, Any]]
    tensors: Mapping[str, Held]
    settings: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def fit(
    source: Source, entries: list[dict[str, Any]], maps: Maps, naming: Naming, *, besides: Iterable[str] = ()
) -> dict[str, Held]:
    """Find every tensor that the entries need.

    Args:
        besides: tensors that are accounted for elsewhere.

    Raises:
        BadInput: one is missing, has another shape than the base asks for, is no number, or is left over.
    """
    found: dict[str, Held] = {}
    left = set(source.tensors) - set(besides)
    for place in places(entries, maps, source.ref):
        name = naming(place)
        info = source.tensors.get(name)
        if info is None:
            raise BadInput(
                f"{source.where}: {name} is missing, which {CONFIG} asks for at layer {place.layer}; the adapter is incomplete or of another base"
            )
        if info.shape != place.shape:
            raise BadInput(f"{source.where}: {name} is {list(info.shape)}, {CONFIG} and the base ask for {list(place.shape)}; "
                           "was it trained on another base?")  # fmt: skip
        if info.dtype not in FLOATS:
            raise BadInput(f"{source.where}: {name} is {info.dtype}: an adapter's weights are floating-point numbers")
        left.discard(name)
        found[place.name] = Held(lambda name=name: source.read(name), info.shape, info.dtype)
    if left:
        raise BadInput(
            f"{source.where}: {min(left)} has no place in the base or is not what {CONFIG} describes; nothing is left out in silence"
        )
    return found
