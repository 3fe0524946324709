"""The verb `eval`: how well a checkpoint predicts text, alone or beside another one."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moeforge.errors import UsageProblem
from moeforge.options import opt
from moeforge.pipeline.artifact import Artifact
from moeforge.pipeline.context import Context
from moeforge.pipeline.reading import Decoding
from moeforge.pipeline.stage import Answer
from moeforge.report.table import table
from moeforge.train.metrics import perplexity_text


@dataclass(frozen=True)
class Options(Decoding):
    data: tuple[str, ...] = opt("text to predict: .txt .md .rst .py .jsonl .parquet, a directory, a dataset of the Hub "
                                "(org/name[@revision][:split]), or builtin:prose, builtin:code, builtin:legal; "
                                "SOURCE=WEIGHT, as `tune` takes it, so that --held-out finds the same",
                                default=(), metavar="SOURCE", reads=True)  # fmt: skip
    against: str | None = opt("another checkpoint: KL divergence from it, and how often both prefer the same token",
                              default=None, metavar="REF", reads=True)  # fmt: skip
    held_out: float = opt("only the share of the documents that `tune` with this value, --seed and --data keeps out of training; "
                          "0 takes all", default=0.0, min=0, max=0.9)  # fmt: skip
    tokens: int | None = opt("stop after this many predicted tokens; unset: the whole text", default=None, min=1)
    sequence_length: int = opt("documents are cut into windows of this many predicted tokens", default=1024, min=1, unit="tokens")  # fmt: skip
    batch_size: int = opt("windows in one forward pass", default=1, min=1)
    seed: int = opt("order of the documents, which matters with --tokens and --held-out", default=0, min=0)
    routing: bool = opt(
        "also watch the routers: load, idle experts and entropy of every layer, and the load by --data source",
        default=False,
    )
    memory: Literal["auto", "whole", "layers"] = opt(
        "hold the model whole, or one layer at a time whatever its size; auto: whole where it fits", default="auto"
    )
    dtype: str | None = opt("float type to compute in; unset: float32 on a CPU, else the checkpoint's", default=None)
    device: str = opt("where to run: cpu, cuda, cuda:1, mps", default="cpu")
    lm_eval: tuple[str, ...] = opt("tasks of lm-evaluation-harness, run on the loaded model: hellaswag, arc_easy, ...",
                                   default=(), metavar="TASKS")  # fmt: skip
    limit: int | None = opt("with --lm-eval: this many examples of each task", default=None, min=1)

    def __post_init__(self) -> None:
        if not self.data and not self.lm_eval:
            raise UsageProblem("eval needs text: --data PATH, or --data builtin:prose (or --lm-eval TASKS)")
        if not self.data and (self.against is not None or self.tokens is not None or self.held_out):
            raise UsageProblem("--against, --tokens and --held-out are about text: give --data PATH too")
        if self.routing and not self.data:
            raise UsageProblem("--routing is watched while text is predicted: give --data PATH too")
        if self.routing and self.memory == "layers":
            raise UsageProblem(
                "--routing is watched in a model that is whole in memory; leave it or --memory layers out"
            )
        if self.limit is not None and not self.lm_eval:
            raise UsageProblem("--limit is about the examples of --lm-eval TASKS; use --tokens to bound the text")
        if self.lm_eval and self.memory == "layers":
            raise UsageProblem(
                "--memory layers cannot serve --lm-eval, which asks again and again; leave one of them out"
            )


class Eval:
    name: ClassVar[str] = "eval"
    summary: ClassVar[str] = "measure perplexity and accuracy on text, and the distance from another checkpoint"
    examples: ClassVar[dict[str, str]] = {
        "moeforge eval tuned --data builtin:prose --tokens 20000": "on text that is on every machine",
        "moeforge eval moe --data prose/ --data code/ --routing --json > eval.json": "and who works for which of the two; `report --eval` draws it",
        "moeforge eval small --against tuned --data notes/ --json": "what compression cost, as one line of JSON",
    }
    api_version: ClassVar[int] = 1
    consumes: ClassVar[frozenset[str]] = frozenset({"checkpoint", "gguf", "adapter"})
    sources: ClassVar[int] = 1
    Options: ClassVar[type] = Options

    def answer(self, sources: list[Artifact], options: Options, ctx: Context) -> Answer:
        from .harness import check_installed

        if options.lm_eval:
            check_installed()
        data: dict[str, Any] = {"ref": sources[0].ref}
        told: list[str] = []
        if options.data:
            found = measure_text(sources[0].ref, options, ctx)
            data |= found
            told.append(describe(found))
        if options.lm_eval:
            from .harness import run_tasks

            with _open(sources[0].ref, options) as checkpoint:
                data["lm_eval"] = run_tasks(checkpoint, options, ctx)
            rows = [(task, metric, f"{value:.4g}") for task, found in data["lm_eval"].items() for metric, value in found.items()]  # fmt: skip
            told.append("\n".join(table(("task", "metric", "value"), rows)))
        return Answer(data, "\n\n".join(told))


def measure_text(ref: str, options: Options, ctx: Context) -> dict[str, Any]:
    """The numbers of :func:`moeforge.train.evaluation.measure`, with what they were measured on."""
    from moeforge.train.data import find_pools, hold_out_pools

    pools = find_pools(options.data)
    if options.held_out:
        documents = hold_out_pools(pools, options.held_out, options.seed)[1]
    else:
        documents = [document for pool in pools for document in pool.documents]

    import transformers

    from moeforge.model.compute import check_compute
    from moeforge.train.evaluation import Setting, measure
    from moeforge.train.hub_data import pinned

    transformers.logging.set_verbosity_error()
    check_compute(options.device, options.dtype)
    setting = Setting(options.sequence_length, options.tokens, options.batch_size, options.seed, options.memory,
                      options.dtype, options.device, options.routing)  # fmt: skip
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(_open(ref, options))
        against = None if options.against is None else stack.enter_context(_open(options.against, options))
        found = measure(documents, checkpoint, against, setting, ctx)
    return {
        **({"against": options.against} if options.against else {}), **found.values,
        "tokens_per_second": found.tokens_per_second, "data": [pinned(spec) for spec in options.data],
        "documents": len(documents), "windows": found.windows, "sequence_length": options.sequence_length,
        "dtype": found.dtype, "memory": found.how, **({"routing": found.routing} if found.routing else {}),
    }  # fmt: skip


def describe(found: dict[str, Any]) -> str:
    """The numbers as a table for people."""
    rows = [("perplexity", perplexity_text(found['perplexity'])), ("loss", f"{found['loss']:.4f} nats a token"),
            ("next token right", f"{found['accuracy']:.1%}")]  # fmt: skip
    if "against" in found:
        rows += [(f"perplexity of {found['against']}", perplexity_text(found['against_perplexity'])),
                 ("KL divergence from it", f"{found['kl']:.3g} nats a token"),
                 ("same favourite token", f"{found['agreement']:.1%}")]  # fmt: skip
    if (imbalance := found.get("routing", {}).get("imbalance")) is not None:
        rows.append(
            ("busiest expert over the mean", f"{imbalance:.2f}, mean of {len(found['routing']['load'])} layers")
        )
    rows += [("measured on", f"{found['tokens']:,} tokens of {', '.join(found['data'])}"),
             ("computed", f"{found['dtype']}, {found['memory']}, {found['tokens_per_second']:.0f} tokens/s")]  # fmt: skip
    return "\n".join(table(("measure", "value"), rows))


def _open(ref: str, options: Options) -> Any:
    from moeforge.checkpoint import open_checkpoint

    return open_checkpoint(ref, allow_pickle=options.allow_pickle, dequantize=options.dequantize, compressed=True)
