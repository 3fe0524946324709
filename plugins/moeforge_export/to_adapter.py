"""`--to mixlora|moe-peft|mola|peft|peft-experts`: an adapter of LoRA experts in the form of another program."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from moeforge.checkpoint.adapter_layout import CONFIG
from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.expert_adapter import ONE_FILE, STEM, ExpertAdapter
from moeforge.checkpoint.lora_formats.source import PICKLED
from moeforge.checkpoint.ops import TensorOp
from moeforge.checkpoint.tensor import TensorInfo
from moeforge.checkpoint.writer import write_checkpoint
from moeforge.errors import BadInput
from moeforge.options import format_bytes
from moeforge.pipeline.artifact import Plan
from moeforge.pipeline.context import Context
from moeforge.pipeline.stage import Written
from moeforge.pipeline.workspace import Workspace

from .adapters.held import Adapter, Cut, Package
from .adapters.mixlora import mixlora, moe_peft
from .adapters.mola import mola
from .adapters.peft import peft, peft_experts
from .options import Options

FORMATS = {"mixlora": mixlora, "moe-peft": moe_peft, "mola": mola, "peft": peft, "peft-experts": peft_experts}
METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Work:
    """What `plan` hands to `write`."""

    checkpoint: ExpertAdapter
    packages: list[Package]

    def write(self, plan: Plan, out: Workspace, ctx: Context) -> Written:
        with ctx.bar("writing", plan.facts["write_bytes"], "B") as bar:
            for package in self.packages:
                where = out.path / package.folder
                where.mkdir(exist_ok=True)
                if package.pickled:
                    import torch

                    values = {name: torch.from_numpy(self._read(cut)) for name, cut in package.tensors.items()}
                    torch.save(values, where / PICKLED)
                    bar.advance(sum(value.nbytes for value in values.values()))
                else:
                    ops = [
                        TensorOp((TensorInfo(name, "F32", cut.shape),), compute=lambda cut=cut: self._read(cut), note="adapter")
                        for name, cut in package.tensors.items()
                    ]  # fmt: skip
                    write_checkpoint(ops, where, stem=STEM, max_shard_bytes=ONE_FILE, metadata=METADATA, on_bytes=bar.advance,
                                     check=ctx.check)  # fmt: skip
                text = json.dumps(package.settings, indent=2, ensure_ascii=False) + "\n"
                (where / CONFIG).write_text(text, encoding="utf-8")
                ctx.check()
        return Written("adapter", parents=(self.checkpoint.provenance(),))

    def _read(self, cut: Cut) -> np.ndarray:
        values = self.checkpoint.read(cut.name).astype(np.float32)
        return np.ascontiguousarray(values[tuple(slice(n) for n in cut.shape)])


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Headers in, plan out.

    Raises:
        BadInput: not an adapter of LoRA experts, or one that the format cannot hold.
    """
    if not isinstance(checkpoint, ExpertAdapter):
        raise BadInput(f"{checkpoint.ref}: --to {options.to} is for adapters of LoRA experts, as `moeforge attach` writes them; this is "
                       f"a {checkpoint.provenance().get('format', 'checkpoint')} checkpoint")  # fmt: skip
    packages, warnings = FORMATS[options.to](Adapter.of(checkpoint, options.to))
    tensors = {
        f"{p.folder}/{name}".lstrip("/"): ("F32", cut.shape) for p in packages for name, cut in p.tensors.items()
    }
    size = sum(TensorInfo(name, *info).nbytes for name, info in tensors.items())
    return Plan(
        verb="export", method=None,
        summary=f"{options.to}: {len(tensors)} tensors in {len(packages)} director{'y' if len(packages) == 1 else 'ies'}, {format_bytes(size)}",
        config=None,
        tensors=tensors,
        facts={"read_bytes": size, "write_bytes": size, "peak_memory_bytes": 200_000_000 + 2 * size},
        verdicts={"exact": True} if options.to != "peft-experts" else {"exact": False, "why_inexact": "each LoRA is one expert, without its router"},
        warnings=tuple(warnings),
        payload=Work(checkpoint, packages),
    )  # fmt: skip
