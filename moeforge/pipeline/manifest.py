"""The manifest `moeforge.json`: what an artifact is, what it was made from, how, and what was proven of it."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..options import to_json
from .artifact import SCHEMA, Artifact, Plan
from .stage import Bound, Written

LINEAGE_FIELDS = ("verb", "method", "options", "method_options", "reference", "digest", "counts", "verdicts", "parents")
"""What of a parent's manifest is kept in its children, so that lineage survives the parent's directory."""


def run_key(
    verb: str, src: Artifact, source_digest: str, options: Any, method: Bound | None, owners: tuple[str, ...],
    inputs: Sequence[Any] = (),
) -> str:  # fmt: skip
    """Hash of everything that decides the output's bytes: verb, versions of whoever computes them, options, inputs.

    Args:
        inputs: JSON-able identities of what is read beside the source.
    """
    body: dict[str, Any] = {
        "schema": SCHEMA, "verb": verb, "versions": {name: _version(name) for name in sorted({"moeforge", *owners})},
        "source": source_digest, "kind": src.kind, "options": to_json(options, only_affecting_output=True),
        "inputs": list(inputs),
    }  # fmt: skip
    if method is not None:
        body["method"] = [method.name, to_json(method.options, only_affecting_output=True)]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _version(distribution: str) -> str:
    if distribution == "moeforge":
        return __version__
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of Python, moeforge and every heavy library that this process really used."""
    found = {"python": sys.version.split()[0], "moeforge": __version__}
    for name in ("numpy", "torch", "transformers", "accelerate", "bitsandbytes", "gguf", "huggingface_hub"):
        module = sys.modules.get(name)
        if module is not None:
            found[name] = getattr(module, "__version__", None) or _version(name)
    return found


def peak_rss_bytes() -> int:
    """The largest resident size this process has had (Linux reports kilobytes, macOS bytes)."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):  # ru_maxrss also counts the process that started this one
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def lineage_of(manifest: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The part of a parent's manifest that its children keep."""
    if manifest is None:
        return None
    return {name: manifest[name] for name in LINEAGE_FIELDS if manifest.get(name) is not None}


def build_manifest(
    *, key: str, src: Artifact, plan: Plan, written: Written, options: Any, method: Bound | None,
    files: Mapping[str, Mapping[str, Any]], digest: str, seconds: float, resumed: bool,
) -> dict[str, Any]:  # fmt: skip
    """The manifest of a finished run. `files`: name -> {bytes, digest}."""
    parents = [dict(parent) for parent in written.parents]
    if parents and (lineage := lineage_of(src.manifest)):
        parents[0]["manifest"] = lineage
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": written.kind,
        "verb": plan.verb,
        "method": plan.method,
        "reference": getattr(method.method, "reference", None) if method else None,
        "options": to_json(options),
        "method_options": to_json(method.options) if method else None,
        "key": key,
        "digest": digest,
        "files": {name: dict(info) for name, info in sorted(files.items())},
        # 64 bits name a damaged tensor well enough; that a file is damaged is known from its full digest
        "tensors": {name: value[:16] for name, value in sorted(written.tensor_digests.items())} or None,
        "parents": parents,
        "facts": plan.facts,
        "counts": written.counts,
        "verdicts": {**plan.verdicts, **written.verdicts},
        "warnings": list(plan.warnings),
        "versions": versions(),
        "timings": {"seconds": round(seconds, 3), "peak_rss_bytes": peak_rss_bytes(), "resumed": resumed},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return {name: value for name, value in body.items() if value is not None}


def whole(output: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether every file that the manifest lists is there with its size (a quick look, not a rehash)."""
    try:
        return all((output / name).stat().st_size == info["bytes"] for name, info in manifest["files"].items())
    except OSError:
        return False
