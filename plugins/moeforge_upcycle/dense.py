"""A dense source: its family, its resolved config, and where its roles lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moeforge.checkpoint.architectures import architecture
from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.family import Architecture, Part
from moeforge.checkpoint.tensor import FLOATS
from moeforge.errors import BadInput

from .experts import Parent


def examine(checkpoint: Checkpoint) -> tuple[Architecture, dict[str, Any], Parent]:
    """The family of a dense checkpoint, its resolved config, and where its roles lie.

    Raises:
        BadInput: a tensor is missing, is not a float, or is not accounted for by the config.
    """
    try:
        family = architecture(checkpoint.config).of_class(checkpoint.config)
    except BadInput as error:
        raise BadInput(f"{checkpoint.ref}: {error}") from None
    settings = family.resolve(checkpoint.config)
    located = family.locate(settings)
    wanted = {part.name for part in located.values()}
    stored: dict[str, str] = {}
    for name in checkpoint.tensors:
        if not family.is_ignored(name) and (twice := stored.setdefault(family.called(name, wanted), name)) != name:
            raise BadInput(
                f"{checkpoint.ref}: {name} and {twice} are one tensor of a {family.model_type} model; remove one"
            )
    missing = sorted(wanted - set(stored))
    if missing:
        raise BadInput(f"{checkpoint.ref}: a {family.model_type} model of this config has {missing[0]}"
                       f"{f' and {len(missing) - 1} more tensors' if len(missing) > 1 else ''}, the files do not")  # fmt: skip
    parts = {role: replace(part, name=stored[part.name]) for role, part in located.items()}
    tied = {family.tensors.get("head")} if settings.get("tie_word_embeddings") else set()
    extra = {name: found for name, found in stored.items() if name not in wanted | tied}
    # a head's tensors have no role of their own but their name
    parts |= {(name, None): Part(found, called=name) for name, found in extra.items() if family.belongs(name)}
    left = [found for name, found in extra.items() if not family.belongs(name)]
    lost = [name for name in left if not family.is_another_head(name)]
    if lost:
        raise BadInput(f"{checkpoint.ref}: {lost[0]}{f' and {len(lost) - 1} more tensors' if len(lost) > 1 else ''} "
                       f"would be lost: a {family.model_type} model of this config has no such tensor")  # fmt: skip
    for part in parts.values():
        if checkpoint.tensors[part.name].dtype not in FLOATS:
            raise BadInput(f"{checkpoint.ref}: {part.name} has dtype {checkpoint.tensors[part.name].dtype}; "
                           "a quantised source needs --dequantize")  # fmt: skip
    _check_shapes(checkpoint, parts, settings)
    return family, settings, Parent(checkpoint, parts, tuple(left))


def _check_shapes(
    checkpoint: Checkpoint, parts: Mapping[tuple[str, int | None], Part], settings: Mapping[str, Any]
) -> None:
    """Every tensor has the sizes that the config gives its role.

    Raises:
        BadInput: naming the tensor, both shapes, and the config keys that decide.
    """
    tensors: dict[str, dict[str, Part]] = defaultdict(dict)
    for (role, _), part in parts.items():
        tensors[part.name][role] = part
    for name, roles in tensors.items():
        found, (first, *_) = checkpoint.tensors[name].shape, roles.values()
        if first.shape is None:
            continue
        rows = sum(part.shape[0] for part in roles.values() if part.shape)
        wanted = first.shape if first.rows is None else (rows, *first.shape[1:])
        if found != wanted:
            keys = dict.fromkeys(key for part in roles.values() for key in part.keys)
            said = ", ".join(f"{key} = {settings[key]}" for key in keys)
            raise BadInput(f"{checkpoint.ref}: {name} has shape {list(found)}, which does not hold {' and '.join(roles)} "
                           f"of shape {list(wanted)} ({said})")  # fmt: skip


def like(checkpoint: Checkpoint, family: Architecture, settings: dict[str, Any]) -> Parent:
    """A further parent, which must have the family and sizes of the first."""
    other, found, parent = examine(checkpoint)
    for key in (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ):
        if found[key] != settings[key]:
            raise BadInput(f"{checkpoint.ref}: {key} = {found[key]}, the first parent has {settings[key]}")
    if other.model_type != family.model_type:
        raise BadInput(
            f"{checkpoint.ref}: model_type = {other.model_type!r}, the first parent is {family.model_type!r}"
        )
    return parent
