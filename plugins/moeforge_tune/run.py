"""The work of `tune`: load, train, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.expert_adapter import ExpertAdapter
from moeforge.checkpoint.writer import WrittenCheckpoint
from moeforge.errors import UsageProblem
from moeforge.model.adapters import read_own
from moeforge.model.build import build
from moeforge.model.kernels import use_kernels_where_faster
from moeforge.model.layout import own_tensors
from moeforge.model.load import load
from moeforge.model.tokenizer import load_tokenizer
from moeforge.model.weights import WeightMap
from moeforge.pipeline.artifact import Plan
from moeforge.pipeline.stage import Written
from moeforge.report.plots import check_drawing, plot_load, plot_loss
from moeforge.train.data import Pool
from moeforge.train.encoding import Encoder
from moeforge.train.hub_data import pinned
from moeforge.train.loop import Loop, Result, borders_hold, peak_memory, save_memory
from moeforge.train.packing import Packer
from moeforge.train.params import choose, frozen_in
from moeforge.train.ranks import Ranks, joined
from moeforge.train.routing import find_sites
from moeforge.train.settings import Settings

from .job import FOLDER, Job
from .teacher import load_teacher
from .write import learnt_values, write

if TYPE_CHECKING:
    from moeforge.checkpoint.base import Checkpoint
    from moeforge.pipeline.context import Context
    from moeforge.pipeline.workspace import Journal, Workspace


def run(plan: Plan, out: Workspace, ctx: Context) -> Written:
    """See :class:`moeforge_tune.stage.Tune`; with several ranks, the first one's part."""
    job: Job = plan.payload
    check_drawing()
    with open_checkpoint(job.src.ref) as source:
        with joined(job.layout.world) as ranks:
            ranks.share(True)
            loop, result, learnt = train(job, source, ranks, ctx, out)
        # alone from here on: the other ranks have done their part, and have ended if they like
        with ctx.bar("writing", plan.facts["write_bytes"], "B") as bar:
            written = write(source, loop, learnt, out.path, bar.advance, ctx.check)
        plot(result, out.path / FOLDER)
        for state in out.path.glob(f"{States.PREFIX}*"):
            state.unlink()
        return report(job, plan, source, loop, result, written)


def follow(plan: Plan, ctx: Context) -> None:
    """The part of every rank but the first: it trains, and writes nothing."""
    job: Job = plan.payload
    with open_checkpoint(job.src.ref) as source, joined(job.layout.world) as ranks:
        if ranks.share(False):
            train(job, source, ranks, ctx, None)


def dismiss() -> None:
    """Tell the ranks that follow that there is nothing to do."""
    with joined(None) as ranks:
        ranks.share(False)


def train(job: Job, source: Checkpoint, ranks: Ranks, ctx: Context, out: Workspace | None) -> tuple[Loop, Result, Mapping[str, torch.Tensor]]:  # fmt: skip
    """The loop when it has run, what it did, and what was learnt: parameter name -> value, on the first rank."""
    loop = prepare(job, source, ranks, ctx, out)
    # what stops one rank must stop all, which a bar does not know; the loop asks them
    bar = ctx.bar if ranks.size == 1 else partial(ctx.progress.bar, check=lambda: None)
    result = loop.run(bar)
    return loop, result, learnt_values(loop)


def prepare(job: Job, source: Checkpoint, ranks: Ranks, ctx: Context, out: Workspace | None) -> Loop:
    """Model, text and settings of the loop; states and metrics go to `out`, which only the first rank has."""
    options = job.options
    device = ranks.device
    short = options.precision == "bf16" or (options.precision == "auto" and device.type != "cpu")
    dtype = torch.bfloat16 if short else torch.float32
    torch.manual_seed(options.seed)
    tokenizer = load_tokenizer(source)
    if job.layout.sharded:
        from moeforge.train.engine import load_sharded

        model, ranks = load_sharded(source, job.layout, ranks, short=short)
    else:
        model = load(source, dtype=dtype, device=device)
        use_kernels_where_faster(model)
    sites = find_sites(model)
    choice = choose(model, sites, options.train, frozen_in(model))
    if options.preserve and not choice.experts:
        raise UsageProblem(
            f"--preserve {options.preserve:g}: no expert learns with --train {options.train}; leave it out"
        )
    if options.gradient_checkpointing:
        save_memory(model)
    vocabulary = model.config.get_text_config().vocab_size
    teacher = None if job.teacher is None else load_teacher(job.teacher.ref, source, vocabulary, dtype, device)
    borders = {type(model).__name__: borders_hold(model, sites, vocabulary)}
    ranks.settle(model)
    if teacher is not None:
        borders[f"the teacher, a {type(teacher.model).__name__},"] = borders_hold(
            teacher.model, teacher.sites, vocabulary
        )
    shared = all(borders.values())
    for who in (who for who, holds in borders.items() if not holds):
        ctx.warn(f"{who} cannot keep packed documents apart, so each row holds one and is padded: slower, same result")
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    if ranks.size > 1:
        where = f"{ranks.size} ranks of {where} ({job.layout})"
    ctx.say(f"{choice.told(sum(p.numel() for p in model.parameters()))}; {'bf16' if short else 'fp32'}, {len(sites)} mixture layers, {where}")  # fmt: skip
    precise = _precise(source, model, ranks) if model.dtype == torch.bfloat16 else None

    def packer(pools: Sequence[Pool], seed: int | None) -> Packer:
        pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
        return Packer(pools, Encoder(tokenizer), options.sequence_length, seed, shared=shared, pad=pad)

    budget, amount = options.budget
    settings = Settings(
        rows=options.batch_size, accumulate=options.accumulate, budget=budget, amount=amount,
        optimizer=options.optimizer, learning_rate=options.learning_rate, router_scale=options.router_scale, weight_decay=options.weight_decay,
        schedule=options.schedule, warmup=options.warmup, clip=options.clip, balance=options.balance, z=options.z_loss,
        entropy=options.entropy, entropy_sign=options.entropy_sign, importance=options.importance, preserve=options.preserve,
        kd=options.kd_weight, kd_temperature=options.kd_temperature, lora_plus=options.lora_plus, route=options.routing,
        evaluate_every=options.evaluate_every, routing_every=options.routing_every, save_every=options.save_every,
    )  # fmt: skip
    directory = keeper = None
    if out is not None:
        directory, keeper = out.path / FOLDER, States(out.path, out.journal)
        directory.mkdir(exist_ok=True)
    return Loop(model, sites, choice, settings, packer(job.train, options.seed), packer([Pool(job.held)], None) if job.held else None,
                directory, precise=precise, keeper=keeper, check=ctx.check, say=ctx.say, ranks=ranks, teacher=teacher)  # fmt: skip


