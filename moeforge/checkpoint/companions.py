"""Config, tokenizer and the other small files that travel with the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import BadInput
from .base import Checkpoint

CONFIG = "config.json"


def write_companions(checkpoint: Checkpoint, directory: Path, config: Mapping[str, Any] | None) -> list[str]:
    """Write `config` as config.json, and the checkpoint's companions beside it; returns the names written.

    Raises:
        BadInput: a companion's name leads out of the directory.
    """
    names = []
    if config is not None:
        _write(directory / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        names.append(CONFIG)
    for companion in checkpoint.companions():
        parts = PurePosixPath(companion.name).parts
        if not parts or ".." in parts or companion.name.startswith("/") or companion.name == CONFIG:
            raise BadInput(
                f"{checkpoint.ref}: companion file {companion.name!r} leads out of the output or replaces config.json"
            )
        target = directory.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(target, companion.read())
        names.append(companion.name)
    return names


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
