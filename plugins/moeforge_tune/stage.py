"""`moeforge tune SRC --data D`: continue training; the result has the layout that came in."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from moeforge.checkpoint.expert_adapter import ExpertAdapter
from moeforge.checkpoint.tensor import FLOATS, TensorInfo
from moeforge.errors import BadInput, MachineLacks, UsageProblem
from moeforge.pipeline.artifact import Artifact, Plan
from moeforge.pipeline.stage import Bound, Written
from moeforge.train.data import find_pools, hold_out_pools
from moeforge.train.labels import check_route, labels_of, name_labels, number_labels

from .job import Job
from .options import Options
from .ranks import lay_out
from .teacher import check_tokens, open_teacher, parameters, parent, pinned

if TYPE_CHECKING:
    from moeforge.checkpoint.base import Checkpoint
    from moeforge.pipeline.context import Context
    from moeforge.pipeline.workspace import Workspace

BYTES_PER_TOKEN = 4
"""Of text, for estimates before a tokenizer has run."""


class Tune:
    """See :class:`moeforge.pipeline.stage.Stage`."""

    name: ClassVar[str] = "tune"
    summary: ClassVar[str] = "continue training on text; balances the experts, resumes after a kill"
    examples: ClassVar[dict[str, str]] = {
        "moeforge tune moe --data notes/ --steps 500 -o tuned": "500 updates on a folder of text",
        "moeforge tune moe --data builtin:prose --train experts,routers --minutes 5 -o tuned": "on text that is on every machine",
        "moeforge tune moe --data notes/ --teacher dense --kd 0.9 -o tuned": "on a folder of text and on what the dense model makes of it",
        "moeforge tune moe --data notes/ --fsdp 4 --ep 4 --dry-run": "what each of four ranks would take; `torchrun --nproc-per-node 4 $(which moeforge)` instead of `moeforge` starts them",
    }
    api_version: ClassVar[int] = 1
    consumes: ClassVar[frozenset[str]] = frozenset({"checkpoint", "gguf", "adapter"})
    produces: ClassVar[str] = "checkpoint"
    output: ClassVar[Literal["directory", "file"]] = "directory"
    default_method: ClassVar[str | None] = None
    Options: ClassVar[type] = Options

    def inputs(self, options: Options, method: Bound | None) -> list[Any]:
        """Identity of the text, for the run's key: names, sizes and times, no contents; and of the teacher."""
        text = [
            document.identity for pool in find_pools(options.data, options.label_field) for document in pool.documents
        ]
        return text if options.teacher is None else [*text, ["teacher", pinned(options.teacher)[1]]]

    def plan(self, src: Artifact, options: Options, method: Bound | None) -> Plan:
        from moeforge.checkpoint import open_checkpoint

        with open_checkpoint(src.ref, plan=src.plan, compressed=True) as source:
            refuse(source)
            if options.teacher is None:
                return _plan(src, source, options, None)
            with open_teacher(pinned(options.teacher)[0].ref) as teacher:
                check_causal(teacher, f"--teacher {teacher.ref}")
                check_tokens(teacher, source)
                return _plan(src, source, options, teacher)

    def run(self, plan: Plan, out: Workspace, ctx: Context) -> Written:
        from moeforge_tune.run import run

        return run(plan, out, ctx)

    def follow(self, plan: Plan, ctx: Context) -> None:
        from moeforge_tune.run import follow

        follow(plan, ctx)

    def dismiss(self) -> None:
        from moeforge_tune.run import dismiss

        dismiss()


def refuse(source: Checkpoint) -> None:
    """Sources that cannot learn.

    Raises:
        BadInput: no causal language model, or weights that are stored quantised.
    """
    config = source.config
    for key in ("quantization_config", "moeforge_compression"):
        if config.get(key):
            raise BadInput(
                f"{source.ref}: config.json has {key}: quantised weights cannot be trained; tune first, compress after"
            )
    # the base under an adapter is frozen, however it is stored
    bad = next((info for info in written(source).values() if info.dtype not in FLOATS and len(info.shape) > 1), None)
    if bad is not None:
        raise BadInput(
            f"{source.ref}: {bad.name} is {bad.dtype}: only floating-point weights can be trained; convert it first"
        )
    check_causal(source, source.ref)


def check_causal(source: Checkpoint, called: str) -> None:
    """
    Raises:
        BadInput: its config names something else than a causal language model.
    """
    named = source.config.get("architectures") or []
    if named and not any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in named):
        raise BadInput(
            f"{called}: architectures = {named}: not a causal language model, which is what tune trains and learns from"
        )


