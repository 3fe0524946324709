"""Where an adapter of another program lies: a directory, or a repository of the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ...errors import BadInput
from ..hub import hub_errors
from .source import Source

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<pinned>[^@\s]+))?", re.ASCII)


def locate(ref: str, *, allow_pickle: bool = False) -> Source:
    """The adapter at a directory or a Hub id `org/name[@revision]`; a path that exists wins.

    Raises:
        BadInput: there is none, or it is damaged.
        MachineLacks: the Hub cannot be reached.
    """
    path = Path(os.path.expanduser(ref))
    if os.path.isdir(path):
        return Source(path, ref=ref, allow_pickle=allow_pickle)
    named = _HUB_ID.fullmatch(ref)
    if named is None or ref.startswith((".", "/", "~")):
        raise BadInput(f"{ref}: no such directory, and not a Hub id (org/name[@revision])")
    from huggingface_hub import snapshot_download

    with hub_errors(ref):
        snapshot = Path(
            snapshot_download(named["name"], revision=named["pinned"], allow_patterns=["adapter_*", "README.md"])
        )
    return Source(snapshot, ref=ref, revision=snapshot.name, allow_pickle=allow_pickle)
