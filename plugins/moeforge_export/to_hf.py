"""`--to hf`: the same tensors under the same names in a plain directory, whatever they came out of."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.companions import write_companions
from moeforge.checkpoint.expert_adapter import ExpertAdapter
from moeforge.checkpoint.ops import Input, TensorOp
from moeforge.checkpoint.quantized import coded_by
from moeforge.checkpoint.tensor import FLOATS
from moeforge.checkpoint.writer import plan_shards, write_checkpoint
from moeforge.errors import BadInput
from moeforge.options import format_bytes
from moeforge.pipeline.artifact import Plan
from moeforge.pipeline.context import Context
from moeforge.pipeline.stage import Written
from moeforge.pipeline.workspace import Workspace

from .narrow import DTYPES, narrow
from .options import Options

METADATA = {"format": "pt"}
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Work:
    """What `plan` hands to `write`."""

    checkpoint: Checkpoint
    ops: list[TensorOp]
    max_shard: int

    def write(self, plan: Plan, out: Workspace, ctx: Context) -> Written:
        with ctx.bar("writing", plan.facts["write_bytes"], "B") as bar:
            written = write_checkpoint(self.ops, out.path, max_shard_bytes=self.max_shard, metadata=METADATA,
                                       journal=out.journal, on_bytes=bar.advance, check=ctx.check)  # fmt: skip
        write_companions(self.checkpoint, out.path, plan.config)
        return Written("checkpoint", digests=written.files, tensor_digests=written.tensor_digests,
                       parents=(self.checkpoint.provenance(),))  # fmt: skip


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Headers in, plan out.

    Raises:
        BadInput: an adapter of LoRA experts beside weights that are stored as codes.
    """
    if isinstance(checkpoint, ExpertAdapter) and (key := coded_by(checkpoint.base.config)) is not None:
        raise BadInput(f"{checkpoint.ref}: the weights of the base {checkpoint.base.ref} are codes ({key}), and a checkpoint with mixtures holds plain "
                       "ones; pass --dequantize")  # fmt: skip
    dtype = DTYPES.get(options.type)
    ops = [_op(checkpoint, name, dtype) for name in checkpoint.tensors]
    outputs = [info for op in ops for info in op.outputs]
    config = dict(checkpoint.config)
    if dtype is not None:
        config |= {"dtype": TORCH_NAMES[dtype], "torch_dtype": TORCH_NAMES[dtype]}
    size = sum(info.nbytes for info in outputs)
    return Plan(
        verb="export", method=None,
        summary=f"hf: {len(outputs)} tensors, {format_bytes(size)}",
        config=config,
        tensors={info.name: (info.dtype, info.shape) for info in outputs},
        facts={"read_bytes": sum(info.nbytes for info in checkpoint.tensors.values()), "write_bytes": size,
               "files": len(plan_shards(outputs, options.max_shard_size, METADATA)),
               "peak_memory_bytes": 150_000_000 + 6 * max(info.nbytes for info in outputs)},
        verdicts={"exact": all(op.compute is None for op in ops)},
        payload=Work(checkpoint, ops, options.max_shard_size),
    )  # fmt: skip


def _op(checkpoint: Checkpoint, name: str, dtype: str | None) -> TensorOp:
    info = checkpoint.tensors[name]
    source = (Input(checkpoint, name),)
    if dtype is None or info.dtype not in FLOATS or info.dtype == dtype:
        return TensorOp((info,), source)
    return TensorOp(
        (replace(info, dtype=dtype),), source, lambda values: narrow(values, dtype, name), f"{info.dtype} to {dtype}"
    )
