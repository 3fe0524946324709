"""An adapter of ours laid out for a writer, and the refusals that writers share."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from moeforge.checkpoint.adapter_layout import Maps, deciders, maps_of, root_of, stored_at
from moeforge.checkpoint.expert_adapter import ExpertAdapter, plain_tensors
from moeforge.checkpoint.expert_names import ROUTER
from moeforge.checkpoint.linear_maps import linear_maps
from moeforge.checkpoint.lora_formats.places import Place, places
from moeforge.errors import BadInput
from moeforge.mixture.config import MixtureConfig, RouterConfig
from moeforge.mixture.low_rank import LowRank

OPTIONS: Mapping[str, Any] = {
    key: list(value) if isinstance(value, tuple) else value
    for key, value in asdict(LowRank()).items()
    if key != "targets"
}
"""What an option is where an entry does not say."""


@dataclass(frozen=True)
class Cut:
    """A tensor of the adapter, or the corner of it that is no padding.

    Attributes:
        name: ours.
        shape: of what is written.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Package:
    """One directory to be written.

    Attributes:
        folder: below the output; empty for the output itself.
        settings: adapter_config.json.
        tensors: their name -> which of ours it is.
        pickled: adapter_model.bin, by torch.save in float32; else adapter_model.safetensors.
    """

    folder: str
    settings: dict[str, Any]
    tensors: dict[str, Cut]
    pickled: bool = False


@dataclass(frozen=True)
class Adapter:
    """An open adapter, read for a writer.

    Attributes:
        entries: its mixtures, every field there.
        options: of each entry, every option there.
        places: of each entry, its tensors; a router that several sites share stands at each of them, as every format has it.
        format: the format's name, for refusals.
        shared: whether there is such a router.
    """

    source: ExpertAdapter
    format: str
    maps: Maps
    entries: list[MixtureConfig]
    options: list[dict[str, Any]]
    places: list[list[Place]]
    shared: bool

    @classmethod
    def of(cls, source: ExpertAdapter, format: str) -> Adapter:
        entries = [MixtureConfig.from_json(raw) for raw in source.entries]
        maps = linear_maps(source.base.config, plain_tensors(source.base), source.base.ref)
        options = [{**OPTIONS, **{k: v for k, v in e.experts.options.items() if k != "targets"}} for e in entries]
        followed = deciders(source.entries, source.ref)
        found = [
            [_stored(place, followed, maps, source.ref) for place in places([e.as_json()], maps, source.ref)]
            for e in entries
        ]
        apart = [replace(e, router=replace(e.router, input="site")) for e in entries]
        return cls(source, format, maps, apart, options, found, bool(followed))

    def parted(self) -> list[str]:
        """A warning where a shared router is written at several sites."""
        return [f"router.input = 'shared': {self.format} has a router for each site, so every site gets the shared one: the same function, "
                "until they are trained further"] if self.shared else []  # fmt: skip

    def refuse(self, field: str, value: Any, because: str) -> typing.NoReturn:
        """Raises:
        BadInput: always."""
        raise BadInput(f"{self.source.ref}: {field} = {value!r}: {self.format} {because}")

    def plain(self) -> list[int]:
        """Numbers of the entries without a router."""
        return [i for i, entry in enumerate(self.entries) if entry.router.kind == "always"]

    def routed(self) -> list[int]:
        return [i for i, entry in enumerate(self.entries) if entry.router.kind != "always"]

    def only(self, number: int, may: Iterable[str]) -> dict[str, Any]:
        """The options of an entry.

        Raises:
            BadInput: one that is neither in `may` nor as it is by default.
        """
        options, site = self.options[number], self.entries[number].site
        for key, value in options.items():
            if key not in may and value != OPTIONS[key]:
                self.refuse(f"options.{key} of site {site}", value, "has no place for it")
        return options

    def same(self, numbers: Iterable[int], of: Callable[[int], Any], field: str) -> Any:
        """What all of the entries say.

        Raises:
            BadInput: two say different things.
        """
        found = [of(number) for number in numbers]
        for value in found:
            if value != found[0]:
                self.refuse(field, value, f"has one for the whole adapter, and another entry says {found[0]!r}")
        return found[0]

    def everywhere(self, numbers: Iterable[int]) -> None:
        """Raises:
        BadInput: an entry leaves out layers that its site is in."""
        layers: dict[str, set[int]] = {}
        for number in numbers:
            layers.setdefault(self.entries[number].site, set()).update(self.entries[number].layers)
        for site, found in layers.items():
            role = "down" if site == "ffn" else site
            if lost := sorted({layer for name, layer in self.maps if name == role} - found):
                self.refuse(
                    f"layers of site {site}", sorted(found), f"has experts in all layers, and {lost[0]} has none"
                )

    def router(self, number: int, meant: RouterConfig) -> None:
        """Raises:
        BadInput: the entry's router is another than what the format means; first values do not matter."""
        entry = self.entries[number]
        meant = replace(meant, init_std=entry.router.init_std, noise_scale=entry.router.noise_scale)
        for item in fields(RouterConfig):
            value = getattr(entry.router, item.name)
            if value != getattr(meant, item.name):
                self.refuse(f"router.{item.name} of site {entry.site}", value, f"means {getattr(meant, item.name)!r}")

    def whole(self, alpha: float) -> int:
        """lora_alpha, which these programs want as a whole number.

        Raises:
            BadInput: it is none.
        """
        if alpha != int(alpha):
            self.refuse("options.alpha", alpha, "takes whole numbers only")
        return int(alpha)

    def modules(self, numbers: Iterable[int]) -> list[str]:
        """Last parts of the names of the linear maps that have deltas, in the order of the model."""
        found: dict[str, None] = {}
        for number in numbers:
            for place in self.places[number]:
                if place.leaf == "lora_B.weight":
                    found[place.module.rpartition(".")[2]] = None
        return list(found)

    def base(self) -> str:
        return str(self.source.settings["base_model_name_or_path"])


def _stored(place: Place, followed: Mapping[tuple[str, int], str], maps: Maps, ref: str) -> Place:
    """The place with the name of the tensor that holds its values."""
    keeper = followed.get((place.entry["site"], place.layer))
    if keeper is None or place.role != place.entry["site"] or not place.leaf.startswith(f"{ROUTER}."):
        return place
    return replace(
        place, name=f"{root_of(maps_of(stored_at(place.entry, keeper), place.layer, maps, ref))}.{place.leaf}"
    )


def cuts(places: Iterable[Place], naming: Callable[[Place], str]) -> dict[str, Cut]:
    """Whole tensors under a format's names."""
    return {naming(place): Cut(place.name, place.shape) for place in places}
