"""`--approximate-rank R`: the mean of an adapter's experts as one plain PEFT LoRA of rank R, and how far from it that is.

    dW = sum_e w_e s_e B_e A_e = B~ A~,   w_e: 1 of plain LoRA, 1 / E under a router, which is what a balanced router comes to

B~ = Q R and A~^T = P S by QR, so the singular values of dW are those of the small R S^T, and the best approximation of rank R
(Eckart and Young, 1936) is made without dW. Routing is lost, whatever the rank.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeforge.checkpoint.adapter_layout import CONFIG, PREFIX
from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.expert_adapter import ONE_FILE, STEM, ExpertAdapter
from moeforge.checkpoint.ops import TensorOp
from moeforge.checkpoint.tensor import TensorInfo
from moeforge.checkpoint.writer import write_checkpoint
from moeforge.errors import BadInput
from moeforge.model.merged_experts import Delta, deltas_of, entries_of
from moeforge.options import format_bytes
from moeforge.pipeline.artifact import Plan
from moeforge.pipeline.context import Context
from moeforge.pipeline.stage import Written
from moeforge.pipeline.workspace import Workspace

from .merge import adapter_of
from .options import Options

METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Work:
    """What `plan` hands to `write`.

    Attributes:
        deltas: module -> (delta, its weight in the mean).
    """

    checkpoint: ExpertAdapter
    deltas: dict[str, list[tuple[Delta, float]]]
    rank: int

    def write(self, plan: Plan, out: Workspace, ctx: Context) -> Written:
        errors: dict[str, float] = {}
        ops = [self._op(module, plan, errors) for module in self.deltas]
        with ctx.bar("writing", plan.facts["write_bytes"], "B") as bar:
            written = write_checkpoint(ops, out.path, stem=STEM, max_shard_bytes=ONE_FILE, metadata=METADATA, journal=None,
                                       on_bytes=bar.advance, check=ctx.check)  # fmt: skip
        settings: dict[str, Any] = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": self.checkpoint.settings["base_model_name_or_path"],
            "revision": self.checkpoint.settings.get("revision"), "bias": "none", "inference_mode": True, "r": self.rank,
            "lora_alpha": self.rank, "lora_dropout": 0.0, "target_modules": sorted(self.deltas),
        }  # fmt: skip
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (out.path / CONFIG).write_text(text, encoding="utf-8")
        worst = max(errors, key=lambda module: errors[module])
        said = f"relative Frobenius error of the mean delta: {errors[worst]:.2e} at most ({worst}), {_mean(errors):.2e} on average"
        return Written("adapter", counts={"relative_error": {module: errors[module] for module in self.deltas}}, verdicts=dict(plan.verdicts),
                       digests=written.files, tensor_digests=written.tensor_digests, parents=(self.checkpoint.provenance(),),
                       notes=(said,))  # fmt: skip

    def _op(self, module: str, plan: Plan, errors: dict[str, float]) -> TensorOp:
        names = [f"{PREFIX}{module}.{leaf}.weight" for leaf in ("lora_A", "lora_B")]

        def compute() -> list[np.ndarray]:
            a, b, errors[module] = self._nearest(module)
            return [a, b]

        return TensorOp(tuple(TensorInfo(name, *plan.tensors[name]) for name in names), compute=compute, note="svd")

    def _nearest(self, module: str) -> tuple[np.ndarray, np.ndarray, float]:
        """(A [R, D], B [D', R], relative Frobenius error)."""
        read, deltas = self.checkpoint.read, self.deltas[module]
        a = np.concatenate([read(delta.a).astype(np.float64) for delta, _ in deltas])
        b = np.concatenate([read(d.b).astype(np.float64) * (weight * d.scale) for d, weight in deltas], axis=1)
        q, r = np.linalg.qr(b)
        p, s = np.linalg.qr(a.T)
        left, values, right = np.linalg.svd(r @ s.T)
        kept, total = values[: self.rank], float(np.sum(values**2))
        if not math.isfinite(total):
            raise BadInput(f"{self.checkpoint.ref}: {module}: the experts hold infinities or NaN")
        made_a = np.zeros((self.rank, a.shape[1]), np.float32)
        made_b = np.zeros((b.shape[0], self.rank), np.float32)
        root, n = np.sqrt(kept), len(kept)
        made_a[:n] = (p @ (right[:n].T * root)).T
        made_b[:, :n] = q @ (left[:, :n] * root)
        lost = float(np.sum(values[self.rank :] ** 2))
        return made_a, made_b, math.sqrt(lost / total) if total else 0.0


def _mean(errors: dict[str, float]) -> float:
    return sum(errors.values()) / len(errors)


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Headers in, plan out.

    Raises:
        BadInput: no adapter of LoRA experts, or one whose deltas are of full rank (DoRA).
    """
    rank = options.approximate_rank
    assert rank is not None
    adapter = adapter_of(checkpoint, f"--approximate-rank {rank}")
    entries = entries_of(adapter)
    deltas: dict[str, list[tuple[Delta, float]]] = {}
    for matrix, found in deltas_of(adapter).items():
        for delta in found:
            entry = entries[delta.entry]
            if delta.magnitude is not None:
                raise BadInput(f"{adapter.ref}: options.dora of site {entry.site!r}: what magnitudes change is no matrix of low rank; "
                               "--merge --expert writes one expert whole")  # fmt: skip
            total = entry.experts.count + entry.router.null_experts
            deltas.setdefault(matrix.removesuffix(".weight"), []).append((delta, 1 / total))
    if not deltas:
        raise BadInput(f"{adapter.ref}: all of its experts are empty (options.ranks); there is nothing to approximate")
    tensors = {}
    for module, found in deltas.items():
        a, b = adapter.tensors[found[0][0].a].shape, adapter.tensors[found[0][0].b].shape
        tensors[f"{PREFIX}{module}.lora_A.weight"] = ("F32", (rank, a[1]))
        tensors[f"{PREFIX}{module}.lora_B.weight"] = ("F32", (b[0], rank))
    size = sum(TensorInfo(name, *info).nbytes for name, info in tensors.items())
    widest = max(
        sum(adapter.tensors[d.a].size + adapter.tensors[d.b].size for d, _ in found) for found in deltas.values()
    )
    return Plan(
        verb="export", method=None,
        summary=f"peft: rank {rank} nearest to the mean of the experts, {len(deltas)} linear maps, {format_bytes(size)}",
        config=None,
        tensors=tensors,
        facts={"read_bytes": sum(adapter.tensors[name].nbytes for name in adapter.own), "write_bytes": size,
               "peak_memory_bytes": 150_000_000 + 6 * 8 * widest + 2 * size},
        verdicts={"exact": False, "why_inexact": f"the mean of the experts, cut to rank {rank}, without their routers"},
        warnings=("routers are left out, and each expert of a router weighs 1/E: measure the result on text (moeforge eval)",),
        payload=Work(adapter, deltas, rank),
    )  # fmt: skip
