"""`moeforge show REF`: what is in a checkpoint, from its headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.adapter import CONFIG as ADAPTER
from moeforge.checkpoint.anatomy import Anatomy, anatomy
from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.folder import Folder
from moeforge.checkpoint.safetensors import parse_json
from moeforge.checkpoint.tensor import TensorInfo
from moeforge.errors import BadInput
from moeforge.options import format_bytes, opt
from moeforge.pipeline.artifact import Artifact
from moeforge.pipeline.context import Context
from moeforge.pipeline.describe import describe_value
from moeforge.pipeline.reading import Reading
from moeforge.pipeline.stage import Answer

from .lineage import describe, licence, lineage


@dataclass(frozen=True)
class Options(Reading):
    tensors: bool = opt("list every tensor", default=False)


class Show:
    """A Hub id is answered from its headers by range requests; no weights are downloaded."""

    name = "show"
    summary = "tell what is in a checkpoint: parameters, mixtures, sizes, lineage, licence"
    examples = {
        "moeforge show moe": "parameters, experts, licence, lineage",
        "moeforge upcycle org/dense --dry-run | moeforge show": "a plan, before a byte is written",
    }
    api_version = 1
    consumes = frozenset({"checkpoint", "adapter", "gguf", "plan"})
    sources = 1
    Options = Options

    def answer(self, sources: list[Artifact], options: Options, ctx: Context) -> Answer:
        (src,) = sources
        adapter = _adapter(src)
        try:
            checkpoint = open_checkpoint(src.ref, allow_pickle=options.allow_pickle, dequantize=None, plan=src.plan)
        except BadInput as error:
            if adapter is None:
                raise
            # an adapter is worth describing on a machine that lacks its base model
            data = {"ref": src.ref, "kind": src.kind, "adapter": adapter, "base_unreadable": str(error)}
            return Answer(data, f"{src.ref}\n" + "\n".join(_adapter_lines(adapter)) + f"\n  base unreadable: {error}")
        with checkpoint:
            data, lines = _describe(src, checkpoint, options)
        if adapter is not None:
            data["adapter"] = adapter
            lines[1:1] = _adapter_lines(adapter)
        return Answer(data, "\n".join(lines))


def _describe(src: Artifact, checkpoint: Checkpoint, options: Options) -> tuple[dict[str, Any], list[str]]:
    found = anatomy(checkpoint.config, checkpoint.tensors)
    origin = {} if src.plan is not None else checkpoint.provenance()
    step = lineage(src.manifest)
    files = _files(src)
    data: dict[str, Any] = {
        "ref": src.ref, "kind": src.kind, "digest": src.digest or origin.get("digest"), "format": origin.get("format"),
        "revision": origin.get("revision"), "stored": origin.get("stored"), **found.as_json(),
        "tensors": len(checkpoint.tensors), "tensor_bytes": found.tensor_bytes, "files": files,
        "license": origin.get("license") or licence(step), "lineage": step,
        "portability": (src.manifest or {}).get("verdicts", {}).get("portability"),
    }  # fmt: skip
    if options.tensors:
        data["tensor_list"] = {info.name: [info.dtype, list(info.shape)] for info in checkpoint.tensors.values()}
    rows = {
        "architecture": _architecture(found),
        "parameters": _parameters(found),
        "layers": str(found.layers),
        "mixtures": "; ".join(mixture.describe() for mixture in found.mixtures),
        "stored as": describe_value("", data["stored"] or list(found.bytes_by_dtype)),
        "size": _size(found, files),
        "made of": ", ".join(f"{role} {describe_value('parameters', size)}" for role, size in
                             sorted(found.parameters_by_role.items(), key=lambda row: -row[1])),
        "revision": data["revision"], "licence": data["license"],
        "runs on": describe_value("", data["portability"]) if data["portability"] else None,
        "digest": data["digest"],
    }  # fmt: skip
    lines = [src.ref if src.plan is None else "plan (nothing is written yet)"]
    lines += [f"  {name + ':':<14} {value}" for name, value in rows.items() if value]
    if step is not None:
        lines += ["lineage, newest first:", *describe(step)]
    if options.tensors:
        lines += ["tensors:", *table(checkpoint.tensors.values())]
    return {key: value for key, value in data.items() if value is not None}, lines


def _architecture(found: Anatomy) -> str:
    return ", ".join(found.architectures) + (f" ({found.model_type})" if found.model_type else "")


def _parameters(found: Anatomy) -> str:
    total = describe_value("parameters", found.parameters_total)
    if found.parameters_active is None:
        return f"{total} in all; how many are active a token, the config does not say"
    if found.parameters_active == found.parameters_total:
        return total
    return f"{total} in all, {describe_value('parameters', found.parameters_active)} active a token"


def _size(found: Anatomy, files: dict[str, int] | None) -> str:
    if files is None:
        return f"{format_bytes(found.tensor_bytes)} of weights"
    held = [size for name, size in files.items() if name.endswith((".safetensors", ".gguf", ".bin"))]
    return f"{format_bytes(sum(held))} in {len(held)} weight file{'' if len(held) == 1 else 's'}, {format_bytes(sum(files.values()))} in all"


def _files(src: Artifact) -> dict[str, int] | None:
    """Names and sizes of the local files; None for what is not here."""
    if src.path is None:
        return None
    if src.path.is_file():
        return {src.path.name: src.path.stat().st_size}
    return {
        path.relative_to(src.path).as_posix(): path.stat().st_size
        for path in sorted(src.path.rglob("*"))
        if path.is_file()
    }


def table(tensors: Any) -> list[str]:
    """One aligned line a tensor: name, dtype, shape, bytes."""
    infos: list[TensorInfo] = list(tensors)
    width = max((len(info.name) for info in infos), default=0)
    return [
        f"  {info.name:<{width}}  {info.dtype:<7} {list(info.shape)!s:<22} {format_bytes(info.nbytes)}"
        for info in infos
    ]


def _adapter(src: Artifact) -> dict[str, Any] | None:
    """What a PEFT adapter says of itself."""
    if src.kind != "adapter" or src.path is None:
        return None
    body = parse_json(Folder(src.path).read(ADAPTER), f"{src.path}/{ADAPTER}")
    keys = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "task_type")
    return {key: body[key] for key in keys if body.get(key) is not None}


def _adapter_lines(adapter: dict[str, Any]) -> list[str]:
    told = ", ".join(f"{key.replace('_', ' ')} {describe_value(key, value)}" for key, value in adapter.items())
    return [f"  {'adapter:':<14} {told}"]
