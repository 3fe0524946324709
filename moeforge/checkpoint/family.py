"""One dense family: what its config means, and where its tensors lie. Descriptions are read by moeforge.checkpoint.architectures."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import BadInput
from .dense_config import LAYER_TYPES, check_kinds, check_size, per_layer, rope
from .sizes import names as names_in
from .sizes import size

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
BOOKKEEPING = frozenset(
    [
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "_name_or_path",
        "use_cache",
        "auto_map",
        "rope_scaling",
        "rope_parameters",
        "rope_theta",
        "partial_rotary_factor",
        "layer_types",
        "head_dim",
        "id2label",
        "label2id",
        "return_dict",
        "_attn_implementation",
        "is_encoder_decoder",
        "output_hidden_states",
        "output_attentions",
        "chunk_size_feed_forward",
        "problem_type",
        "keys_to_ignore_at_inference",
        "unsloth_version",
        "unsloth_fixed",
        "quantization_config",
    ]
)
"""Config keys that no family needs to list: read elsewhere, or without effect on the function."""

FFN: tuple[Literal["gate"], Literal["up"], Literal["down"]] = ("gate", "up", "down")
FFN_BIASES: tuple[Literal["gate_bias"], Literal["up_bias"], Literal["down_bias"]] = (
    "gate_bias",
    "up_bias",
    "down_bias",
)
FFN_ROLES = frozenset((*FFN, *FFN_BIASES))
"""Everything that goes with the experts."""


@dataclass(frozen=True)
class Part:
    """Where a role's weights lie: a whole tensor, or some rows of a fused one."""

    name: str
    rows: slice | None = None
    shape: tuple[int, ...] | None = None
    """Sizes of the role's weights that the config asks for; None where it does not say."""
    sizes: tuple[str, ...] = ()
    """Where they come from, for each dimension."""
    transposed: bool = False
    """Stored [in, out]."""
    called: str = ""
    """What the class writes now; `name` is what the file at hand has."""

    @property
    def keys(self) -> list[str]:
        """The settings that decide the shape."""
        return [key for expression in self.sizes for key in names_in(expression)]


