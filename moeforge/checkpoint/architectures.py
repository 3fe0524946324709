"""What every tensor of a dense model family is called, as data.

`architectures/<model_type>.json` describes one family, as does whatever a third party registers under the entry-point
group `moeforge.architectures` (name: the model type; object: a dict, or the path of a JSON file). Its keys:

    model_type     the `model_type` of config.json
    like           a family to start from; the other tables are merged over its tables, null removes an entry
    classes        the transformers classes that hold this family
    layer          prefix of a layer's tensors, with {layer}
    tensors        role -> name of the tensors outside the layers
    layer_tensors  role -> name below the prefix
    fused          role -> the roles that lie in it, one after the other along its rows
    when           role -> the setting that must be true (`!setting`: false) for the tensor to exist
    ignored        patterns of tensors that hold no weights
    settings       config key -> the value that the transformers class takes when the key is absent
    layer_types    how a missing `layer_types` is derived: {"sliding_from": key, "if": key} or {"full_every": key}
    no_rope_layers how a missing `no_rope_layers` is derived: {"none_every": key}

Roles say what a tensor does, not what it is called: `attention_norm` and `ffn_norm` act before their block,
`attention_out_norm` and `ffn_out_norm` after it; `q k v o` with `_bias` and `_norm`; `gate up down`; `embed norm head`.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal

from ..errors import BadInput

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


@dataclass(frozen=True)
class Part:
    """Where a role's weights lie: a whole tensor, or some rows of a fused one."""

    name: str
    rows: slice | None = None


