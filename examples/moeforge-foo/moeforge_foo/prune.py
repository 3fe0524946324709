"""`moeforge prune SRC --share 0.5`: set the smallest weights of every matrix to zero (magnitude pruning).

A whole stage: it plans from headers, streams tensor by tensor, resumes, and leaves a manifest, all through the core.
"""

from dataclasses import dataclass

import numpy as np

from moeforge.checkpoint import Input, TensorOp, open_checkpoint
from moeforge.checkpoint.companions import write_companions
from moeforge.checkpoint.writer import write_checkpoint
from moeforge.options import opt
from moeforge.pipeline.artifact import Artifact, Plan
from moeforge.pipeline.stage import Written


@dataclass(frozen=True)
class Options:
    share: float = opt("share of each matrix's weights to set to zero", default=0.5, min=0.0, max=1.0)


def prune(weights: np.ndarray, share: float) -> np.ndarray:
    """`weights` with the `share` of smallest magnitude set to zero; ties go with the smaller."""
    magnitude = np.abs(weights.astype(np.float32))
    cut = int(share * weights.size)
    if cut == 0:
        return weights
    threshold = np.partition(magnitude, cut - 1, axis=None)[cut - 1]
    return np.where(magnitude <= threshold, np.zeros((), weights.dtype), weights)


class Prune:
    name = "prune"
    summary = "set the smallest weights of every linear layer to zero"
    examples = {"moeforge prune dense --share 0.3 -o pruned": "three weights in ten become zero"}
    api_version = 1
    consumes = frozenset({"checkpoint", "gguf"})
    produces = "checkpoint"
    output = "directory"
    default_method = None
    Options = Options

    def plan(self, src: Artifact, options: Options, method) -> Plan:
        checkpoint = open_checkpoint(src.ref, plan=src.plan)
        ops = []
        for info in checkpoint.tensors.values():
            matrix = len(info.shape) == 2 and info.name.endswith("_proj.weight")
            compute = (lambda w: prune(w, options.share)) if matrix else None
            ops.append(
                TensorOp((info,), (Input(checkpoint, info.name),), compute, note="pruned" if matrix else "copied")
            )
        pruned = [op for op in ops if op.compute]
        size = sum(info.nbytes for info in checkpoint.tensors.values())
        return Plan(
            "prune", None, f"set {options.share:.0%} of {len(pruned)} matrices of {src.ref} to zero",
            config=checkpoint.config,
            tensors={i.name: (i.dtype, i.shape) for i in checkpoint.tensors.values()},
            facts={"matrices": len(pruned), "read_bytes": size, "write_bytes": size},
            payload=(checkpoint, ops),
        )  # fmt: skip

    def run(self, plan: Plan, out, ctx) -> Written:
        checkpoint, ops = plan.payload
        with ctx.bar("pruning", plan.facts["write_bytes"], "B") as bar:
            done = write_checkpoint(ops, out.path, journal=out.journal, on_bytes=bar.advance, check=ctx.check)
        write_companions(checkpoint, out.path, plan.config)
        return Written(
            "checkpoint", {"matrices": plan.facts["matrices"]}, digests=done.files, parents=(checkpoint.provenance(),)
        )
