"""What `generate` is asked: one prompt, once for each adapter, or the lines of a file, each with its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from moeforge.errors import BadInput, UsageProblem
from moeforge.options import did_you_mean, expand

FILE = "@"
"""What a prompt that names a file of prompts begins with, as curl has it."""


@dataclass(frozen=True)
class Request:
    """One prompt, and the adapter that continues it; None: the model alone."""

    prompt: str
    adapter: str | None = None


def is_file(prompt: str) -> bool:
    """Whether a prompt stands for the lines of a file."""
    return prompt.startswith(FILE) and prompt.endswith(".jsonl")


def adapters_of(given: Sequence[str]) -> dict[str, str]:
    """Name -> reference of every `--adapter NAME=REF`.

    Raises:
        UsageProblem: one without a name or a reference, or two of one name.
    """
    found: dict[str, str] = {}
    for item in given:
        name, _, ref = item.partition("=")
        if not name or not ref:
            raise UsageProblem(f"--adapter {item}: expected NAME=REF, such as math=adapters/math")
        if name in found:
            raise UsageProblem(f"--adapter {item}: {name} is {found[name]} already")
        found[name] = ref
    return found


def requests_of(prompt: str, adapters: Sequence[str]) -> list[Request]:
    """What is asked, in order.

    Args:
        prompt: a text, or `@FILE.jsonl`: an object a line, {"prompt": text, "adapter": name}; without a name it is the model's own.
        adapters: names; a text is continued once by each of them.

    Raises:
        BadInput: a file that cannot be read or has other lines.
        UsageProblem: an adapter that nobody named.
    """
    if not is_file(prompt):
        return [Request(prompt, name) for name in adapters] or [Request(prompt)]
    path = expand(prompt[len(FILE) :], "PROMPT")
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: the prompts cannot be read: {error}") from error
    found = [_request(line, f"{path}:{number}", adapters) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise BadInput(f'{path}: no prompts; write one a line, as {{"prompt": "Once upon a time"}}')
    return found


def _request(line: str, where: str, adapters: Sequence[str]) -> Request:
    expected = 'expected {"prompt": text} with or without "adapter": name'
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where}: not JSON ({error}); {expected}") from error
    if not isinstance(raw, dict) or set(raw) - {"prompt", "adapter"} or not isinstance(raw.get("prompt"), str):
        raise BadInput(f"{where}: {line.strip()[:80]}: {expected}")
    name = raw.get("adapter")
    if name is not None and name not in adapters:
        known = did_you_mean(str(name), adapters) if adapters else "none is given; name them with --adapter NAME=REF"
        raise UsageProblem(f"{where}: adapter {name!r}: {known}")
    return Request(raw["prompt"], name)
