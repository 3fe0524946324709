"""The one file that a query writes for people: where it may go, and how it gets there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..options import expand, named_inputs
from .artifact import Artifact
from .disk import disk_errors, place_errors, sync_directory, write_durably
from .place import PAGE, check_free, is_page, keep_apart
from .run import absolute


def find_place(output: Path, force: bool, sources: Sequence[Artifact], options: Any) -> Path:
    """Where the page goes, absolute. A page that moeforge wrote is replaced by a new one unasked.

    Raises:
        UsageProblem: it is, or lies inside, something that is read; or what is there is not moeforge's.
    """
    place = absolute(output)
    read = [src.path for src in sources if src.path is not None]
    read += [expand(name, "input") for name in named_inputs(options)]
    keep_apart(place, [path for path in read if os.path.lexists(path)])
    check_free(place, "file", force or is_page(place))
    return place


def write_page(text: str, place: Path, force: bool) -> None:
    """Write the page beside its place, then rename it there.

    Raises:
        MachineLacks: the disk is full or the place is not writable.
        UsageProblem: the place cannot be made.
    """
    assert text.encode().startswith(PAGE)  # else the next run would not know it for its own
    made = place.with_name(f".{place.name}.{os.getpid()}")
    with disk_errors(place), place_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_durably(made, text)
            check_free(place, "file", force or is_page(place))
            os.replace(made, place)
        finally:
            made.unlink(missing_ok=True)
        sync_directory(place.parent)
