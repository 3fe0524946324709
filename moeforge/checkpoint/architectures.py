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
    shapes         role -> its sizes, each a config key or the product of several: "num_attention_heads * head_dim"
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
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal

from ..errors import BadInput
from .dense_config import LAYER_TYPES, check_kinds, check_size, per_layer, rope

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

TOWERS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys under which models of several modalities keep the config of their text model."""
SENSES = ("vision_config", "audio_config")

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What mixtures call the number of their experts."""

FFN: tuple[Literal["gate"], Literal["up"], Literal["down"]] = ("gate", "up", "down")


@dataclass(frozen=True)
class Part:
    """Where a role's weights lie: a whole tensor, or some rows of a fused one."""

    name: str
    rows: slice | None = None
    shape: tuple[int, ...] = ()
    """Sizes of the role's weights that the config asks for."""
    sizes: tuple[str, ...] = ()
    """Where they come from: a config key, or a product of several, for each dimension."""


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
    when: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    layer_types: Mapping[str, str] | None = None
    no_rope_layers: Mapping[str, str] | None = None

    def resolve(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config with every default filled in, and with three things derived whatever dialect it was written in:
        `rope` (a flat dict with rope_type, rope_theta, partial_rotary_factor), `layer_types`, `head_dim`.

        Raises:
            BadInput: a size is missing or is not a positive whole number, the head counts do not divide, or a value is of
                another kind than the family's.
        """
        found = {**self.settings, **config}
        for key in REQUIRED:
            check_size(found, key, self.model_type)
        check_kinds(found, {"num_key_value_heads": None, "head_dim": None, **self.settings})
        found["num_key_value_heads"] = found.get("num_key_value_heads") or found["num_attention_heads"]
        found["head_dim"] = found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
        if found["head_dim"] < 1:
            raise BadInput(f"config.json: num_attention_heads = {found['num_attention_heads']} is more than "
                           f"hidden_size = {found['hidden_size']}, and there is no head_dim")  # fmt: skip
        if found["num_attention_heads"] % found["num_key_value_heads"]:
            raise BadInput(f"config.json: num_attention_heads = {found['num_attention_heads']} is not a multiple of "
                           f"num_key_value_heads = {found['num_key_value_heads']}")  # fmt: skip
        found["rope"] = rope(found)
        found["layer_types"] = per_layer(found, "layer_types", LAYER_TYPES) or self._derive_layer_types(found)
        if self.no_rope_layers is not None and per_layer(found, "no_rope_layers", (0, 1)) is None:
            every = self._number(found, self.no_rope_layers["none_every"])
            found["no_rope_layers"] = [int((i + 1) % every != 0) for i in range(found["num_hidden_layers"])]
        return found

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
        known = {*self.settings, *REQUIRED, *BOOKKEEPING, "num_key_value_heads", "no_rope_layers"}
        return sorted(key for key in config if key not in known and not key.startswith("_"))

    def locate(self, resolved: Mapping[str, Any]) -> dict[tuple[str, int | None], Part]:
        """(role, layer or None) -> where its weights lie, for every tensor that a model of this config has."""
        shapes = {role: tuple(_product(size, resolved) for size in sizes) for role, sizes in self.shapes.items()}
        found: dict[tuple[str, int | None], Part] = {}
        for role, name in self.tensors.items():
            if self._exists(role, resolved):
                found[role, None] = Part(name, None, shapes[role], self.shapes[role])
        for layer in range(resolved["num_hidden_layers"]):
            for role, name in self.layer_tensors.items():
                if not self._exists(role, resolved):
                    continue
                full = self.layer.format(layer=layer) + name
                start = 0
                for part in self.fused.get(role, ()):
                    end = start + shapes[part][0]
                    found[part, layer] = Part(full, slice(start, end), shapes[part], self.shapes[part])
                    start = end
                if role not in self.fused:
                    found[role, layer] = Part(full, None, shapes[role], self.shapes[role])
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
        BadInput: it names no model type, one that nobody has described, one of a model of several modalities, or a mixture.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise BadInput(f"config.json: model_type = {model_type!r}; expected the name of a model family such as llama")
    tower = text_tower(config)
    if tower is not None and model_type not in known():
        inner = f", whose text model is a {tower}" if tower else ""
        raise BadInput(f"config.json: model_type = {model_type!r} is a model of several modalities{inner}; only plain text "
                       "models are read: save its text model as a checkpoint of its own")  # fmt: skip
    count = next((key for key in EXPERT_COUNTS if isinstance(config.get(key), int) and config[key] > 1), None)
    if count is not None and model_type not in known():
        raise BadInput(f"config.json: model_type = {model_type!r}, {count} = {config[count]}: this is already a mixture of experts, "
                       "and only dense models become one; `moeforge tune` trains it, `moeforge show` describes it")  # fmt: skip
    return find(model_type)


def text_tower(config: Mapping[str, Any]) -> str | None:
    """The model type of the text model inside a model of several modalities, empty where its config does not say; None for a
    plain text model."""
    inner = next((config[key] for key in TOWERS if isinstance(config.get(key), Mapping)), None)
    if inner is not None:
        found = inner.get("model_type")
        return found if isinstance(found, str) else ""
    return "" if any(isinstance(config.get(key), Mapping) for key in SENSES) else None


@functools.cache
def find(model_type: str) -> Architecture:
    """The family of that name, our own or a third party's.

    Raises:
        BadInput: nobody has described it.
    """
    raw = _table(model_type)
    fields: dict[str, Any] = {key: raw[key] for key in Architecture.__dataclass_fields__ if key in raw}
    fields |= {key: tuple(raw.get(key, ())) for key in ("classes", "ignored")}
    for key in ("fused", "shapes"):
        fields[key] = {role: tuple(parts) for role, parts in raw.get(key, {}).items()}
    family = Architecture(**fields)
    for role in (*family.tensors, *family.layer_tensors):
        for part in family.fused.get(role, (role,)):
            if part not in family.shapes:
                raise BadInput(f"the description of model_type = {model_type!r} gives no shape for the role {part!r}")
    return family


def ours() -> list[str]:
    """The model types of the files beside this module."""
    folder = resources.files(__name__.rpartition(".")[0]).joinpath("architectures")
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir())


def known() -> list[str]:
    """Every model type that someone has described."""
    return sorted({*ours(), *(point.name for point in _third_party())})


def _table(model_type: str) -> dict[str, Any]:
    raw = _read(model_type)
    if "like" not in raw:
        return raw
    merged = dict(_table(raw["like"]))
    for key, value in raw.items():
        if key in ("tensors", "layer_tensors", "when", "fused", "shapes"):
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
                return _given(point)
    raise BadInput(f"config.json: model_type = {model_type!r} is not a dense family that moeforge knows; "
                   f"known are {', '.join(known())}; a plugin can add one (group moeforge.architectures)")  # fmt: skip


def _given(point: metadata.EntryPoint) -> dict[str, Any]:
    """What a third party registered.

    Raises:
        BadInput: it cannot be imported or read; names the distribution.
    """
    try:
        given = point.load()
        return dict(given) if isinstance(given, Mapping) else json.loads(Path(given).read_text("utf-8"))
    except Exception as error:
        owner = point.dist.name if point.dist is not None else "unknown"
        raise BadInput(f"config.json: model_type = {point.name!r} is described by {owner}, which is broken: "
                       f"{type(error).__name__}: {error}; repair or uninstall {owner}") from error  # fmt: skip


def _third_party() -> Iterable[metadata.EntryPoint]:
    """Third parties' families, under the same switch and the same rule for names as in moeforge.registry."""
    wanted = os.environ.get("MOEFORGE_PLUGINS")
    allowed = None if wanted is None else {_normal(name) for name in wanted.split(",")}
    for point in metadata.entry_points(group="moeforge.architectures"):
        if allowed is None or (point.dist is not None and _normal(point.dist.name) in allowed):
            yield point


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()


def _product(size: str, resolved: Mapping[str, Any]) -> int:
    return math.prod(resolved[key] for key in size.split(" * "))


class _Described:
    """`described.llama` is the description of llama: how the registry names our own files."""

    def __getattr__(self, model_type: str) -> dict[str, Any]:
        return _table(model_type)


described = _Described()
