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
    apart          role in a fused tensor that the class holds apart in memory -> its name there; experts are written so
    transposed     roles of matrices that are stored [in, out]
    shapes         role -> its sizes, each arithmetic with settings: "num_attention_heads * head_dim"; null: of any shape
    when           role -> the setting that must be true (`!setting`: false; several: all of them) for the tensor to exist
    ignored        patterns of tensors that hold no weights
    kind           what goes in: `decoder` (tokens, seen from the left; the default), `encoder` (tokens) or `vision` (pixels)
    prefix         how names of the whole model begin; files of the bare model, and some old ones, leave it out
    bare           the class whose own files leave it out
    heads          class -> patterns of the tensors that it has beside the above
    renamed        part of a name that older files have -> what is written now
    required       the sizes that a config must give
    keys           our name of a setting -> the family's: {"hidden_size": "n_embd"}
    settings       config key -> the value that the transformers class takes when the key is absent
    derived        setting -> its value where the config has none: arithmetic, or cases {"when", "size" or "is"}, the first that holds
    layer_types    how a missing `layer_types` is derived: {"sliding_from": key, "if": key} or {"full_every": key}
    no_rope_layers how a missing `no_rope_layers` is derived: {"none_every": key}

Roles say what a tensor does, not what it is called: `attention_norm` and `ffn_norm` act before their block,
`attention_out_norm` and `ffn_out_norm` after it; `q k v o` with `_bias` and `_norm`; `gate up down`; `embed norm head`.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from ..errors import BadInput
from .family import Architecture

TOWERS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys under which models of several modalities keep the config of their text model."""
SENSES = ("vision_config", "audio_config")

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What mixtures call the number of their experts."""


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
    if isinstance(config.get("mixtures"), list):
        raise BadInput(f"config.json: model_type = {model_type!r} with {len(config['mixtures'])} mixtures: this is already a mixture of "
                       "experts, and only dense models become one; `moeforge tune` trains it, `moeforge show` describes it")  # fmt: skip
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
    fields["classes"] = tuple(raw.get("classes", raw.get("heads", ())))
    fields |= {key: tuple(raw[key]) for key in ("ignored", "required", "transposed") if key in raw}
    for key in ("fused", "shapes"):
        fields[key] = {role: tuple(parts) for role, parts in raw.get(key, {}).items() if parts is not None}
    family = Architecture(**fields)
    for role in (*family.tensors, *family.layer_tensors):
        for part in family.fused.get(role, (role,)):
            if part not in raw.get("shapes", {}):
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
        if key in ("tensors", "layer_tensors", "when", "fused"):
            merged[key] = {role: name for role, name in {**merged.get(key, {}), **value}.items() if name is not None}
        elif key == "shapes":
            merged[key] = {**merged.get(key, {}), **value}  # null is a value there
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


class _Described:
    """`described.llama` is the description of llama: how the registry names our own files."""

    def __getattr__(self, model_type: str) -> dict[str, Any]:
        return _table(model_type)


described = _Described()
