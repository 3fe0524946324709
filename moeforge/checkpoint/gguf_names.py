"""The table `gguf_families.json` as objects: which GGUF tensors and keys are which of Hugging Face's, both ways."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

_LAYER = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True)
class Place:
    """Where a GGUF tensor belongs in a Hugging Face checkpoint.

    Attributes:
        names: one Hugging Face name, or one for each expert of a stacked tensor.
        stacked: the GGUF tensor has an expert axis first.
        heads: config key that counts the heads whose rows are reordered, None where rows keep their order.
        optional: the checkpoint may lack it.
        vector: [n] in GGUF, [1, n] in Hugging Face.
        f32: stored in F32 whatever the type of the rest.
        never_zero: an all-zero one is written as tiny numbers instead.
    """

    names: tuple[str, ...]
    stacked: bool
    heads: str | None
    optional: bool
    vector: bool
    f32: bool
    never_zero: bool


@dataclass(frozen=True)
class Family:
    """One architecture in both vocabularies; `model_type` is Hugging Face's, `arch` GGUF's."""

    model_type: str
    arch: str
    architecture: str
    needs: tuple[str, ...]
    keys: Mapping[str, str]
    """Config key -> GGUF key without its `arch.` prefix."""
    aliases: Mapping[str, str]
    """Config key -> another name that it is saved under."""
    fixed: Mapping[str, Mapping[str, Any]]
    """Config key -> the only `value` that llama.cpp computes, the value when `absent`, and `why`."""
    bias_keys: Mapping[str, tuple[str, ...]]
    """Config key that is true exactly when the tensors of these groups are there."""
    groups: tuple[tuple[str, Mapping[str, str], bool], ...]
    """(name, GGUF template -> Hugging Face template, optional)"""
    permute: Mapping[str, str]
    vectors: frozenset[str]
    f32: frozenset[str]
    never_zero: frozenset[str]
    whole_heads: bool
    """llama.cpp takes head_dim = hidden_size / heads for granted."""

    def setting(self, config: Mapping[str, Any], key: str) -> Any:
        """The value of `key`, or of its other name; None where the config has neither."""
        return config.get(key, config.get(self.aliases.get(key, key)))

    def places(self, layers: int, experts: int) -> dict[str, Place]:
        """Every tensor that a checkpoint of `layers` layers and `experts` experts may have, by GGUF name."""
        found = {}
        for _, names, optional in self.groups:
            for ours, theirs in names.items():
                part = ours.split(".")[-2]
                stacked = "{e}" in theirs
                for i in range(layers) if "{i}" in ours else (0,):
                    each = tuple(theirs.format(i=i, e=e) for e in range(experts if stacked else 1))
                    found[ours.format(i=i)] = Place(
                        each,
                        stacked,
                        self.permute.get(part),
                        optional,
                        part in self.vectors,
                        part in self.f32,
                        part in self.never_zero,
                    )
        return found

    def biases(self, gguf_names: Iterable[str]) -> dict[str, bool]:
        """The config's bias switches, from the tensors that are there."""
        there = {_LAYER.sub("blk.{i}.", name) for name in gguf_names}
        return {
            key: all(set(names) <= there for name, names, _ in self.groups if name in groups)
            for key, groups in self.bias_keys.items()
        }


@functools.cache
def families() -> tuple[Family, ...]:
    """All families, in the order in which they are tried."""
    table = json.loads(resources.files("moeforge.checkpoint").joinpath("gguf_families.json").read_text("utf-8"))
    return tuple(
        Family(
            model_type,
            body["arch"],
            body["class"],
            tuple(body.get("needs", ())),
            table["keys"] | body.get("keys", {}),
            table["aliases"],
            table["fixed"] | body.get("fixed", {}),
            {key: tuple(groups) for key, groups in body.get("bias_keys", {}).items()},
            tuple((g.rstrip("?"), table["groups"][g.rstrip("?")], g.endswith("?")) for g in body["groups"]),
            body.get("permute", {}),
            frozenset(table["vectors"]),
            frozenset(table["f32"]),
            frozenset(table["never_zero"]),
            body.get("whole_heads", False),
        )
        for model_type, body in table["families"].items()
    )


def rope_order(rows: int, heads: int) -> np.ndarray:
    """Row indices that turn Hugging Face's rotary order into GGUF's: `gguf = hf[rope_order(rows, heads)]`.

    Hugging Face rotates row j of a head with row j + d/2, llama.cpp's arch `llama` row 2j with row 2j + 1.
    """
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
