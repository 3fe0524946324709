"""The values of a dense model's config.json, checked for their kind and read whatever dialect they were written in.

A config comes from strangers: a value of another kind than the family's (a word for a number, a list of the wrong length) is
refused here by key and value, so that everything behind may take the kinds for granted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import BadInput

MAX_LAYERS = 10_000
"""More layers than any model has; what is planned layer by layer must not hang on a typing error."""
LAYER_TYPES = ("full_attention", "sliding_attention")
SIZES = frozenset({"sliding_window", "sliding_window_pattern", "no_rope_layer_interval", "max_position_embeddings",
                   "original_max_position_embeddings", "num_key_value_heads", "head_dim"})  # fmt: skip
"""Whole numbers from 1 on, where they are given at all."""
DERIVED = frozenset({"layer_types", "no_rope_layers"})
"""Lists with a value a layer, checked by :func:`per_layer`."""


def check_size(config: Mapping[str, Any], key: str, model_type: str, written: str = "") -> None:
    """Expect a whole number from 1 on at `key`, or at `written` where the family calls it otherwise.

    Raises:
        BadInput: there is none.
    """
    written = written or key
    value = config.get(written)
    if not _is_size(value):
        raise BadInput(f"config.json: {written} = {value!r}; a {model_type} model needs a positive number")
    if key == "num_hidden_layers" and config[written] > MAX_LAYERS:
        raise BadInput(f"config.json: {written} = {value}; moeforge reads models of at most {MAX_LAYERS} layers")


def check_kinds(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Compare values with the kind of the family's defaults; null stands for "none" and is of every kind.

    Raises:
        BadInput: naming the first key whose value is of another kind.
    """
    for key, default in defaults.items():
        value = config.get(key)
        if value is None or key in DERIVED:
            continue
        if key in SIZES:
            fits, wanted = _is_size(value), "a positive whole number"
        elif key.endswith("_token_id"):
            items = value if isinstance(value, list) else [value]
            fits, wanted = all(_is_whole(item) for item in items), "a token id or a list of them"
        elif isinstance(default, bool):
            fits, wanted = isinstance(value, bool), "true or false"
        elif isinstance(default, int | float):
            fits, wanted = _is_number(value), "a finite number"
        elif isinstance(default, str):
            fits, wanted = isinstance(value, str), "a word"
        else:
            continue
        if not fits:
            raise BadInput(f"config.json: {key} = {value!r}; expected {wanted}")


def per_layer(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> list[Any] | None:
    """The list at `key` with one of the `allowed` values for every layer; None where there is none.

    Raises:
        BadInput: it is no list, has not num_hidden_layers entries, or holds something else.
    """
    found, count = config.get(key), config["num_hidden_layers"]
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != count:
        what = f"{len(found)} entries" if isinstance(found, list) else repr(found)
        raise BadInput(f"config.json: {key} is {what}; expected a list with one entry for each of num_hidden_layers = {count}")  # fmt: skip
    for layer, value in enumerate(found):
        if isinstance(value, bool) or value not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise BadInput(f"config.json: {key}[{layer}] = {value!r}; expected {choices}")
    return found


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """One flat description of the rotary embedding from the keys of either dialect: `rope_parameters` (transformers 5)
    or `rope_theta`, `rope_scaling`, `partial_rotary_factor` (before).

    Raises:
        BadInput: one of them is not of its kind.
    """
    table, raw = _rope_table(config)
    found = {key: value for key, value in raw.items() if key != "type"}
    found.setdefault("rope_type", raw.get("type", "default"))
    kind = found["rope_type"]
    if not isinstance(kind, str) and not _is_nested(raw):
        raise BadInput(f"config.json: {written_as('rope.rope_type', config)} = {kind!r}; expected a word")
    for key in ("rope_theta", "partial_rotary_factor"):
        found.setdefault(key, config.get(key))
        if found[key] is not None and not (_is_number(found[key]) and found[key] > 0):
            where = f"{table}.{key}" if key in raw else key
            raise BadInput(f"config.json: {where} = {found[key]!r}; expected a positive number")
    if kind in ("llama3", "yarn", "longrope"):
        found.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return found


def written_as(key: str, config: Mapping[str, Any]) -> str:
    """The name that a derived setting such as `rope.rope_type` has in this config.json."""
    part, _, leaf = key.partition(".")
    if part != "rope":
        return key
    table, raw = _rope_table(config)
    if leaf in raw:
        return f"{table}.{leaf}"
    if leaf == "rope_type":
        return f"{table}.type" if "type" in raw else f"{table}.rope_type"
    return leaf


def _rope_table(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """(key, table): where a config keeps its rotary embedding."""
    for key in ("rope_scaling", "rope_parameters"):
        found = config.get(key)
        if found is not None and not isinstance(found, Mapping):
            raise BadInput(f"config.json: {key} = {found!r}; expected a table such as {{'rope_type': 'default'}}")
        if found:
            return key, found
    return "rope_parameters", {}


def _is_nested(raw: Mapping[str, Any]) -> bool:
    """Whether there is a table for each kind of layer (Gemma 3): no family with a mixture has that."""
    return bool(raw) and all(isinstance(value, Mapping) for value in raw.values())


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_whole(value) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
