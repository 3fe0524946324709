"""What an adapter of LoRA experts holds: names and shapes, from its entries and the base's linear maps alone. No torch, no model.

Names are those of moeforge.checkpoint.expert_names below the dense module's path; in a file `base_model.model.` stands before them,
as PEFT has it, so that plain LoRA there is what PEFT writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import BadInput
from . import expert_names
from .linear_maps import LinearMap

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PEFT_TYPE = "MOEFORGE_LORA_EXPERTS"
FORMAT_VERSION = 1
FFN_ROLES = ("gate", "up", "gate_up", "down")
READERS = (("q", "k", "v"), ("gate", "up"))
"""Linear maps of a layer that read one tensor, in the order in which they are asked to keep the router that they share."""

Maps = Mapping[tuple[str, int], LinearMap]
Entry = Mapping[str, Any]
"""One of `mixtures`: MixtureConfig as JSON, with nothing in it that :func:`complaint` finds."""


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _list_of(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(good, value))


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "site": (_is(str), "a name"), "layers": (_list_of(_whole(0)), "numbers of layers"), "experts": (_is(dict), "an object"),
    "experts.type": (_is(str), "a name"), "experts.count": (_whole(1), "a positive whole number"), "experts.options": (_is(dict), "an object"),
    "router": (_is(dict), "an object"),
}  # fmt: skip
OPTIONAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "experts.options.rank": (_whole(1), "a positive whole number"), "experts.options.targets": (_list_of(_is(str)), "names of linear maps"),
    "experts.options.share_a": (_is(bool), "true or false"), "experts.options.dora": (_is(bool), "true or false"),
    "experts.options.frozen": (_is(bool), "true or false"), "router.kind": (_is(str), "a name"), "router.noise": (_is(str), "a name"),
    "router.null_experts": (_whole(0), "a whole number"), "router.logit_bias": (_is(bool), "true or false"),
    "router.bias": (_is(bool), "true or false"), "router.input": (lambda value: value in ("site", "shared"), "'site' or 'shared'"),
}  # fmt: skip
"""What is read here of an entry: path -> (whether a value will do, what is expected). The rest is moeforge.mixture.config's to judge."""


def complaint(entry: Any) -> str | None:
    """What keeps an entry from being read: key, value and what is expected of it; None where nothing does."""
    if not isinstance(entry, dict):
        return f" = {entry!r}: expected an object with site, layers, experts and router"
    for path, (good, expected) in (FIELDS | OPTIONAL).items():
        *holders, key = path.split(".")
        place: Any = entry
        for holder in holders:
            place = place[holder]
        if key not in place:
            if path in FIELDS:
                return f".{path} is missing: expected {expected}"
        elif not good(place[key]):
            return f".{path} = {place[key]!r}: expected {expected}"
    return None


def shapes_of(entries: Sequence[Entry], maps: Maps, ref: str) -> dict[str, tuple[int, ...]]:
    """Name (without the prefix) -> shape of every tensor that the entries need.

    Raises:
        BadInput: a site that the base does not have, or an entry that no adapter can hold.
    """
    found: dict[str, tuple[int, ...]] = {}
    followed = deciders(entries, ref)
    for entry in entries:
        for layer in entry["layers"]:
            router = () if (entry["site"], layer) in followed else router_of(entry, layer, maps, ref)
            for name, shape in (*experts_of(entry, layer, maps, ref), *router):
                if name in found:
                    raise BadInput(
                        f"{ref}: mixtures: {name} would stand there twice: two entries for one site of layer {layer}"
                    )
                found[name] = shape
    return found


def deciders(entries: Iterable[Entry], ref: str) -> dict[tuple[str, int], str]:
    """(site, layer) -> the site whose router decides there, for those that have none of their own: of the sites of a layer that
    read one tensor, whose routers say input = 'shared', all but the first.

    Raises:
        BadInput: sites that would share a router ask for different ones, or have different numbers of experts.
    """
    found: dict[tuple[str, int], str] = {}
    first: dict[tuple[str, int, int], Entry] = {}
    for entry in sorted(entries, key=lambda entry: _reads(entry["site"])[1]):
        site, group = entry["site"], _reads(entry["site"])[0]
        if group is None or entry["router"].get("input", "site") != "shared":
            continue
        for layer in entry["layers"]:
            leader = first.setdefault((site.rpartition(".")[0], group, layer), entry)
            if leader["site"] == site:
                continue
            if (unlike := _difference(leader, entry)) is not None:
                raise BadInput(f"{ref}: mixtures: {leader['site']} and {site} of layer {layer} share a router (router.input = 'shared'), and "
                               f"{unlike}; make them alike, or say 'site'")  # fmt: skip
            found[site, layer] = leader["site"]
    return found


