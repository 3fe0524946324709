"""Patterns of module names as peft's `rank_pattern` and `alpha_pattern` hold them, matched without a way to hang.

peft gives them to `re`, which backtracks: `(a+)+b` from a stranger's adapter takes for ever on a name of forty letters. Here
all places in the name that a part of the pattern can reach are followed together, so that no way is walked twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import BadInput

MAX_PATTERN = 1000
"""Characters; a name of a module has about forty."""
MAX_NAME = 300
MAX_DEPTH = 3
"""Repetitions within repetitions; each costs a factor of the name's length at most."""
_CHARACTER = re.compile(
    r"\\[^\WA-Zabfnrtuvx0-9]|\\[dwsDWS]|\\[^\w\n]|\[(?:\^[^\]\[\\]+|[^\]\[\\^][^\]\[\\]*)\]|[^\\()\[\]{}|*+?^$]"
)
"""What stands for one character: an escape, a set, a dot, or the character itself."""
_REPEAT = re.compile(r"([*+?]|\{(\d{1,4})(?:(,)(\d{0,4}))?\})\??(?![*+?{])")
_OPEN = re.compile(r"\((?:\?:|\?P<\w+>|(?!\?))")

_Step = Callable[[str, set[int]], set[int]]
"""(name, places) -> places that are reached from there."""


def matches_tail(pattern: str, module: str, what: str) -> bool:
    """Whether `pattern` matches the whole of `module` or all that follows one of its dots.

    Args:
        what: names the pattern in an error.

    Raises:
        BadInput: no regular expression, or of a kind that is not matched here (assertions, references, flags).
    """
    if len(module) > MAX_NAME or len(pattern) > MAX_PATTERN:
        raise BadInput(f"{what[:200]}: has {len(pattern)} characters, the module's name {len(module)}; at most {MAX_PATTERN} and "
                       f"{MAX_NAME} are matched")  # fmt: skip
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadInput(f"{what} is not a regular expression: {error}") from error
    parser = _Parser(pattern)
    step = parser.alternatives()
    if step is None or parser.at < len(pattern):
        raise BadInput(f"{what}: {pattern[parser.at : parser.at + 20]!r} is not matched here: write names, sets [..], groups (a|b) and "
                       f"repetitions, nested at most {MAX_DEPTH} deep, or merge the adapter with peft first")  # fmt: skip
    starts = {0, *(i + 1 for i, letter in enumerate(module) if letter == ".")}
    return len(module) in step(module, starts)


@dataclass
class _Parser:
    """Recursive descent over a valid pattern; None where something stands that is not taken."""

    pattern: str
    at: int = 0
    depth: int = 0
    """Repetitions within repetitions in what was parsed last."""

    def alternatives(self) -> _Step | None:
        choices: list[_Step] = []
        deepest = 0
        while (choice := self._sequence()) is not None:
            choices.append(choice)
            deepest = self.depth = max(deepest, self.depth)
            if not self.pattern.startswith("|", self.at):
                return lambda name, places: set().union(*(choice(name, places) for choice in choices))
            self.at += 1
        return None

    def _sequence(self) -> _Step | None:
        parts: list[_Step] = []
        deepest = 0
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            begin, self.depth = self.at, 0
            part = self._one()
            if part is None:
                self.at = begin
                return None
            if found := _REPEAT.match(self.pattern, self.at):
                self.depth += 1
                if self.depth > MAX_DEPTH:
                    return None
                self.at = found.end()
                part = _repeated(part, found)
            deepest = max(deepest, self.depth)
            parts.append(part)
        self.depth = deepest

        def step(name: str, places: set[int]) -> set[int]:
            for part in parts:
                places = part(name, places)
            return places

        return step

    def _one(self) -> _Step | None:
        if found := _OPEN.match(self.pattern, self.at):
            self.at = found.end()
            inner = self.alternatives()
            if inner is None or not self.pattern.startswith(")", self.at):
                return None
            self.at += 1
            return inner
        if self.pattern[self.at] in "^$":
            end = self.pattern[self.at] == "$"
            self.at += 1
            return lambda name, places: places & {len(name) if end else 0}
        if found := _CHARACTER.match(self.pattern, self.at):
            self.at = found.end()
            single = re.compile(found[0])
            return lambda name, places: {p + 1 for p in places if p < len(name) and single.match(name[p])}
        return None


def _repeated(part: _Step, found: re.Match[str]) -> _Step:
    """`part` as often as `found`, a repetition, says."""
    least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(found[1], (0, None))
    if found[2]:
        least = int(found[2])
        most = least if not found[3] else int(found[4]) if found[4] else None

    def step(name: str, places: set[int]) -> set[int]:
        limit = len(name) + 1  # more often than that, a repetition has gone nowhere and changes nothing
        for _ in range(min(least, limit)):
            places = part(name, places)
        reached, fresh = set(places), places
        for _ in range(limit if most is None else min(most - least, limit)):
            fresh = part(name, fresh) - reached
            if not fresh:
                break
            reached |= fresh
        return reached

    return step
