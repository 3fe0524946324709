"""adapter_config.json read strictly: every key is taken by name, and one that nobody took is refused."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from typing import Any

from ...errors import BadInput
from .source import CONFIG


class Settings:
    """The keys of one adapter_config.json (or of an object in it).

    Args:
        raw: the object.
        ref: names the adapter in errors.
        inside: the key that holds the object, with a dot; empty for the whole file.
    """

    def __init__(self, raw: Mapping[str, Any], ref: str, inside: str = ""):
        self._raw, self._where, self._inside = raw, f"{ref}: {CONFIG}", inside
        self._taken: set[str] = set()

    def refuse(self, key: str, because: str) -> typing.NoReturn:
        """Raises:
        BadInput: the key, its value and why."""
        raise BadInput(f"{self._where}: {self._inside}{key} = {self._raw.get(key)!r}: {because}")

    def any(self, key: str, default: Any = None) -> Any:
        self._taken.add(key)
        return self._raw.get(key, default)

    def natural(self, key: str, default: int | None = None) -> int:
        value = self.any(key, default)
        if type(value) is not int or value < 1:
            self.refuse(key, "a positive whole number is needed")
        return value

    def number(self, key: str, default: float | None = None, *, least: float = 0.0, most: float = math.inf) -> float:
        value = self.any(key, default)
        if type(value) not in (int, float) or not least <= value <= most or not math.isfinite(value):
            self.refuse(key, f"a number between {least:g} and {most:g} is needed")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.any(key, default)
        if type(value) is not bool:
            self.refuse(key, "true or false is needed")
        return value

    def one_of(self, key: str, known: tuple[Any, ...], default: Any = None) -> Any:
        value = self.any(key, default)
        if not any(value == one and type(value) is type(one) for one in known):
            self.refuse(key, f"known are {', '.join(map(repr, known))}")
        return value

    def targets(self) -> list[str]:
        """`target_modules`, a list or an object of true and false."""
        value = self.any("target_modules")
        if isinstance(value, Mapping) and all(type(on) is bool for on in value.values()):
            value = [name for name, on in value.items() if on]
        if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
            self.refuse("target_modules", "a list of module names, or an object of true and false, is needed")
        return value

    def ignore(self, *keys: str) -> None:
        """Keys that say nothing about what the adapter computes."""
        self._taken |= set(keys)

    def done(self) -> None:
        """Raises:
        BadInput: a key that nobody took."""
        if unknown := sorted(set(self._raw) - self._taken):
            self.refuse(unknown[0], "this key is not known, and what it asks for would be left out in silence")