def _reads(site: str) -> tuple[int | None, int]:
    """(number in READERS of what a site reads, its place there); None: nobody else reads that."""
    kind = site.rpartition(".")[2]
    return next(((i, group.index(kind)) for i, group in enumerate(READERS) if kind in group), (None, 0))


def _difference(one: Entry, other: Entry) -> str | None:
    """What keeps two entries from having one router; None: nothing."""
    values = [
        {"experts.count": e["experts"]["count"], **{f"router.{k}": v for k, v in e["router"].items()}}
        for e in (one, other)
    ]
    unlike = next((key for key in sorted(values[0] | values[1]) if values[0].get(key) != values[1].get(key)), None)
    return None if unlike is None else f"{unlike} is {values[0].get(unlike)!r} and {values[1].get(unlike)!r}"


def stored_at(entry: Entry, site: str | None) -> Entry:
    """The entry as the site that keeps its router would have it; None: its own."""
    return entry if site is None else {**entry, "site": site}


def maps_of(entry: Entry, layer: int, maps: Maps, ref: str) -> dict[str, LinearMap]:
    """Role -> linear map of the entry's site in that layer.

    Raises:
        BadInput: the base has none.
    """
    site = entry["site"]
    wanted = FFN_ROLES if site == "ffn" else (site,)
    found = {role: maps[role, layer] for role in wanted if (role, layer) in maps}
    if not found or (site == "ffn" and "down" not in found):
        there = sorted({role for role, index in maps if index == layer}) or ["nothing"]
        raise BadInput(f"{ref}: site {site!r} of layer {layer}: the base has {', '.join(there)} there")
    return found


def root_of(here: Mapping[str, LinearMap]) -> str:
    """The module below which a site's mixture is stored."""
    paths = [f"{one.path}.weight" for one in here.values()]
    return paths[0].removesuffix(".weight") if len(paths) == 1 else expert_names.root(paths)


def experts_of(entry: Entry, layer: int, maps: Maps, ref: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the experts' tensors."""
    here, experts = maps_of(entry, layer, maps, ref), entry["experts"]
    options, count, kind = experts["options"], experts["count"], experts["type"]
    rank, root = options.get("rank", 8), root_of(here)
    if kind not in ("lora", "lora_ffn") or (kind == "lora") != (entry["site"] != "ffn"):
        raise BadInput(
            f"{ref}: experts of type {kind!r} at site {entry['site']!r}: an adapter holds 'lora' at linear maps and 'lora_ffn' at ffn"
        )
    for role, one in here.items():
        if kind == "lora_ffn" and role not in options.get("targets", FFN_ROLES):
            continue
        below = one.path[len(root) + 1 :]

        def name(leaf: str, numbered: bool, e: int = 0, below: str = below) -> str:
            member = (f"{expert_names.EXPERTS}.{e}",) if numbered else ()
            return expert_names.below(root, ".".join((*member, *filter(None, (below,)), leaf)))

        alone = kind == "lora" and count == 1
        if kind == "lora" and options.get("share_a"):
            yield name("lora_A.weight", False), (rank, one.inputs)
        for e in range(count):
            if not (kind == "lora" and options.get("share_a")):
                yield name("lora_A.weight", not alone, e), (rank, one.inputs)
            yield name("lora_B.weight", not alone, e), (one.outputs, rank)
            if options.get("dora"):
                yield name("lora_magnitude_vector", not alone, e), (one.outputs,)


def router_of(entry: Entry, layer: int, maps: Maps, ref: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the router's tensors."""
    here, router = maps_of(entry, layer, maps, ref), entry["router"]
    total = entry["experts"]["count"] + router.get("null_experts", 0)
    width, root = next(iter(here.values())).inputs, root_of(here)
    kind = router.get("kind", "linear")
    shapes = {
        "linear": {"weight": (total, width)},
        "cosine": {"weight": (total, width)},
        "static": {"weight": (total,)},
    }.get(kind, {})
    if kind == "linear" and router.get("logit_bias"):
        shapes |= {"bias": (total,)}
    if router.get("noise") == "noisy_topk":
        shapes |= {"noise_weight": (total, width)}
    if router.get("bias"):
        shapes |= {"selection_bias": (total,)}
    for leaf, shape in shapes.items():
        yield expert_names.below(root, f"{expert_names.ROUTER}.{leaf}"), shape
