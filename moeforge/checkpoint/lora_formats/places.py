"""What each tensor of an adapter of ours is: the bridge between our names and those of other programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..adapter_layout import Entry, Maps, deciders, experts_of, maps_of, root_of, router_of
from ..expert_names import ROUTER, dense_name

LEAVES = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
GATE = f"{ROUTER}.weight"
"""The leaf of a router."""


@dataclass(frozen=True)
class Place:
    """One tensor.

    Attributes:
        name: ours, without PEFT's prefix.
        shape: of it.
        entry: the mixture that it belongs to.
        layer: its layer.
        role: of the linear map; `ffn` for the router of a whole network.
        module: the dense module that it stands beside: a linear map's, or the network's.
        expert: its number; None for a router, for plain LoRA and for an A that all experts share.
        leaf: `lora_A.weight`, ..., or that of a router.
    """

    name: str
    shape: tuple[int, ...]
    entry: Entry
    layer: int
    role: str
    module: str
    expert: int | None
    leaf: str


def places(entries: Sequence[Entry], maps: Maps, ref: str) -> list[Place]:
    """Every tensor that the entries need.

    Raises:
        BadInput: a site that the base does not have.
    """
    roles = {one.path: one.role for one in maps.values()}
    followed = deciders(entries, ref)
    found = []
    for entry in entries:
        routed = entry["router"].get("kind", "linear") != "always"
        for layer in entry["layers"]:
            for name, shape in experts_of(entry, layer, maps, ref):
                dense, number = dense_name(name)
                leaf = next(leaf for leaf in LEAVES if dense.endswith(f".{leaf}"))
                module = dense.removesuffix(f".{leaf}")
                # a single expert has no number in our name, but it has one where a router stands beside it
                expert = 0 if number is None and routed and entry["experts"]["count"] == 1 else number
                found.append(Place(name, shape, entry, layer, roles[module], module, _number(expert), leaf))
            if (entry["site"], layer) in followed:
                continue
            root = root_of(maps_of(entry, layer, maps, ref))
            for name, shape in router_of(entry, layer, maps, ref):
                found.append(Place(name, shape, entry, layer, entry["site"], root, None, name[len(root) + 1 :]))
    return found


def _number(expert: int | str | None) -> int | None:
    assert not isinstance(expert, str)  # an adapter has no shared experts
    return expert


def tail(place: Place) -> str:
    """The module below its layer, without the model's own prefix: `layers.3.self_attn.q_proj`."""
    above, _, below = place.module.partition(f".{place.layer}.")
    return f"{above.rpartition('.')[2]}.{place.layer}.{below}"


def layers_with(role: str, maps: Maps) -> list[int]:
    return [layer for found, layer in maps if found == role]


def leaves(maps: Maps) -> dict[str, list[str]]:
    """Name of the module, without its path -> roles that it has: {"q_proj": ["q"], ...}."""
    found: dict[str, list[str]] = {}
    for one in maps.values():
        roles = found.setdefault(one.path.rpartition(".")[2], [])
        if one.role not in roles:
            roles.append(one.role)
    return found


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