def written(source: Checkpoint) -> Mapping[str, TensorInfo]:
    """The tensors that come out: of an adapter its own, never its base's."""
    return (
        {name: source.tensors[name] for name in sorted(source.own)}
        if isinstance(source, ExpertAdapter)
        else source.tensors
    )


def _check_length(source: Checkpoint, called: str, length: int) -> None:
    """
    Raises:
        UsageProblem: rows of `length` tokens are more than its config allows.
    """
    limit = (source.config.get("base_config") or source.config).get("max_position_embeddings")
    if isinstance(limit, int) and length > limit:
        raise UsageProblem(f"--sequence-length {length}: max_position_embeddings{called} is {limit}; use at most that")


def _plan(src: Artifact, source: Checkpoint, options: Options, teacher: Checkpoint | None) -> Plan:
    from moeforge.train.estimate import count_selected, peak_memory

    if options.optimizer == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise MachineLacks("--optimizer adamw-8bit needs bitsandbytes, which is not installed here: pip install bitsandbytes, "
                           "or use --optimizer adamw")  # fmt: skip
    pools = find_pools(options.data, options.label_field)
    adapter = source if isinstance(source, ExpertAdapter) else None
    names = [str(expert.get("name")) for expert in adapter.settings.get("experts", ())] if adapter else []
    labels = name_labels(pools, names)
    pools = number_labels(pools, labels)
    check_route(source.config, options.routing, labels_of(pools), source.ref)
    train, held = hold_out_pools(pools, options.held_out, options.seed)
    documents = [document for pool in train for document in pool.documents]
    total = sum(info.size for info in source.tensors.values())
    out = written(source)
    learning = {name: info for name, info in out.items() if name not in adapter.frozen} if adapter else out
    trained = count_selected(source.config, learning, options.train, adapter=adapter is not None)
    layout = lay_out(source, options)
    budget, amount = options.budget
    per_step = options.tokens_a_pass * options.accumulate * layout.data
    tokens = None if budget == "minutes" else int(amount * (per_step if budget == "steps" else 1))
    available = sum(document.size for document in documents) // BYTES_PER_TOKEN
    warnings = []
    if tokens is not None and available and tokens > 20 * available:
        warnings.append(
            f"{tokens:,} tokens of training on about {available:,} tokens of text: {tokens // available} passes"
        )
    if trained is None:
        warnings.append(f"--train {options.train}: whether it selects anything is known only once the model is loaded, whose "
                        "parameters are not called as the tensors of the files")  # fmt: skip
    _check_length(source, "", options.sequence_length)
    if teacher is not None:
        _check_length(teacher, f" of --teacher {teacher.ref}", options.sequence_length)
    facts = {
        "parameters_total": total,
        "parameters_trained": trained if trained is not None else f"those that match {options.train}",
        "parameters_teacher": None if teacher is None else parameters(teacher),
        "optimizer_bytes": None if trained is None else options.moment_bytes * trained,
        "tokens": tokens,
        "tokens_a_step": per_step,
        "budget": f"{amount:g} {budget}",
        "documents": len(documents),
        "documents_held_out": len(held),
        "text_tokens": available,
        "read_bytes": sum(info.nbytes for found in (source, teacher) if found for info in found.tensors.values()),
        "write_bytes": sum(info.nbytes for info in out.values()),
        "peak_memory_bytes": peak_memory(
            source.config.get("base_config") or source.config,
            total,
            sum(info.size for info in learning.values()) if trained is None else trained,
            short=options.precision == "bf16",
            rows=options.batch_size,
            tokens=options.tokens_a_pass,
            shards=layout.shards,
            checkpointing=options.gradient_checkpointing,
            moments=options.moment_bytes,
            teacher=0 if teacher is None else parameters(teacher),
        ),
    }
    beside = "" if teacher is None else f" and on what {teacher.ref} makes of them"
    what = options.train if trained is None else f"{trained:,} of {total:,} parameters"
    return Plan(
        verb="tune", method=None,
        summary=f"train {what} for {amount:g} {budget} on {len(documents)} documents{beside}",
        config=None if adapter else dict(source.config),
        tensors={name: (info.dtype, info.shape) for name, info in out.items()},
        facts={name: value for name, value in facts.items() if value is not None},
        warnings=tuple(warnings),
        payload=Job(src, options, tuple(train), tuple(held), layout, tuple(labels), None if teacher is None else parent(teacher)),
    )  # fmt: skip
