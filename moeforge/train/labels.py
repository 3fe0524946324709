"""What every document is about: the number of its source, or a field of its record; and what routers make of it. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from ..errors import BadInput, UsageProblem
from .data import Label, Pool

Route = Literal["config", "label", "all"]
"""How tokens choose while training: as the routers' config says, each its label's expert, or all experts by their scores."""


def name_labels(pools: Sequence[Pool], known: Sequence[str] = ()) -> list[str]:
    """The names of labels that are words, by number: `known` (what the experts are called) where it holds all of them, else sorted.
    Empty where labels are numbers."""
    words = sorted({document.label for pool in pools for document in pool.documents if isinstance(document.label, str)})
    return list(known) if words and set(words) <= set(known) else words


def number_labels(pools: Iterable[Pool], names: Sequence[str]) -> list[Pool]:
    """The pools with each label as a number.

    Raises:
        BadInput: numbers and words in one corpus, or a number below 0.
    """
    numbers = {name: number for number, name in enumerate(names)}

    def number(key: str, label: Label) -> int:
        if names and not isinstance(label, str):
            raise BadInput(f"{key}: its label is {label!r}, others are words such as {names[0]!r}; use one kind")
        found = numbers[label] if isinstance(label, str) else label
        if found < 0:
            raise BadInput(f"{key}: its label is {label!r}; labels are numbers from 0, or words")
        return found

    return [
        replace(pool, documents=tuple(replace(d, label=number(d.key, d.label)) for d in pool.documents))
        for pool in pools
    ]


def labels_of(pools: Iterable[Pool]) -> int:
    """How many labels there may be: the largest, and one."""
    return 1 + max(d.label for pool in pools for d in pool.documents if isinstance(d.label, int))


def check_route(config: Mapping[str, Any], route: Route, labels: int, ref: str) -> None:
    """Refuse a way to choose that these mixtures do not have.

    Args:
        config: config.json, or what stands for it.
        labels: how many there are.

    Raises:
        UsageProblem: names what is asked and what is there.
    """
    entries = [entry for entry in config.get("mixtures") or () if entry["router"].get("kind") != "always"]
    if route != "config" and not entries:
        raise UsageProblem(f"--routing {route}: {ref} has no routers of moeforge's own mixtures; use --routing config")
    asking = entries if route == "label" else [e for e in entries if e["router"].get("kind") == "label"]
    if route == "all" and asking:
        raise UsageProblem(
            f"--routing all: the routers of {ref} at {asking[0]['site']} choose by label and have no scores"
        )
    few = min(asking, key=lambda entry: entry["experts"]["count"], default=None)
    if few is not None and labels > few["experts"]["count"]:
        raise UsageProblem(
            f"{labels} labels (one a --data source, or those of --label-field) and {few['experts']['count']} experts at "
            f"{few['site']} of layer {few['layers'][0]}: every label needs an expert of its own; give fewer or attach more"
        )