@dataclass(frozen=True)
class Architecture:
    """One dense family; see the module's description for the fields."""

    model_type: str
    classes: tuple[str, ...]
    layer: str
    tensors: Mapping[str, str]
    layer_tensors: Mapping[str, str]
    settings: Mapping[str, Any]
    shapes: Mapping[str, tuple[str, ...]]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    apart: Mapping[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    when: Mapping[str, str | list[str]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    kind: str = "decoder"
    prefix: str = ""
    bare: str | None = None
    heads: Mapping[str, list[str]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = REQUIRED
    keys: Mapping[str, str] = field(default_factory=dict)
    derived: Mapping[str, Any] = field(default_factory=dict)
    layer_types: Mapping[str, str] | None = None
    no_rope_layers: Mapping[str, str] | None = None

    def resolve(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config with every default filled in under our names, and with three things derived whatever dialect it was written
        in: `rope` (a flat dict with rope_type, rope_theta, partial_rotary_factor), `layer_types`, `head_dim`.

        Raises:
            BadInput: a size is missing or is not a positive whole number, the head counts do not divide, or a value is of
                another kind than the family's.
        """
        found = {**self.settings, **config}
        for key in self.required:
            if key not in self.derived:
                check_size(found, key, self.model_type, self._given(found, key))
        check_kinds(found, {"num_key_value_heads": None, "head_dim": None, **self.settings})
        for key in self.keys:
            found[key] = found.get(self._given(found, key))
        found["num_key_value_heads"] = found.get("num_key_value_heads") or found["num_attention_heads"]
        found["head_dim"] = found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
        if found["head_dim"] < 1:
            raise BadInput(f"config.json: num_attention_heads = {found['num_attention_heads']} is more than "
                           f"hidden_size = {found['hidden_size']}, and there is no head_dim")  # fmt: skip
        if found["num_attention_heads"] % found["num_key_value_heads"]:
            raise BadInput(f"config.json: num_attention_heads = {found['num_attention_heads']} is not a multiple of "
                           f"num_key_value_heads = {found['num_key_value_heads']}")  # fmt: skip
        for key, rule in self.derived.items():
            if found.get(key) is None:
                found[key] = self._derive(rule, found)
            if key in self.required:
                check_size(found, key, self.model_type)
        found["rope"] = rope(found)
        found["layer_types"] = per_layer(found, "layer_types", LAYER_TYPES) or self._derive_layer_types(found)
        if self.no_rope_layers is not None and per_layer(found, "no_rope_layers", (0, 1)) is None:
            every = self._number(found, self.no_rope_layers["none_every"])
            found["no_rope_layers"] = [int((i + 1) % every != 0) for i in range(found["num_hidden_layers"])]
        return found

    def _given(self, config: Mapping[str, Any], key: str) -> str:
        """What this config calls a setting: transformers reads the family's name, and ours where that is lacking."""
        own = self.keys.get(key, key)
        return key if config.get(own) is None and config.get(key) is not None else own

    def _derive(self, rule: Any, found: Mapping[str, Any]) -> Any:
        if isinstance(rule, str):
            return size(rule, found)
        case = next((case for case in rule if self._holds(case.get("when", ()), found)), {})
        return size(case["size"], found) if "size" in case else case.get("is")

    @staticmethod
    def _number(found: Mapping[str, Any], key: str) -> int:
        if found[key] is None:
            raise BadInput(f"config.json: {key} = null, which says how layers alternate; give it a number")
        return found[key]

    def _derive_layer_types(self, found: Mapping[str, Any]) -> list[str]:
        def sliding(layer: int) -> bool:
            rule = self.layer_types
            if rule is None or found.get("sliding_window") is None:
                return False
            if "full_every" in rule:
                return (layer + 1) % self._number(found, rule["full_every"]) != 0
            return bool(found[rule["if"]]) and layer >= self._number(found, rule["sliding_from"])

        return ["sliding_attention" if sliding(i) else "full_attention" for i in range(found["num_hidden_layers"])]

    def unknown_keys(self, config: Mapping[str, Any]) -> list[str]:
        """Config keys that this family does not list: they may change the function in a way nobody looked at."""
        known = {*self.settings, *self.required, *self.keys, *self.keys.values(), *self.derived, *BOOKKEEPING,
                 "num_key_value_heads", "no_rope_layers"}  # fmt: skip
        return sorted(key for key in config if key not in known and not key.startswith("_"))

    def of_class(self, config: Mapping[str, Any]) -> Architecture:
        """The family as the class that a config names writes it: the bare model without the prefix, a head's tensors beside it.

        Raises:
            BadInput: a class that is not described.
        """
        if not self.heads:
            return self
        named = config.get("architectures") or [self.bare or next(iter(self.heads))]
        if named[0] not in self.heads:
            raise BadInput(f"config.json: architectures = {named!r}: the heads of {self.model_type} that moeforge knows are those "
                           f"of {', '.join(self.heads)}")  # fmt: skip
        own = {named[0]: self.heads[named[0]]}
        others = {name: patterns for name, patterns in self.heads.items() if name != named[0]}
        if named[0] != self.bare:
            return dataclasses.replace(self, heads=own | others)

        def plain(names: Mapping[str, str]) -> dict[str, str]:
            return {role: name.removeprefix(self.prefix) for role, name in names.items()}

        own = {name: [pattern.removeprefix(self.prefix) for pattern in patterns] for name, patterns in own.items()}
        return dataclasses.replace(
            self, layer=self.layer.removeprefix(self.prefix), tensors=plain(self.tensors), heads=own | others
        )

    def locate(self, resolved: Mapping[str, Any]) -> dict[tuple[str, int | None], Part]:
        """(role, layer or None) -> where its weights lie, for every tensor that a model of this config has."""
        shapes = {role: tuple(size(item, resolved) for item in sizes) for role, sizes in self.shapes.items()
                  if self._exists(role, resolved)}  # fmt: skip
        found: dict[tuple[str, int | None], Part] = {}

        def part(role: str, name: str, rows: slice | None = None) -> Part:
            return Part(name, rows, shapes.get(role), self.shapes.get(role, ()), role in self.transposed, name)

        for role, name in self.tensors.items():
            if self._exists(role, resolved):
                found[role, None] = part(role, name)
        for layer in range(resolved["num_hidden_layers"]):
            for role, name in self.layer_tensors.items():
                if not self._exists(role, resolved):
                    continue
                full = self.layer.format(layer=layer) + name
                start = 0
                for inner in self.fused.get(role, ()):
                    end = start + shapes[inner][0]
                    found[inner, layer] = part(inner, full, slice(start, end))
                    start = end
                if role not in self.fused:
                    found[role, layer] = part(role, full)
        return found

    def _exists(self, role: str, resolved: Mapping[str, Any]) -> bool:
        return self._holds(self.when.get(role, ()), resolved)

    @staticmethod
    def _holds(conditions: str | Iterable[str], resolved: Mapping[str, Any]) -> bool:
        """Whether all of them do: `key`, `!key`, or `key=number`."""
        for condition in [conditions] if isinstance(conditions, str) else conditions:
            key, _, number = condition.lstrip("!").partition("=")
            holds = resolved.get(key) == int(number) if number else bool(resolved.get(key))
            if holds is condition.startswith("!"):
                return False
        return True

    def called(self, stored: str, known: Container[str]) -> str:
        """What the class writes now for a tensor that some file calls `stored`; `known`: the names of :meth:`locate`."""
        for old, new in self.renamed.items():
            stored = stored.replace(old, new)
        for name in (stored, self.prefix + stored, stored.removeprefix(self.prefix)):
            if name in known or self.belongs(name):
                return name
        return stored

    def belongs(self, name: str) -> bool:
        """Whether a tensor is part of the class's own head."""
        return self._matches(name, next(iter(self.heads.values()), ()))

    def is_another_head(self, name: str) -> bool:
        """Whether a tensor is part of a head that other classes of the family have: the model at hand never reads it."""
        spellings = (name, self.prefix + name)
        return any(self._matches(one, patterns) for patterns in self.heads.values() for one in spellings)

    @staticmethod
    def _matches(name: str, patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    def is_ignored(self, name: str) -> bool:
        """True for a tensor that holds no weights of its own."""
        return self._matches(name, self.ignored)

    def layer_of(self, name: str) -> int | None:
        """The layer that a tensor belongs to; None for those outside the layers."""
        before, _, after = self.layer.partition("{layer}")
        match = re.match(re.escape(before) + r"(\d+)" + re.escape(after), name)
        return int(match[1]) if match else None
