"""The verb: plan the adapter from headers alone, start its tensors, write them, prove them from the written files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.adapter_layout import FORMAT_VERSION, PEFT_TYPE, READERS, deciders, shapes_of
from moeforge.checkpoint.base import COMPRESSION, Checkpoint
from moeforge.checkpoint.expert_adapter import ExpertAdapter, adapter_ops, plain_tensors, shapes_digest, write_settings
from moeforge.checkpoint.linear_maps import LinearMap, linear_maps
from moeforge.checkpoint.tensor import TensorInfo
from moeforge.checkpoint.writer import write_checkpoint
from moeforge.errors import BadInput, GateRefused, UsageProblem
from moeforge.mixture.config import MixtureConfig
from moeforge.options import format_bytes
from moeforge.pipeline.artifact import Artifact, Plan
from moeforge.pipeline.context import Context
from moeforge.pipeline.stage import Bound, Written
from moeforge.pipeline.workspace import Workspace

from .design import Content, Design, entries, settle
from .options import Options

ONE_FILE = 1 << 62


@dataclass(frozen=True)
class Job:
    """What `plan` hands to `run`."""

    src: Artifact
    base: Checkpoint
    maps: Mapping[tuple[str, int], LinearMap]
    entries: list[MixtureConfig]
    shapes: dict[str, tuple[int, ...]]
    design: Design
    options: Options
    method: Bound
    content: Content | None


class Attach:
    """See :class:`moeforge.pipeline.stage.Stage`."""

    name = "attach"
    summary = "put LoRA experts beside a frozen model, new or imported; writes an adapter"
    examples = {
        "moeforge attach org/dense --method mixlora -o adapter": "8 LoRA experts in every FFN, 2 active; the base is not copied",
        "moeforge attach base --method mola --experts diamond --rank 8 -o adapter": "more experts in the middle layers",
        "moeforge attach base --method lora-mixer --experts-from math=loras/math --experts-from code=loras/code -o adapter": "trained LoRAs as "
        "frozen experts under a new router",
    }  # fmt: skip
    api_version = 1
    consumes = frozenset({"checkpoint", "gguf", "adapter"})
    produces = "adapter"
    output = "directory"
    default_method = "mixlora"
    Options = Options

    def plan(self, src: Artifact, options: Options, method: Bound | None) -> Plan:
        assert method is not None
        base = open_checkpoint(
            src.ref, allow_pickle=options.allow_pickle, dequantize=options.dequantize, compressed=True, plan=src.plan
        )
        try:
            return _plan(src, base, options, method)
        except BaseException:
            base.close()
            raise

    def run(self, plan: Plan, out: Workspace, ctx: Context) -> Written:
        from .start import start
        from .verify import verify

        job: Job = plan.payload
        made = start(job)
        infos = {
            name: (TensorInfo(name, "F32", tuple(value.shape)), (lambda value=value: value))
            for name, value in made.values.items()
        }
        with ctx.bar("writing", plan.facts["write_bytes"], "B") as bar:
            written = write_checkpoint(adapter_ops(infos), out.path, stem="adapter_model", max_shard_bytes=ONE_FILE, on_bytes=bar.advance,
                                       check=ctx.check)  # fmt: skip
        write_settings(out.path, settings(job, made.entries))
        verdicts: dict[str, Any] = dict(plan.verdicts)
        notes: list[str] = []
        checked = verify(job, out.path, ctx)
        verdicts |= checked
        if checked["verified"]:
            notes.append(checked["proof"])
            if checked["failed"]:
                raise GateRefused(f"the written adapter is not what it should be: {checked['failed'][0]}; {out.output} was not made, what was "
                                  f"written lies in {out.path}")  # fmt: skip
        parents = (job.base.provenance(), *(job.content.parents if job.content else ()))
        job.base.close()
        counts = {"parameters_trainable": plan.facts["parameters_trainable"], "parameters_adapter": plan.facts["parameters_adapter"],
                  "experts_by_layer": plan.facts["experts_by_layer"], "tensors": len(job.shapes)}  # fmt: skip
        return Written(
            self.produces, counts, verdicts, dict(written.files), written.tensor_digests, parents, tuple(notes)
        )


def _plan(src: Artifact, base: Checkpoint, options: Options, method: Bound) -> Plan:
    if isinstance(base, ExpertAdapter) or base.config.get("mixtures"):
        raise BadInput(f"{src.ref}: has mixtures already; attach to the dense base, or tune what is there")
    tensors = plain_tensors(base)
    maps = linear_maps(base.config, tensors, base.ref)
    design = settle(method.method.design(options, method.options), options)
    brings = getattr(method.method, "content", None)
    content = None if brings is None else brings(base, maps, design, options, method.options, method.parents)
    found = entries(design, options, maps, src.ref) if content is None else content.entries
    raw = [entry.as_json() for entry in found]
    if options.router_input == "shared" and not deciders(raw, src.ref):
        raise UsageProblem(f"--router-input shared: no layer has experts at two linear maps that read the same ({_listed(READERS)}); there are "
                           f"some at {', '.join(dict.fromkeys(e.site for e in found if e.router.kind != 'always')) or 'none'}")  # fmt: skip
    if options.router_init == "prototypes":
        _require_prototypes(found, imported=content is not None)
    shapes = shapes_of(raw, maps, src.ref)
    total = sum(_size(shape) for shape in shapes.values())
    frozen = sum(_size(shapes[name]) for name in content.tensors if "lora_" in name) if content else 0
    base_size = sum(info.size for info in tensors.values())
    table = by_layer(found)
    return Plan(
        verb="attach", method=method.name,
        summary=f"{method.name}: {total:,} parameters beside {base_size:,} frozen ones ({total / base_size:.2%}), {format_bytes(4 * total)}",
        config=None,
        tensors={name: ("F32", shape) for name, shape in shapes.items()},
        facts={
            "parameters_adapter": total, "parameters_trainable": total - (frozen if content and all(e.experts.options.get("frozen") for e in
                                         found if e.router.kind != "always") else 0),
            "parameters_base": base_size, "experts_by_layer": table, "mixtures": len(found),
            **({"imported": list(content.table)} if content and content.table else {}),
            "read_bytes": 0, "write_bytes": 4 * total, "peak_memory_bytes": 300_000_000 + 8 * total,
        },
        verdicts={"exact": content is None, **({} if content is None else {"why_inexact": "imported experts are not zero"})},
        warnings=(*(content.warnings if content else ()), *_warnings(options, found, base)),
        payload=Job(src, base, maps, found, shapes, design, options, method, content),
    )  # fmt: skip


def _warnings(options: Options, found: list[MixtureConfig], base: Checkpoint) -> list[str]:
    said = []
    ffn = [entry for entry in found if entry.experts.type == "lora_ffn"]
    if ffn and (options.dora or options.dropout):
        what = "--dora" if options.dora else "--dropout"
        said.append(
            f"{what} at the site ffn: the frozen down projection runs once for each expert that a token visits, not once a token"
        )
    if options.base_weight == "paper" and any(not e.router.renormalise or e.router.null_experts for e in ffn):
        said.append(
            "--base-weight paper with gates that do not sum to one: the frozen FFN is shrunk at step 0, as in the paper"
        )
    if options.dora and COMPRESSION in base.config:
        raise BadInput(
            f"{base.ref}: --dora needs the base's weights, which are packed ({COMPRESSION}); attach to the plain base"
        )
    return said


def by_layer(found: list[MixtureConfig]) -> dict[str, list[int]]:
    """Site -> experts in each layer; 0 where it has none."""
    depth = 1 + max(max(entry.layers) for entry in found)
    table: dict[str, list[int]] = {}
    for entry in found:
        row = table.setdefault(entry.site, [0] * depth)
        for layer in entry.layers:
            row[layer] = entry.experts.count
    return table


def settings(job: Job, whole: list[MixtureConfig]) -> dict[str, Any]:
    """adapter_config.json."""
    base = job.base.provenance()
    chosen = {**dataclasses.asdict(job.options), **dataclasses.asdict(job.method.options)}
    for key in ("allow_pickle", "dequantize", "verify", "seed"):
        chosen.pop(key, None)
    return {
        "peft_type": PEFT_TYPE, "format_version": FORMAT_VERSION, "task_type": "CAUSAL_LM", "base_model_name_or_path": job.src.ref,
        "revision": base.get("revision"), "base_model_type": job.base.config.get("model_type"),
        "base_shapes_sha256": shapes_digest(plain_tensors(job.base)), "mixtures": [entry.as_json() for entry in whole],
        "attach": {"method": job.method.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in chosen.items()}},
        "experts": list(job.content.experts) if job.content else [],
    }  # fmt: skip


def _require_prototypes(found: Sequence[MixtureConfig], *, imported: bool) -> None:
    """
    Raises:
        UsageProblem: there is nothing that routers could start at, or no router that would.
    """
    if not imported:
        raise UsageProblem("--router-init prototypes: new experts change nothing yet, so there is no input that they answer most; it is for "
                           "imported LoRAs (--experts-from), or leave it out")  # fmt: skip
    if not any(entry.router.kind == "cosine" for entry in found):
        kinds = ", ".join(dict.fromkeys(entry.router.kind for entry in found))
        raise UsageProblem(
            f"--router-init prototypes: directions are rows of a cosine router, here is {kinds}; add --router cosine"
        )


def _listed(groups: Iterable[Iterable[str]]) -> str:
    return "; ".join(", ".join(group) for group in groups)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