@dataclass(frozen=True)
class Architecture:
    """One dense family; see the module's description for the fields."""

    model_type: str
    classes: tuple[str, ...]
    layer: str
    tensors: Mapping[str, str]
    layer_tensors: Mapping[str, str]
    settings: Mapping[str, Any]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    when: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    layer_types: Mapping[str, str] | None = None
    no_rope_layers: Mapping[str, str] | None = None

    def resolve(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config with every default filled in, and with three things derived whatever dialect it was written in:
        `rope` (a flat dict with rope_type, rope_theta, partial_rotary_factor), `layer_types`, `head_dim`.

        Raises:
            BadInput: a size is missing or is not a positive whole number, or the head counts do not divide.
        """
        found = {**self.settings, **{key: value for key, value in config.items()}}
        for key in REQUIRED:
            if not isinstance(found.get(key), int) or isinstance(found[key], bool) or found[key] < 1:
                raise BadInput(
                    f"config.json: {key} = {found.get(key)!r}; a {self.model_type} model needs a positive number"
                )
        found["num_key_value_heads"] = found.get("num_key_value_heads") or found["num_attention_heads"]
        found["head_dim"] = found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
        if found["num_attention_heads"] % found["num_key_value_heads"]:
            raise BadInput(f"config.json: num_attention_heads = {found['num_attention_heads']} is not a multiple of "
                           f"num_key_value_heads = {found['num_key_value_heads']}")  # fmt: skip
        found["rope"] = _rope(found)
        found["layer_types"] = found.get("layer_types") or self._derive_layer_types(found)
        if self.no_rope_layers is not None and found.get("no_rope_layers") is None:
            every = found[self.no_rope_layers["none_every"]]
            found["no_rope_layers"] = [int((i + 1) % every != 0) for i in range(found["num_hidden_layers"])]
        return found

    def _derive_layer_types(self, found: Mapping[str, Any]) -> list[str]:
        def sliding(layer: int) -> bool:
            rule = self.layer_types
            if rule is None or found.get("sliding_window") is None:
                return False
            if "full_every" in rule:
                return (layer + 1) % found[rule["full_every"]] != 0
            return bool(found[rule["if"]]) and layer >= found[rule["sliding_from"]]

        return ["sliding_attention" if sliding(i) else "full_attention" for i in range(found["num_hidden_layers"])]

    def unknown_keys(self, config: Mapping[str, Any]) -> list[str]:
        """Config keys that this family does not list: they may change the function in a way nobody looked at."""
        known = {*self.settings, *REQUIRED, *BOOKKEEPING, "num_key_value_heads", "no_rope_layers"}
        return sorted(key for key in config if key not in known and not key.startswith("_"))

    def locate(self, resolved: Mapping[str, Any]) -> dict[tuple[str, int | None], Part]:
        """(role, layer or None) -> where its weights lie, for every tensor that a model of this config has."""
        found: dict[tuple[str, int | None], Part] = {}
        for role, name in self.tensors.items():
            if self._exists(role, resolved):
                found[role, None] = Part(name)
        rows = {role: resolved[key] * resolved["head_dim"] for role, key in
                (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads"))}  # fmt: skip
        rows |= {"gate": resolved["intermediate_size"], "up": resolved["intermediate_size"]}
        for layer in range(resolved["num_hidden_layers"]):
            for role, name in self.layer_tensors.items():
                if not self._exists(role, resolved):
                    continue
                full = self.layer.format(layer=layer) + name
                start = 0
                for part in self.fused.get(role, ()):
                    found[part, layer] = Part(full, slice(start, start + rows[part]))
                    start += rows[part]
                if role not in self.fused:
                    found[role, layer] = Part(full)
        return found

    def _exists(self, role: str, resolved: Mapping[str, Any]) -> bool:
        setting = self.when.get(role)
        if setting is None:
            return True
        return not resolved.get(setting[1:]) if setting.startswith("!") else bool(resolved.get(setting))

    def is_ignored(self, name: str) -> bool:
        """True for a tensor that holds no weights of its own."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignored)

    def layer_of(self, name: str) -> int | None:
        """The layer that a tensor belongs to; None for those outside the layers."""
        before, _, after = self.layer.partition("{layer}")
        match = re.match(re.escape(before) + r"(\d+)" + re.escape(after), name)
        return int(match[1]) if match else None


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The family of a config.json.

    Raises:
        BadInput: it names no model type, or one that nobody has described.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise BadInput(f"config.json: model_type = {model_type!r}; expected the name of a model family such as llama")
    return find(model_type)


@functools.cache
def find(model_type: str) -> Architecture:
    """The family of that name, our own or a third party's.

    Raises:
        BadInput: nobody has described it.
    """
    raw = _table(model_type)
    fields: dict[str, Any] = {key: raw[key] for key in Architecture.__dataclass_fields__ if key in raw}
    fields |= {key: tuple(raw.get(key, ())) for key in ("classes", "ignored")}
    fields["fused"] = {role: tuple(parts) for role, parts in raw.get("fused", {}).items()}
    return Architecture(**fields)


def known() -> list[str]:
    """Every model type that someone has described."""
    ours = [
        file.name.removesuffix(".json")
        for file in resources.files(__name__.rpartition(".")[0]).joinpath("architectures").iterdir()
    ]
    return sorted({*ours, *(point.name for point in _third_party())})


def _table(model_type: str) -> dict[str, Any]:
    raw = _read(model_type)
    if "like" not in raw:
        return raw
    merged = dict(_table(raw["like"]))
    for key, value in raw.items():
        if key in ("tensors", "layer_tensors", "when", "fused"):
            merged[key] = {role: name for role, name in {**merged.get(key, {}), **value}.items() if name is not None}
        elif key == "settings":
            merged[key] = {**merged[key], **value}
        else:
            merged[key] = value
    return merged


def _read(model_type: str) -> dict[str, Any]:
    if re.fullmatch(r"[\w.-]+", model_type):
        file = resources.files(__name__.rpartition(".")[0]).joinpath("architectures", f"{model_type}.json")
        if file.is_file():
            return json.loads(file.read_text("utf-8"))
        for point in _third_party():
            if point.name == model_type:
                given = point.load()
                return dict(given) if isinstance(given, Mapping) else json.loads(Path(given).read_text("utf-8"))
    raise BadInput(f"config.json: model_type = {model_type!r} is not a dense family that moeforge knows; "
                   f"known are {', '.join(known())}; a plugin can add one (group moeforge.architectures)")  # fmt: skip


def _third_party() -> Iterable[metadata.EntryPoint]:
    wanted = os.environ.get("MOEFORGE_PLUGINS")  # the same switch that moeforge.registry obeys
    for point in metadata.entry_points(group="moeforge.architectures"):
        if wanted is None or (point.dist is not None and point.dist.name in wanted.split(",")):
            yield point


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """One flat description of the rotary embedding from the keys of either dialect: `rope_parameters` (transformers 5)
    or `rope_theta`, `rope_scaling`, `partial_rotary_factor` (before)."""
    raw = config.get("rope_scaling") or config.get("rope_parameters") or {}
    found = {key: value for key, value in raw.items() if key != "type"}
    found.setdefault("rope_type", raw.get("type", "default"))
    for key in ("rope_theta", "partial_rotary_factor"):
        found.setdefault(key, config.get(key))
    if found["rope_type"] in ("llama3", "yarn", "longrope"):
        found.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return found
