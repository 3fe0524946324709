"""A layout as its engine wants it said: `DistributedConfig(...)` and a `moeforge tune` line, or Megatron-Bridge overrides."""

from __future__ import annotations

import math
import shlex

from .job import Hardware, Job
from .search import Row
from .shape import Shape


def distributed_config(row: Row) -> dict[str, int | bool]:
    """Arguments of transformers' `DistributedConfig`; sizes of 1 are its defaults and left out."""
    layout = row.layout
    sizes = {
        "tp_size": layout.tp,
        "fsdp_size": layout.fsdp,
        "dp_replicate_size": layout.replicate,
        "ep_size": layout.ep,
    }
    found: dict[str, int | bool] = {name: size for name, size in sizes.items() if size > 1}
    if layout.dp > 1:
        found["fsdp_mixed_precision"] = True  # else float32 weights are gathered, twice the bytes
    return found


def call(row: Row) -> str:
    return f"DistributedConfig({', '.join(f'{name}={value}' for name, value in distributed_config(row).items())})"


def tune(row: Row, job: Job, gpu: Hardware, model: str) -> str:
    """The command that trains this layout with moeforge, started on every node."""
    layout, candidate = row.layout, row.candidate
    nodes = math.ceil(layout.world / gpu.node)
    start = ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else []), "--nproc-per-node", str(min(layout.world, gpu.node)),
             "-m", "moeforge"] if layout.world > 1 else ["moeforge"]  # fmt: skip
    sizes = {"--tp": layout.tp, "--fsdp": layout.fsdp, "--dp-replicate": layout.replicate, "--ep": layout.ep}
    words = [*start, "tune", model if job.training == "full" else "ADAPTER", "--data", "DATA"]
    words += [word for flag, size in sizes.items() if size > 1 for word in (flag, str(size))]
    words += ["--sequence-length", str(job.seq), "--batch-size", str(candidate.micro_batch),
              "--accumulate", str(candidate.microbatches(job))]  # fmt: skip
    words += ["--optimizer", job.optimizer] if job.optimizer != "adamw" else []
    words += ["--gradient-checkpointing"] if candidate.recompute == "full" else []
    return shlex.join(words)


def bridge(row: Row, job: Job, shape: Shape) -> list[str]:
    """Megatron-Bridge's overrides, `key=value` each, as its recipes and scripts take them."""
    layout, candidate = row.layout, row.candidate
    found = {
        "model.tensor_model_parallel_size": layout.tp,
        "model.pipeline_model_parallel_size": layout.pp,
        "model.context_parallel_size": layout.cp,
        "model.expert_model_parallel_size": layout.ep,
        "model.expert_tensor_parallel_size": layout.etp,
        "model.sequence_parallel": str(layout.tp > 1).lower(),
    }
    if not shape.experts:
        del found["model.expert_model_parallel_size"], found["model.expert_tensor_parallel_size"]
    if candidate.stages > 1:
        found["model.virtual_pipeline_model_parallel_size"] = candidate.stages
    if left := last_stage(shape, layout.pp):
        found["model.num_layers_in_last_pipeline_stage"] = left
    modules = [*(["moe"] if shape.sparse_layers else []), *(["mlp"] if shape.dense_layers else [])]
    found |= {
        "none": {},
        "selective": {"model.recompute_granularity": "selective", "model.recompute_modules": "[moe_act]"},
        "ffn": {"model.recompute_granularity": "selective", "model.recompute_modules": f"[{','.join(modules)}]"},
        "full": {
            "model.recompute_granularity": "full",
            "model.recompute_method": "uniform",
            "model.recompute_num_layers": 1,
        },
    }[candidate.recompute]
    found |= {
        "train.micro_batch_size": candidate.micro_batch,
        "train.global_batch_size": job.global_batch,
        "model.seq_length": job.seq,
        "dataset.sequence_length": job.seq,
        "ddp.use_distributed_optimizer": "true",
    }
    if job.training == "lora":
        found["peft.dim"] = job.adapter_rank
    return [f"{key}={value}" for key, value in found.items()]


def last_stage(shape: Shape, pp: int) -> int | None:
    """Layers of the last pipeline stage where it has fewer than the others, else None."""
    left = shape.layers - (pp - 1) * math.ceil(shape.layers / pp)
    return left if left != math.ceil(shape.layers / pp) else None
