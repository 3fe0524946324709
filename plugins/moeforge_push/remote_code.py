"""What `--remote-code` adds to a repository: one small file that hands over to the package moeforge, and its entry in config.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeforge.checkpoint.digest import PREFIX, artifact_digest
from moeforge.errors import UsageProblem

MODULE = "modeling_moeforge"
BODY = "MoeforgeModel"


def files(ref: str, config: Mapping[str, Any] | None) -> dict[str, bytes]:
    """The module, and a config.json that names it.

    Raises:
        UsageProblem: the checkpoint is not of our own layout, so transformers needs no code of ours.
    """
    kind = None if config is None else config.get("model_type")
    if config is None or kind != "moeforge":
        found = "there is no config.json" if config is None else f"config.json has model_type {kind!r}"
        raise UsageProblem(f"--remote-code is for checkpoints of type 'moeforge', and in {ref} {found}: leave it out, "
                           "transformers loads what it knows without code from a repository")  # fmt: skip
    (head,) = config["architectures"]
    names = {"AutoConfig": "MoeforgeConfig", "AutoModel": BODY, _auto(head): head}
    told = {**config, "auto_map": {auto: f"{MODULE}.{name}" for auto, name in names.items()}}
    return {
        "config.json": (json.dumps(told, indent=2) + "\n").encode(),
        f"{MODULE}.py": Path(__file__).with_name(f"{MODULE}.py").read_bytes(),
    }


def described(manifest: Mapping[str, Any], added: Mapping[str, bytes]) -> dict[str, Any]:
    """The manifest of the artifact with these files, so that `moeforge verify` finds what was published whole."""
    listed = dict(manifest["files"])
    for name, held in added.items():
        listed[name] = {**listed.get(name, {}), "bytes": len(held), "digest": PREFIX + hashlib.sha256(held).hexdigest()}
    return {
        **manifest,
        "files": listed,
        "digest": artifact_digest({name: info["digest"] for name, info in listed.items()}),
    }


def _auto(head: str) -> str:
    """transformers' Auto class for one of ours."""
    special = {BODY: "AutoModel", "MoeforgeForConditionalGeneration": "AutoModelForImageTextToText"}
    return special.get(head, head.replace("Moeforge", "AutoModel"))
