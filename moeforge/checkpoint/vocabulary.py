"""What a checkpoint's token ids stand for, from its tokenizer's own table. No tokenizer is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ..errors import BadInput
from .base import Checkpoint


def vocabulary(checkpoint: Checkpoint) -> dict[int, str]:
    """Token id -> token, from tokenizer.json; empty where that file is lacking or holds no table.

    Raises:
        BadInput: the file cannot be read.
    """
    for companion in checkpoint.companions():
        if companion.name == "tokenizer.json":
            try:
                body = json.loads(companion.read())
                table = body["model"]["vocab"]
                items = table.items() if isinstance(table, dict) else ((entry[0], i) for i, entry in enumerate(table))
                found = {int(index): str(token) for token, index in items}
                return found | {int(entry["id"]): str(entry["content"]) for entry in body.get("added_tokens") or ()}
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise BadInput(f"{checkpoint.ref}: tokenizer.json cannot be read: {error!r}") from error
    return {}


def first_difference(one: Mapping[int, str], other: Mapping[int, str], size: int) -> int | None:
    """The first id below `size` that stands for another token in each; None where there is none. An id that only one of them has, as
    an unused row, tells nothing."""
    return next(
        (index for index in range(size) if index in one and index in other and one[index] != other[index]), None
    )
