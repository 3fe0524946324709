"""`--merge`: an adapter of LoRA experts as the dense checkpoint that it is, or that one of its experts is."""

from __future__ import annotations

from dataclasses import replace

from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.expert_adapter import ExpertAdapter
from moeforge.errors import BadInput
from moeforge.model.merged_experts import MergedExperts, expert_number, forced
from moeforge.pipeline.artifact import Plan

from . import to_hf
from .narrow import DTYPES
from .options import Options


def adapter_of(checkpoint: Checkpoint, flag: str) -> ExpertAdapter:
    """The checkpoint as what it must be.

    Raises:
        BadInput: it is no adapter of LoRA experts.
    """
    if not isinstance(checkpoint, ExpertAdapter):
        found = checkpoint.provenance().get("format", "checkpoint")
        hint = "; a PEFT LoRA is merged by --to hf as it is" if found == "peft" else ""
        raise BadInput(
            f"{checkpoint.ref}: {flag} is for adapters of LoRA experts, as `moeforge attach` writes them; this is {found}{hint}"
        )
    return checkpoint


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Headers in, plan out.

    Raises:
        BadInput: no adapter of LoRA experts, no such expert, or weights that depend on the token.
    """
    adapter = adapter_of(checkpoint, "--merge")
    routes = {} if options.expert is None else forced(adapter, expert_number(adapter, options.expert))
    if options.expert is not None and not routes:
        raise BadInput(f"{adapter.ref}: --expert {options.expert}: no site has experts to choose among; leave it out")
    merged = MergedExperts(adapter, routes, DTYPES.get(options.type))
    found = to_hf.plan(merged, options)
    rounded = sorted({found.tensors[name][0] for name in merged.changed} & {"F16", "BF16"})
    verdicts: dict[str, object] = {"exact": not rounded and not routes, "merged": len(merged.changed)}
    if routes:
        verdicts["why_inexact"] = f"expert {max(routes.values())} alone, without the routers"
    elif rounded:
        verdicts["why_inexact"] = f"merged matrices are rounded to {rounded[0]}, which the adapter's deltas were not; --type f32 keeps them"  # fmt: skip
    return replace(found, summary=f"{found.summary}, {len(merged.changed)} of them merged", verdicts=verdicts)
