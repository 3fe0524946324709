"""The verb `export`: write a checkpoint in the form that another runtime reads."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.base import COMPRESSION, Checkpoint
from moeforge.checkpoint.gguf import GGUFCheckpoint
from moeforge.errors import BadInput
from moeforge.pipeline.artifact import Artifact, Plan
from moeforge.pipeline.context import Context
from moeforge.pipeline.stage import Bound, Written
from moeforge.pipeline.workspace import Workspace

from .narrow import DTYPES
from .options import Options


class Export:
    name = "export"
    summary = "write a checkpoint as a plain Hugging Face directory or as a GGUF file for llama.cpp"
    examples = {
        "moeforge export tuned --to gguf --type q8_0 -o exported": "a file for llama.cpp",
        "moeforge export model.gguf --to hf -o model": "a directory for transformers",
        "moeforge export adapter --to peft-experts -o loras": "a PEFT LoRA for each expert of an adapter",
        "moeforge export adapter --to hf --merge --expert math -o math": "the dense model that one expert makes of the base",
    }
    api_version = 1
    consumes = frozenset({"checkpoint", "gguf", "adapter"})
    produces = "checkpoint"
    output = "directory"
    default_method = None
    Options = Options

    def plan(self, src: Artifact, options: Options, method: Bound | None) -> Plan:
        checkpoint = _open(src, options)
        plan = _form(options).plan(checkpoint, options)
        return replace(plan, warnings=(*plan.warnings, *_rounded(checkpoint)))

    def run(self, plan: Plan, out: Workspace, ctx: Context) -> Written:
        with plan.payload.checkpoint:
            return plan.payload.write(plan, out, ctx)


def _form(options: Options) -> ModuleType:
    """The module that plans and writes the form that was asked for."""
    from . import approximate, merge, to_adapter, to_gguf, to_hf

    if options.merge:
        return merge
    if options.approximate_rank is not None:
        return approximate
    return {"hf": to_hf, "gguf": to_gguf}.get(options.to, to_adapter)


def _open(src: Artifact, options: Options) -> Checkpoint:
    if src.path is not None and src.path.is_file() and options.type in DTYPES:
        return GGUFCheckpoint(src.path, dtype=DTYPES[options.type], ref=src.ref)  # decoded once, not by way of bf16
    checkpoint = open_checkpoint(
        src.ref, allow_pickle=options.allow_pickle, dequantize=options.dequantize, compressed=True, plan=src.plan
    )
    if COMPRESSION in checkpoint.config:
        scheme = checkpoint.config[COMPRESSION]
        how = scheme.get("method") if isinstance(scheme, dict) else scheme
        raise BadInput(f"{src.ref}: compressed ({COMPRESSION}: {how}); export the checkpoint that it was made from, "
                       "or pass --dequantize")  # fmt: skip
    return checkpoint


def _rounded(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What became of the numbers of a quantised GGUF source before they came here."""
    source = checkpoint.provenance()
    coded = [kind for kind in source.get("stored", ()) if kind not in DTYPES.values()]
    if not coded or source["read_as"] == "F32":
        return ()
    return (
        f"weights stored as {', '.join(coded)} are decoded to {source['read_as']}; --type f32 keeps every bit of them",
    )
