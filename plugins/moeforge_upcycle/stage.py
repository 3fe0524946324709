"""The verb: plan the mixture from headers alone, write it tensor by tensor, prove it from the written files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge.checkpoint.architectures import architecture
from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.companions import write_companions
from moeforge.checkpoint.ops import TensorOp
from moeforge.checkpoint.writer import plan_shards, write_checkpoint
from moeforge.errors import GateRefused
from moeforge.model import proof
from moeforge.options import format_bytes
from moeforge.pipeline.artifact import Artifact, Plan
from moeforge.pipeline.context import Context
from moeforge.pipeline.stage import Bound, Written
from moeforge.pipeline.workspace import Workspace

from . import advice, described, domains, losses, memory, portability, routers
from .job import Job, prepare
from .measure import check, drift_text, measure, sources
from .options import Options

if TYPE_CHECKING:
    from moeforge.model.proof import Proof

BF16_TOKENS = 64
"""Tokens on which `--bf16-kl` compares."""
WIDENING = {("BF16", "F32"), ("F16", "F32"), ("BF16", "F64"), ("F16", "F64"), ("F32", "F64")}
"""Conversions of a dtype that keep every value."""


class Upcycle:
    name = "upcycle"
    summary = "turn a dense checkpoint into a mixture of experts that computes the same function"
    examples = {
        "moeforge upcycle org/dense --dry-run": "what would come out: size, layout, whether it is exact, who can load it",
        "moeforge upcycle org/dense --experts 8 --top-k 2 -o moe": "8 copies of every FFN, 2 active, proven equal to the source",
        "moeforge upcycle model.gguf --method split --granularity 4 --experts 32 --top-k 8 -o fine": "fine-grained experts",
    }
    api_version = 1
    consumes = frozenset({"checkpoint", "adapter", "gguf"})
    produces = "checkpoint"
    output = "directory"
    default_method = "copy"
    Options = Options

    def inputs(self, options: Options, method: Bound | None) -> list[Any]:
        """Digests of the texts, prompts and third parties' descriptions that may take part, for the run's key."""
        assert method is not None
        wanted = method.method.needs(options, method.options) | routers.NEEDS[options.router_init]
        texts = domains.load(options.calibration) if wanted or options.calibration else []
        prompts = domains.read_prompts(options.prompts) if options.prompts is not None else []
        return [
            *([text.name, text.digest] for text in texts),
            *([row.positive, row.negative] for row in prompts),
            *described.identities(),
        ]

    def plan(self, src: Artifact, options: Options, method: Bound | None) -> Plan:
        assert method is not None
        job = prepare(_open(src, options, method), method, options)
        check(job)
        ops = job.planned_ops()
        phases = memory.by_phase(job, ops)
        memory.check(job, ops, phases)
        shape, why = job.shape, why_inexact(job)
        total, active = parameters(job, ops)
        infos = [info for op in ops for info in op.outputs]
        source = job.match.pair.source
        return Plan(
            verb=self.name,
            method=method.name,
            summary=f"{source} to {job.target.model_type} by {method.name}: {shape.experts} experts, {shape.top_k} active, "
            f"in {len(job.sparse)} of {job.settings['num_hidden_layers']} layers",
            config=job.config,
            tensors={info.name: (info.dtype, info.shape) for info in infos},
            facts={
                "source": source,
                "target": job.target.model_type,
                "experts": shape.experts,
                "top_k": shape.top_k,
                "expert_width": shape.width,
                "shared_width": shape.shared_width,
                "sparse_layers": list(job.sparse),
                "parameters_total": total,
                "parameters_active": active,
                "read_bytes": sum(_input_bytes(op) for op in ops),
                "write_bytes": sum(s.total_bytes for s in plan_shards(infos, options.max_shard_size)),
                "peak_memory_bytes": max(phases.values()),
                "peak_memory_by_phase_bytes": phases,
                "not_carried": advice.NOT_CARRIED,
                **advised(job, active),
            },
            verdicts={
                "exact": not why,
                **({"why_inexact": why} if why else {}),
                **({"allowed_inexact": [str(problem) for problem in job.match.allowed]} if job.match.allowed else {}),
                "portability": portability.verdicts(job.target, {**job.settings, **job.config}),
            },
            warnings=tuple(warnings(job)),
            payload=job,
        )

    def run(self, plan: Plan, out: Workspace, ctx: Context) -> Written:
        job: Job = plan.payload
        source = job.sources[0]
        if "proof" in plan.facts["peak_memory_by_phase_bytes"]:
            proof.warm_up()
        made: dict[int, routers.Router] = {}
        ops = job.in_order(dict(self._mixtures(job, ctx, made)))
        if made:
            ctx.say(routers.describe(made))
        if idle := routers.idle(made):
            ctx.warn(idle)
        total = sum(info.nbytes for op in ops for info in op.outputs)
        with ctx.bar("writing", total, "B") as bar:
            written = write_checkpoint(
                ops,
                out.path,
                max_shard_bytes=job.options.max_shard_size,
                workers=memory.workers(job, ops),
                max_memory=memory.in_flight(job, ops),
                journal=out.journal,
                on_bytes=bar.advance,
                check=ctx.check,
            )
        write_companions(source, out.path, plan.config)
        counts = {key: value for key, value in plan.facts.items() if key.startswith("parameters")}
        counts |= {"tensors": len(plan.tensors)}
        if made:
            counts["routers"] = {str(index): router.as_json() for index, router in made.items()}
        if texts := sources(job):
            counts["calibration"] = texts
        verdicts = {**plan.verdicts, **self._verify(job, plan, out, ctx)}
        return Written(
            kind=self.produces,
            counts=counts,
            verdicts=verdicts,
            digests=written.files,
            tensor_digests=written.tensor_digests,
            parents=tuple(source.provenance() for source in job.sources),
            notes=(*([verdicts["proof"]] if "proof" in verdicts else []), *losses.lines(verdicts.get("losses", {}))),
        )

    def _mixtures(
        self, job: Job, ctx: Context, measured: dict[int, routers.Router]
    ) -> Iterable[tuple[int, list[TensorOp]]]:
        """(layer, ops) of every mixture, from the method's recipes; routers seen at work on the text go into `measured`."""
        method, options, shape = job.method, job.options, job.shape
        for found in measure(job, ctx):
            ctx.check()
            layer = job.layer(found.index, found.parents)
            recipe = method.method.recipe(layer, shape, options, method.options)
            visits, scoring = max(1, shape.top_k // shape.tied), job.target.scoring
            if recipe.router is not None:
                made = routers.measured(recipe.router, found.parents[0], visits, scoring)
            else:
                made = routers.make(
                    options.router_init,
                    shape.rows,
                    layer.model_width,
                    found.router,
                    layer.rng("router"),
                    visits=visits,
                    std=options.router_std,
                    top1=options.router_top1,
                    scoring=scoring,
                )
            if made.load is not None:
                measured[found.index] = made
            yield found.index, job.mixture_ops(found.index, recipe, made.rows)

    def _verify(self, job: Job, plan: Plan, out: Workspace, ctx: Context) -> dict[str, Any]:
        """The equality proof from the written files.

        Raises:
            GateRefused: the function was promised to be the same and is not, or the model gives infinities or NaN.
        """
        if job.options.verify is False:
            return {"verified": False, "why_not_verified": "--no-verify"}
        source = job.sources[0]
        if "proof" not in plan.facts["peak_memory_by_phase_bytes"]:
            needed = format_bytes(memory.proof_bytes(job, job.planned_ops()))
            why = f"the proof takes {needed} of memory; --verify does it anyway"
            ctx.warn(f"not verified: {why}")
            return {"verified": False, "why_not_verified": why}
        text = [] if plan.verdicts["exact"] else [ids for texts in drift_text(job).values() for ids in texts]
        found = proof.prove(source, out.path, seed=job.options.seed, text=text, ctx=ctx)
        if not found.finite or (plan.verdicts["exact"] and not found.exact):
            raise GateRefused(
                f"the written model is {found.summary()}; {out.output} was not made, what was written lies in {out.path}"
            )
        return {
            "verified": True,
            "proof": found.summary() if plan.verdicts["exact"] else drift(found),
            "measured": found.as_json(),
            **({"bf16_kl": bf16_kl(job, out.path, ctx)} if job.options.bf16_kl else {}),
            **(
                {"losses": losses.by_domain(job, out.path, ctx)}
                if len(job.sources) > 1 and job.options.calibration and job.predicts
                else {}
            ),
        }


def bf16_kl(job: Job, written: Path, ctx: Context) -> float | None:
    """Mean KL when both models run in bfloat16, on a few tokens: information, no gate, as rounding alone makes some 1e-4.
    None where it is not finite."""
    found = proof.prove(job.sources[0], written, seed=job.options.seed, tokens=BF16_TOKENS, dtype="bfloat16", ctx=ctx)
    return found.kl if math.isfinite(found.kl) else None


def drift(found: Proof) -> str:
    """One line on a function that was meant to change."""
    loss = "" if found.cross_entropy is None else ", loss on text {:.3f} -> {:.3f}".format(*found.cross_entropy)
    return (
        f"changed as announced: KL {found.kl:.1e}, relative error {found.relative_error:.1e}, same favourite token on "
        f"{found.argmax_equal:.1%} of {found.tokens}{loss}"
    )


def why_inexact(job: Job) -> str:
    """One sentence that says why the function changes; empty when it does not."""
    options, shape = job.options, job.shape
    if job.match.allowed:
        return "allowed by --allow-inexact"
    if not shape.exact:
        return shape.why_inexact
    inside = options.scale == "cuberoot" or (options.scale == "split" and "gate" not in job.target.matrices)
    if inside and "down" in job.factors:
        return f"--scale {options.scale} scales inside the activation, and act(c z) is not c act(z)"
    if job.brought is not None:
        return rounding(job)
    if not options.norm_topk and options.router_init != "zero":
        return "--no-norm-topk makes the sum of the top-k weights depend on the router, unless --router-init zero"
    every_expert = shape.top_k == shape.experts
    if shape.tied > 1 and not every_expert and options.router_init == "zero":
        return "with --router-init zero all experts tie, and the top-k may cut through a virtual group"
    if shape.tied > 1 and not every_expert and options.untie:
        return "--untie lets the top-k cut through a virtual group"
    return rounding(job)


def rounding(job: Job) -> str:
    """Why the written weights are rounded; empty when every one of them is what it should be to float32 precision."""
    written = job.dtype
    stored = {parent.checkpoint.tensors[part.name].dtype for parent in job.parents for part in parent.parts.values()}
    for dtype in sorted(stored):
        if written not in (None, dtype) and (dtype, written) not in WIDENING:
            return f"--dtype {job.options.dtype} rounds {dtype} weights"
    held = job.target.matrices
    narrow = {written} if written else {job.parents[0].info(matrix, job.sparse[0]).dtype for matrix in held}
    if job.brought is not None and (low := narrow & {"BF16", "F16"}):
        return (
            f"merged weights and routers are rounded in {min(low)}, which the adapter's are not; --dtype f32 keeps them"
        )
    scales = [factor for matrix, factor in job.factors.items() if matrix in held and math.frexp(factor)[0] != 0.5]
    if scales and narrow & {"BF16", "F16"}:
        return (
            f"weights times {scales[0]:g} are rounded in {min(narrow & {'BF16', 'F16'})}; scales that are powers of two are "
            "not, nor is --dtype f32 or, where the target has it, --scale routed-factor"
        )
    return ""


def warnings(job: Job) -> Iterable[str]:
    """What a careful person would want to know before the bytes are written."""
    options, shape = job.options, job.shape
    for problem in job.match.allowed:
        yield f"inexact, as allowed: {problem}"
    if job.match.passed_over and options.target == "auto":
        yield f"target {job.target.model_type}, because " + "; ".join(map(str, job.match.passed_over))
    if options.router_init == "zero" and shape.top_k < shape.experts:
        yield "a router of zeros sends every token to the same experts, so only those would train; --router-init random spreads them"
    if shape.tied > 1 and options.dtype != "f32" and job.settings["dtype"] != "float32":
        yield (
            f"router logits in {job.settings['dtype']} tie between groups on about one token in 200, which then sees parts "
            "of two groups; float32 routing has no such ties"
        )
    if job.dtype is None:
        wanted = job.parents[0].info("up", job.sparse[0]).dtype
        for parent in job.parents[1:]:
            if (found := parent.info("up", job.sparse[0]).dtype) != wanted:
                yield f"{parent.checkpoint.ref} is stored in {found}; all experts are written in SRC's {wanted}, or see --dtype"
    family = architecture(job.parents[0].checkpoint.config)
    unknown = family.unknown_keys(job.parents[0].checkpoint.config)
    for parent in job.parents:
        if left := parent.left_out:
            yield f"{parent.checkpoint.ref}: {left[0]}{f' and {len(left) - 1} more tensors' if len(left) > 1 else ''} of another head left out"
    if unknown and not job.target.keeps_names:
        yield f"config keys that moeforge does not know for {family.model_type} are left out: {', '.join(unknown)}"


def advised(job: Job, active: int) -> dict[str, str]:
    """The fact `advice`, where the user said how many tokens there were and will be."""
    options = job.options
    if options.dense_tokens is None or options.planned_tokens is None:
        return {}
    source = job.parents[0]
    dense = sum(source.info(role, layer).size for role, layer in source.parts)
    trained = advice.tokens(options.dense_tokens, "--dense-tokens")
    planned = advice.tokens(options.planned_tokens, "--planned-tokens")
    return {"advice": advice.advise(trained, planned, dense, active)}


def parameters(job: Job, ops: Iterable[TensorOp]) -> tuple[int, int]:
    """(all parameters, those that a token visits): of the routed experts k of E."""
    total = sum(info.size for op in ops for info in op.outputs)
    source = job.parents[0]
    one = 0
    for matrix in job.target.matrices:
        size = source.info(matrix, job.sparse[0]).size
        one += size if matrix == "down_bias" else size * job.shape.width // job.settings["intermediate_size"]
    routed = one * len(job.sparse)
    return total, total - routed * (job.shape.experts - job.shape.top_k)


def _input_bytes(op: TensorOp) -> int:
    found = 0
    for item in op.inputs:
        info = item.checkpoint.tensors[item.name]
        share = 1.0 if item.rows is None else (item.rows.stop - item.rows.start) / info.shape[0]
        found += int(info.nbytes * share)
    return found


def _open(src: Artifact, options: Options, method: Bound) -> list[Checkpoint]:
    from moeforge.checkpoint import open_checkpoint

    refs = [src.ref, *method.parents]
    return [
        open_checkpoint(
            ref,
            allow_pickle=options.allow_pickle,
            dequantize=options.dequantize,
            plan=src.plan if index == 0 else None,
        )
        for index, ref in enumerate(refs)
    ]


__all__ = ["Upcycle", "replace"]
