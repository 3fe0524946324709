"""`--to gguf`: one file for llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.gguf_config import llama3_factors
from moeforge.options import format_bytes
from moeforge.pipeline.artifact import Plan
from moeforge.pipeline.context import Context
from moeforge.pipeline.stage import Written
from moeforge.pipeline.workspace import Workspace

from . import gguf_model
from .gguf_file import write_gguf
from .gguf_vocab import vocabulary
from .narrow import DTYPES
from .options import Options


@dataclass(frozen=True)
class Work:
    """What `plan` hands to `write`."""

    checkpoint: Checkpoint
    name: str
    arch: str
    metadata: dict[str, Any]
    entries: list[gguf_model.Entry]
    computed: dict[str, np.ndarray]

    def write(self, plan: Plan, out: Workspace, ctx: Context) -> Written:
        with ctx.bar("writing", plan.facts["write_bytes"], "B") as bar:
            write_gguf(
                out.path / self.name,
                self.arch,
                self.metadata,
                self.entries,
                self.computed,
                self.checkpoint,
                bar.advance,
            )
        return Written("gguf", counts={"tensors": len(self.entries)}, parents=(self.checkpoint.provenance(),),
                       notes=(f"wrote {self.name}",))  # fmt: skip


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Headers and tokenizer in, plan out.

    Raises:
        BadInput: llama.cpp would compute another function, or cut text in other places.
    """
    tensors, config = checkpoint.tensors, checkpoint.config
    family = gguf_model.family_of(checkpoint)
    kind_name = options.type if options.type != "auto" else _most_common(checkpoint)
    kind = gguf_model.KINDS[kind_name]
    entries = gguf_model.entries(checkpoint, family, kind)
    metadata = {"general.name": Path(checkpoint.ref.partition("@")[0]).stem} | gguf_model.metadata(
        checkpoint, family, kind
    )
    metadata |= vocabulary(checkpoint)
    rope, computed = gguf_model.rope_of(config), {}
    if rope["rope_type"] == "llama3":
        computed["rope_freqs.weight"] = llama3_factors(rope, gguf_model.head_dim(config), rope["rope_theta"])
    size = sum(entry.nbytes for entry in entries)
    exact = all(gguf_model.holds(entry.kind, tensors[source].dtype) for entry in entries for source in entry.sources)
    return Plan(
        verb="export", method=None,
        summary=f"gguf: arch {family.arch}, {len(entries)} tensors, {format_bytes(size)}",
        facts={"read_bytes": sum(info.nbytes for info in tensors.values()), "write_bytes": size, "files": 1,
               "peak_memory_bytes": 150_000_000 + 8 * max(tensors[source].size for entry in entries for source in entry.sources)},
        verdicts={"exact": exact, "portability": {"llama.cpp": "exact" if exact else "inexact"}},
        warnings=gguf_model.warnings(checkpoint, metadata),
        payload=Work(checkpoint, f"model-{kind_name}.gguf", family.arch, metadata, entries, computed),
    )  # fmt: skip


def _most_common(checkpoint: Checkpoint) -> str:
    """The `--type` that keeps most matrices as they are."""
    dtypes = [info.dtype for info in checkpoint.tensors.values() if len(info.shape) > 1]
    most = max(dtypes, key=dtypes.count, default="F32")
    return next((name for name, dtype in DTYPES.items() if dtype == most), "f32")
