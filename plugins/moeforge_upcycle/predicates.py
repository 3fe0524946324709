"""Conditions and templates of the JSON files: `{"key", "op", "value", "because"}` and `"$name"`.

A key may be dotted (`rope.rope_type`). `"$name"` anywhere in a value stands for the setting of that name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OPS: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda found, wanted: found == wanted,
    "!=": lambda found, wanted: found != wanted,
    "all": lambda found, wanted: all(item == wanted for item in found or ()),
    "in": lambda found, wanted: found in wanted,
    "none or at least": lambda found, wanted: found is None or (wanted is not None and found >= wanted),
}


@dataclass(frozen=True)
class Predicate:
    """One condition on a config.

    `drops` names the tensor roles that are lost when the condition is false but allowed; a predicate with `drops`
    also holds when all of those tensors are zero. `fatal`: what breaks it cannot be allowed, for nothing useful would be
    written.
    """

    key: str
    op: str
    value: Any
    because: str = ""
    drops: tuple[str, ...] = ()
    fatal: bool = False

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Predicate:
        return cls(raw["key"], raw["op"], raw["value"], raw.get("because", ""), tuple(raw.get("drops", ())),
                   raw.get("fatal", False))  # fmt: skip

    def holds(self, settings: Mapping[str, Any]) -> bool:
        return OPS[self.op](lookup(settings, self.key), fill(self.value, settings))


def lookup(settings: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    found: Any = settings
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def fill(template: Any, settings: Mapping[str, Any]) -> Any:
    """`template` with every `$name` replaced by the setting of that name.

    Raises:
        KeyError: there is no such setting: the JSON file is wrong.
    """
    if isinstance(template, str) and template.startswith("$"):
        return settings[template[1:]]
    if isinstance(template, Mapping):
        return {key: fill(value, settings) for key, value in template.items()}
    if isinstance(template, list):
        return [fill(value, settings) for value in template]
    return template
