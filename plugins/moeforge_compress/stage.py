"""The verb `compress`: decide by role, encode tensor by tensor, account for every byte, measure what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.base import COMPRESSION, Checkpoint
from moeforge.checkpoint.companions import write_companions
from moeforge.checkpoint.ops import Input, TensorOp
from moeforge.checkpoint.roles import is_matrix, role_of
from moeforge.checkpoint.tensor import FLOATS, TensorInfo
from moeforge.checkpoint.writer import plan_shards, write_checkpoint
from moeforge.errors import BadInput, UsageProblem
from moeforge.options import Bytes, format_bytes, opt
from moeforge.pipeline.artifact import Artifact, Plan
from moeforge.pipeline.context import Context
from moeforge.pipeline.reading import Decoding
from moeforge.pipeline.stage import Bound, Written
from moeforge.pipeline.workspace import Workspace

from . import accounting, memory
from .codec import Codec


@dataclass(frozen=True)
class Options(Decoding):
    include: tuple[Literal["lm_head"], ...] = opt("compress this too, which is left alone by default", default=())
    eval: bool = opt("measure perplexity and KL against the parent, layer by layer", default=True)
    eval_tokens: int = opt("tokens of text to measure on", default=1024, min=256)
    max_shard_size: Bytes = opt("largest safetensors file", default=Bytes(5_000_000_000), unit="bytes")


@dataclass(frozen=True)
class Work:
    """What `plan` hands to `run`."""

    checkpoint: Checkpoint
    compressed: frozenset[str]
    """Names of the matrices that are encoded."""
    ops: list[TensorOp]
    codec: Codec
    table: accounting.Table
    options: Options


class Compress:
    name = "compress"
    summary = "store linear layers and experts in 4 or 8 bits, and measure what it costs"
    examples = {
        "moeforge compress tuned --method nf4 -o small": "4 bits a weight, with perplexity beside the parent",
        "moeforge compress tuned --method int8 --no-eval -o small": "8 bits a weight, nothing measured",
    }
    api_version = 1
    consumes = frozenset({"checkpoint", "gguf", "adapter"})
    produces = "checkpoint"
    output = "directory"
    default_method = "nf4"
    Options = Options

    def plan(self, src: Artifact, options: Options, method: Bound | None) -> Plan:
        assert method is not None
        codec: Codec = method.method
        checkpoint = open_checkpoint(
            src.ref, allow_pickle=options.allow_pickle, dequantize=options.dequantize, compressed=True, plan=src.plan
        )
        _refuse_compressed(checkpoint)
        tensors = checkpoint.tensors
        wanted = {*accounting.COMPRESSED, *options.include}
        _check_head(checkpoint, options)
        chosen = [i for i in tensors.values() if role_of(i) in wanted and is_matrix(i) and i.dtype in FLOATS]
        stored = {info.name: codec.parts(info, method.options) for info in chosen}
        if not stored:
            raise BadInput(f"{src.ref}: no linear layer or expert to compress among {len(tensors)} tensors")
        accounting.check_nothing_left(tensors, stored)
        ops = [_op(checkpoint, info, stored.get(info.name), codec, method.options) for info in tensors.values()]
        outputs = [info for op in ops for info in op.outputs]
        table = accounting.account(tensors, stored, codec.name)
        read, write = sum(i.nbytes for i in tensors.values()), sum(i.nbytes for i in outputs)
        weights = sum(i.size for i in chosen)
        strangers = accounting.unknown(tensors)
        phases = memory.by_phase(checkpoint, ops, stored, options.eval_tokens if options.eval else None)
        return Plan(
            verb=self.name, method=codec.name,
            summary=f"{codec.name}: {len(chosen)} of {len(tensors)} tensors, {format_bytes(read)} become {format_bytes(write)}",
            config=_config(checkpoint, chosen, codec, method.options, options),
            tensors={info.name: (info.dtype, info.shape) for info in outputs},
            facts={
                "read_bytes": read, "write_bytes": write, "files": len(plan_shards(outputs, options.max_shard_size)),
                "bits_per_compressed_weight": 8 * sum(p.nbytes for parts in stored.values() for p in parts.values()) / weights,
                "peak_memory_bytes": max(phases.values()),
                "peak_memory_by_phase_bytes": phases,
                "bytes_by_role": table,
            },
            verdicts={"exact": False, "portability": _portability(chosen, codec, method.options)},
            warnings=tuple(f"{i.name} {list(i.shape)} has no known role and stays {i.dtype}" for i in strangers),
            payload=Work(checkpoint, frozenset(stored), ops, codec, table, options),
        )  # fmt: skip

    def run(self, plan: Plan, out: Workspace, ctx: Context) -> Written:
        from .runtime import check

        work: Work = plan.payload
        with work.checkpoint as checkpoint:
            check(checkpoint, work.compressed)
            with ctx.bar("compressing", plan.facts["write_bytes"], "B") as bar:
                written = write_checkpoint(work.ops, out.path, max_shard_bytes=work.options.max_shard_size,
                                           workers=1, journal=out.journal, on_bytes=bar.advance, check=ctx.check)  # fmt: skip
            write_companions(checkpoint, out.path, plan.config)
            counts: dict[str, Any] = {"bytes_by_role": work.table}
            notes = accounting.lines(work.table)
            if work.options.eval:
                quality, told = self._evaluate(work, out, ctx)
                counts |= quality
                notes.append(told)
            return Written(
                "checkpoint",
                counts=counts,
                digests=written.files,
                tensor_digests=written.tensor_digests,
                parents=(checkpoint.provenance(),),
                notes=tuple(notes),
            )

    def _evaluate(self, work: Work, out: Workspace, ctx: Context) -> tuple[dict[str, Any], str]:
        from moeforge.model.tokenizer import has_tokenizer
        from moeforge.train.metrics import perplexity_text

        from .evaluate import TEXT, evaluate

        if not has_tokenizer(work.checkpoint):
            ctx.warn("not measured: the source has no tokenizer, so there is no text to measure on")
            return {"evaluated": False}, "quality not measured"
        ctx.say(f"measuring on {work.options.eval_tokens} tokens of {TEXT}, one layer at a time")
        # read back from the files by the core's own decoder, which shares no code with the encoder
        with open_checkpoint(str(out.path), dequantize=True) as made:
            found = evaluate(work.checkpoint, made, work.options.eval_tokens, ctx)
        return found, (f"perplexity {perplexity_text(found['perplexity'])} (parent {perplexity_text(found['perplexity_parent'])}), KL to the parent "
                       f"{found['kl_to_parent']:.3g} nats a token, same favourite token {found['top1_agreement']:.1%}")  # fmt: skip


def _refuse_compressed(checkpoint: Checkpoint) -> None:
    for key in (COMPRESSION, "quantization_config"):
        if key in checkpoint.config:
            found = checkpoint.config[key]
            how = found.get("method") or found.get("quant_method") if isinstance(found, dict) else found
            raise BadInput(
                f"{checkpoint.ref} is already compressed ({key}: {how}); compress the checkpoint it was made from"
            )


def _check_head(checkpoint: Checkpoint, options: Options) -> None:
    if "lm_head" in options.include and not any(role_of(i) == "lm_head" for i in checkpoint.tensors.values()):
        raise UsageProblem(
            f"--include lm_head: {checkpoint.ref} has none of its own, its head is the embedding table; leave the option out"
        )


def _op(
    checkpoint: Checkpoint, info: TensorInfo, parts: dict[str, TensorInfo] | None, codec: Codec, options: Any
) -> TensorOp:
    if parts is None:
        return TensorOp((info,), (Input(checkpoint, info.name),))
    return TensorOp(tuple(parts.values()), (Input(checkpoint, info.name),),
                    lambda array: codec.encode(array, info, options), note=codec.name)  # fmt: skip


def _has_experts(chosen: list[TensorInfo]) -> bool:
    return any(role_of(info) == "experts" for info in chosen)


def _config(
    checkpoint: Checkpoint, chosen: list[TensorInfo], codec: Codec, method_options: Any, options: Options
) -> dict[str, Any]:
    """Dense: the stock config with a stock `quantization_config`. With experts: a type that stock transformers refuses,
    because it holds experts as parameters, not linear layers, and would otherwise read codes as weights."""
    dtype = max((i.dtype for i in chosen), key=[i.dtype for i in chosen].count)
    mark = {COMPRESSION: {"method": codec.name, "version": 1, "dtype": dtype}}
    if _has_experts(chosen):
        return {"model_type": "moeforge", "base_config": checkpoint.config, **mark}
    names = {info.name for info in chosen}
    skip = {i.name.removesuffix(".weight") for i in checkpoint.tensors.values()
            if is_matrix(i) and i.name not in names and role_of(i) != "embeddings"}  # fmt: skip
    if "lm_head" not in options.include:
        skip.add("lm_head")
    return {
        **checkpoint.config,
        **mark,
        "quantization_config": codec.quantization_config(method_options, dtype, sorted(skip)),
    }


def _portability(chosen: list[TensorInfo], codec: Codec, method_options: Any) -> dict[str, str]:
    if _has_experts(chosen):
        stock = "unsupported: bitsandbytes has no fused experts"
    else:
        trap = next(filter(None, (codec.stock_trap(info, method_options) for info in chosen)), "")
        stock = f"inexact: {trap}" if trap else "exact"
    return {"moeforge": "exact", "transformers": stock, "llama.cpp": "unsupported: export to gguf instead"}
