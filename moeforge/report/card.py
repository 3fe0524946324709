"""The model card, written from the manifest: nothing in it was typed by hand, everything in it can be checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from ..errors import one_line
from ..options import format_bytes

_PERMISSIVE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "isc", "unlicense"}
_HIDDEN_COUNTS = ("bytes_by_role",)


def public_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest as it may leave this machine: absolute paths are cut to their last part."""
    return {key: _public(value) for key, value in manifest.items()}


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    if isinstance(value, str) and re.match(r"(/|~|[A-Za-z]:\\)", value):
        return PurePath(value.replace("\\", "/")).name
    return value


def model_card(manifest: Mapping[str, Any], config: Mapping[str, Any] | None, repo: str) -> str:
    """README.md of a repository.

    Args:
        manifest: of the artifact that is published.
        config: its config.json, None when it has none.
        repo: `org/name`, for the lines that show how to load it.
    """
    manifest = public_manifest(manifest)
    steps = list(lineage(manifest))
    sections = [
        _front_matter(manifest, steps, config),
        f"# {repo.rpartition('/')[2]}\n\n{_opening(manifest, steps)}",
        "## How it was made\n\n" + "\n".join(_step(number, step) for number, step in enumerate(reversed(steps), 1)),
        _section("## What was proven", _exactness(steps)),
        _section("## What was measured", _measured(manifest, steps)),
        _section("## Where the bytes are", _bytes(manifest)),
        "## How to load it\n\n" + _loading(manifest, config, repo),
        _section("## Licences of the parents", _licences(steps)),
        _section("## Warnings", [f"- {text}" for text in manifest.get("warnings", [])]),
        f"---\nWritten by moeforge {manifest.get('versions', {}).get('moeforge', '')} from `moeforge.json`, which holds every "
        f"option, digest and version. Content digest: `{manifest.get('digest')}`.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def lineage(manifest: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The manifests from this artifact back to the first source that moeforge did not write, along first parents."""
    current: Mapping[str, Any] | None = manifest
    while current is not None:
        yield current
        parents = current.get("parents") or []
        current = parents[0].get("manifest") if parents else None


def sources(steps: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Every parent that moeforge did not write itself, each once: of every branch of the lineage, and an adapter's base with it."""
    found: dict[str, Mapping[str, Any]] = {}
    ahead = list(steps[0].get("parents") or []) if steps else []
    while ahead:
        parent = ahead.pop(0)
        if inner := (parent.get("manifest") or {}).get("parents"):
            ahead[:0] = inner
            continue
        found.setdefault(str(parent.get("ref")), parent)
        if isinstance(parent.get("base"), Mapping):
            ahead.insert(0, {**parent["base"], **({"role": parent["role"]} if "role" in parent else {})})
    return list(found.values())


def _front_matter(manifest: Mapping[str, Any], steps: list[Mapping[str, Any]], config: Mapping[str, Any] | None) -> str:
    parents = sources(steps)
    lines = ["library_name: transformers", *(["pipeline_tag: text-generation"] if _generates(config) else [])]
    licences = {str(parent.get("license") or "unknown") for parent in parents}
    if len(licences) == 1 and licences != {"unknown"}:
        lines.append(f"license: {_yaml(licences.pop())}")
    else:
        lines.append("license: other")
    hub_ids = [
        ref
        for ref in (str(p.get("ref", "")).partition("@")[0] for p in parents if not _taught(p))
        if re.fullmatch(r"[\w.-]+/[\w.-]+", ref)
    ]
    if hub_ids:
        lines += ["base_model:", *(f"- {_yaml(ref)}" for ref in hub_ids)]
        if manifest.get("verb") == "compress":
            lines.append("base_model_relation: quantized")
    tags = [
        "moeforge",
        *(["moe"] if any(step.get("verb") == "upcycle" for step in steps) else []),
        *filter(None, {manifest.get("verb")}),
    ]
    return "\n".join(["---", *lines, "tags:", *(f"- {_yaml(tag)}" for tag in tags), "---"])


def _yaml(text: str) -> str:
    """A YAML scalar on one line; quoted unless it is plainly a word."""
    text = one_line(text)
    if re.fullmatch(r"[A-Za-z][\w./-]*", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _opening(manifest: Mapping[str, Any], steps: list[Mapping[str, Any]]) -> str:
    names = ", ".join(f"`{_name(parent)}`" for parent in sources(steps) if not _taught(parent)) or "an unnamed source"
    verbs = " → ".join(
        f"{step.get('verb')}{' ' + step['method'] if step.get('method') else ''}" for step in reversed(steps)
    )
    size = sum(info.get("bytes", 0) for info in manifest.get("files", {}).values())
    return f"Made from {names} by `moeforge`: {verbs}. {len(manifest.get('files', {}))} files, {format_bytes(size)}."


def _taught(parent: Mapping[str, Any]) -> bool:
    """Whether it was learnt from, and nothing of it is in the result."""
    return parent.get("role") == "teacher"


def _name(parent: Mapping[str, Any]) -> str:
    ref = str(parent.get("ref", "unknown"))
    revision = parent.get("revision")
    return f"{ref}@{revision[:12]}" if revision and "@" not in ref else ref


def _step(number: int, step: Mapping[str, Any]) -> str:
    options = {**(step.get("options") or {}), **(step.get("method_options") or {})}
    told = ", ".join(f"`{key}` {_value(value)}" for key, value in options.items() if value not in (None, [], ""))
    method = f", method **{step['method']}**" if step.get("method") else ""
    reference = f" ({step['reference']})" if step.get("reference") else ""
    parents, teachers = (
        ", ".join(f"`{_name(parent)}`" for parent in step.get("parents") or [] if _taught(parent) is taught)
        for taught in (False, True)
    )
    from_ = f"{parents or 'unknown'}" + (f", taught by {teachers}" if teachers else "")
    return f"{number}. **{step.get('verb')}**{method}{reference} from {from_}" + (f": {told}" if told else "")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def _exactness(steps: list[Mapping[str, Any]]) -> list[str]:
    lines = []
    for step in reversed(steps):
        verdicts = step.get("verdicts") or {}
        exact, proof = verdicts.get("exact"), verdicts.get("proof")
        if exact is None:
            continue
        says = (
            "computes the same function as its parent" if exact else "does not compute the same function as its parent"
        )
        if isinstance(proof, str):
            says += f" ({proof})"
        elif exact:
            says += (
                f" by construction; not proven on the files ({verdicts.get('why_not_verified', 'no proof was run')})"
            )
        elif verdicts.get("why_inexact"):
            says += f": {verdicts['why_inexact']}"
        lines.append(f"- **{step.get('verb')}**: {one_line(says)}")
    return lines


def _measured(manifest: Mapping[str, Any], steps: list[Mapping[str, Any]]) -> list[str]:
    """What every step counted, oldest first."""
    rows = [(step.get("verb"), key, value) for step in reversed(steps) for key, value in (step.get("counts") or {}).items()
            if key not in _HIDDEN_COUNTS and isinstance(value, int | float | str)]  # fmt: skip
    seconds = (manifest.get("timings") or {}).get("seconds")
    rows += [(manifest.get("verb"), "seconds", seconds)] if seconds is not None else []
    told = [f"| {verb} | {key.replace('_', ' ')} | {_value(value)} |" for verb, key, value in rows]
    return ["| step | what | value |", "| --- | --- | --- |", *told] if told else []


def _bytes(manifest: Mapping[str, Any]) -> list[str]:
    table = (manifest.get("counts") or {}).get("bytes_by_role")
    if not isinstance(table, Mapping):
        return []
    return ["| role | bytes by precision |", "| --- | --- |",
            *(f"| {role} | {', '.join(f'{format_bytes(n)} {kind}' for kind, n in row.items())} |" for role, row in table.items() if isinstance(row, Mapping))]  # fmt: skip


def _loading(manifest: Mapping[str, Any], config: Mapping[str, Any] | None, repo: str) -> str:
    portability = (manifest.get("verdicts") or {}).get("portability")
    native = config is not None and config.get("model_type") != "moeforge"
    lines = []
    if native:
        lines += ["```python", "from transformers import AutoModelForCausalLM", "",
                  f'model = AutoModelForCausalLM.from_pretrained("{repo}")', "```", ""]  # fmt: skip
    elif config is not None:
        lines += ["```python", "import moeforge", "", f'model = moeforge.load("{repo}")', "```", ""]
        if config.get("auto_map"):
            auto = next((name for name in config["auto_map"] if name not in ("AutoConfig", "AutoModel")), "AutoModel")
            lines += ["or, where moeforge is installed,", "", "```python", f"from transformers import {auto}", "",
                      f'model = {auto}.from_pretrained("{repo}", trust_remote_code=True)', "```", ""]  # fmt: skip
    if _generates(config):
        lines += ["```sh", f'moeforge generate {repo} "Once upon a time"', "```"]
    if isinstance(portability, Mapping):
        lines += [
            "",
            "| runtime | |",
            "| --- | --- |",
            *(f"| {runtime} | {_value(verdict)} |" for runtime, verdict in portability.items()),
        ]
    return "\n".join(lines)


def _generates(config: Mapping[str, Any] | None) -> bool:
    """Whether the model writes text: whatever is not of our own layout does."""
    return config is None or config.get("model_type") != "moeforge" or "ForCausalLM" in str(config.get("architectures"))


def _licences(steps: list[Mapping[str, Any]]) -> list[str]:
    found = [(parent, str(parent.get("license") or "unknown")) for parent in sources(steps)]
    lines = [f"- `{_name(parent)}`: {licence}" for parent, licence in found]
    if len({licence for _, licence in found} - _PERMISSIVE) and len(found) > 0:
        lines.append(
            "\nA derived model carries the obligations of all its parents; read those that are not plainly permissive or not known."
        )
    return lines


def _section(title: str, lines: list[str]) -> str:
    return f"{title}\n\n" + "\n".join(lines) if lines else ""