def _precise(source: Checkpoint, model: Any, ranks: Ranks) -> Any:
    """Reads a parameter in float32 however the model holds it."""
    if isinstance(source, ExpertAdapter):
        own = {item.parameter: item for item in own_tensors(model)}
        return lambda name: read_own(source, own[name])
    weights = WeightMap(source, build(source.config))

    def read(name: str) -> torch.Tensor:
        weights.fill([name], torch.float32)
        value = weights.model.get_parameter(name).detach()
        weights.free([name])
        return ranks.part(value, model.get_parameter(name))

    return read


class States:
    """The loop's saved states, in the staging directory; the newest is enough."""

    PREFIX = "state-"

    def __init__(self, directory: Path, journal: Journal) -> None:
        self.directory, self.journal = directory, journal

    def newest(self) -> Path | None:
        whole = [self.directory / name for name in self.journal.finished if name.startswith(self.PREFIX)]
        return max((path for path in whole if path.exists()), default=None)

    def place(self, step: int) -> Path:
        return self.directory / f"{self.PREFIX}{step:010d}.safetensors"

    def record(self, path: Path, step: int) -> None:
        self.journal.record(path.name, {"step": step})
        for other in self.directory.glob(f"{self.PREFIX}*"):
            if other != path:
                other.unlink()


def plot(result: Result, directory: Path) -> None:
    """loss.png and, for a mixture, load.png."""
    held = result.metrics.of("held_out")
    plot_loss(result.metrics.of("step"), held, directory / "loss.png")
    if held and held[0]["load"]:
        loads = {f"step {record['step']}": record["load"] for record in (held[0], held[-1])}
        plot_load(loads, directory / "load.png")


def report(job: Job, plan: Plan, source: Checkpoint, loop: Loop, result: Result, written: WrittenCheckpoint) -> Written:
    """Numbers for manifest and summary."""
    counts: dict[str, Any] = {
        "parameters_total": plan.facts["parameters_total"], "parameters_trained": loop.choice.size,
        "steps": result.steps, "tokens": result.tokens, "train_seconds": round(result.seconds, 2),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "data": [pinned(spec) for spec in job.options.data],
    }  # fmt: skip
    if loop.device.type == "cuda":
        counts["peak_device_bytes"] = peak_memory(loop.device)
    notes = [f"{result.steps} steps, {result.tokens:,} tokens, {result.tokens_per_second:.0f} tokens/s"]
    if job.teacher is not None:
        taught = result.metrics.of("step")
        notes.append(
            f"distance from the teacher {taught[0]['kd']:.4f} -> {taught[-1]['kd']:.4f} in the first and last update"
        )
    held = result.metrics.of("held_out")
    verdicts: dict[str, Any] = {}
    if held:
        first, last = held[0], held[-1]
        verdicts = {
            "held_out_loss_before": first["loss"],
            "held_out_loss_after": last["loss"],
            "held_out_tokens": last["tokens"],
        }
        notes.append(f"held-out loss {first['loss']:.4f} -> {last['loss']:.4f}")
        if last["imbalance"] is not None:
            verdicts |= {"imbalance_before": first["imbalance"], "imbalance_after": last["imbalance"]}
            notes.append(f"busiest expert over the mean {first['imbalance']:.2f} -> {last['imbalance']:.2f}")
    notes.append(f"plots and metrics in {FOLDER}/")
    if job.labels:
        counts["labels"] = list(job.labels)
    return Written(
        "adapter" if isinstance(source, ExpertAdapter) else "checkpoint",
        counts,
        verdicts,
        dict(written.files),
        written.tensor_digests,
        (source.provenance(), *([] if job.teacher is None else [job.teacher.provenance])),
        tuple(notes),
    )
