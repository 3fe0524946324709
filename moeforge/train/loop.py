"""The training loop: rows in, a better model out, at any moment ready to be killed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..errors import BadInput, GateRefused, Interrupted, ReaderGone, UsageProblem
from ..mixture.router import Router
from ..mixture.statistics import Statistics
from ..options import format_bytes
from ..pipeline.manifest import peak_rss_bytes
from .batch import Batch, forward
from .distill import Teacher
from .labels import labels_of
from .losses import token_loss_sum
from .metrics import Metrics, load_metrics
from .packing import IGNORE, Cursor, Packer, Row
from .params import Choice, Masters, make_optimizer
from .ranks import Ranks
from .routing import Site
from .schedule import rate
from .settings import Settings
from .state import load_state, save_state
from .step import Step

T = TypeVar("T")


class Keeper(Protocol):
    """Where the loop keeps its state between two lives."""

    def newest(self) -> Path | None: ...

    def place(self, step: int) -> Path: ...

    def record(self, path: Path, step: int) -> None: ...


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: of the accelerator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_rss_bytes()


@dataclass(frozen=True)
class Result:
    """What a run did, for manifest and plots."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    metrics: Metrics


def save_memory(model: nn.Module) -> None:
    """Keep the inputs of layers only and compute the rest again in the backward pass (arXiv:1604.06174)."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.20 on
        model.activation_checkpointing_enable(kwargs)  # pyright: ignore[reportCallIssue]
    else:
        model.gradient_checkpointing_enable(kwargs)  # pyright: ignore[reportCallIssue]


@torch.no_grad()
def borders_hold(model: nn.Module, sites: list[Site], vocabulary: int) -> bool:
    """Whether the model keeps packed documents apart: another first document must not change the second one's logits.

    Raises:
        BadInput: the routers do not say what they do.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (2, 8), generator=generator).to(device)
    tokens[1, 4:] = tokens[0, 4:]
    positions = (torch.arange(8, device=device) % 4).expand(2, 8)
    training = model.training
    model.eval()
    try:
        logits, _ = forward(model, sites, Batch(tokens, tokens, positions, tokens >= 0, torch.zeros_like(tokens)))
    except TypeError as error:
        import transformers

        raise BadInput(
            f"{type(model).__name__}: {error} (transformers {transformers.__version__}; 5.17 and later do)"
        ) from error
    finally:
        model.train(training)
    own, other = logits[:, 4:].float()
    # a batch's rows may be summed in another order, so equality is up to rounding
    scale = own.abs().max().clamp_min(1e-30)
    return bool((own - other).abs().max() <= (0.05 if logits.dtype == torch.bfloat16 else 1e-4) * scale)


@torch.no_grad()
def evaluate(model: nn.Module, sites: list[Site], packer: Packer, rows: int, device: torch.device,
             tick: Callable[[int], None] = lambda _: None, ranks: Ranks | None = None) -> dict[str, Any]:  # fmt: skip
    """Held-out loss in nats a token, and each expert's share of the assignments (by label too, where documents have several), over one
    pass of `packer`, of which each of `ranks` measures its share."""
    ranks = ranks or Ranks(0, 1, device)
    training = model.training
    model.eval()
    known = labels_of(packer.pools)
    predicted, summed, statistics = 0, 0.0, Statistics(known if known > 1 else 0)
    for turn in _chunks(_chunks(packer.rows(repeat=False), rows), ranks.data_size):
        batch = Batch.of(turn[min(ranks.data_rank, len(turn) - 1)], device)
        if ranks.data_rank >= len(turn):
            # nothing is left for this rank, but the others need its passes: one that counts for nothing
            batch = replace(batch, labels=torch.full_like(batch.labels, IGNORE), real=torch.zeros_like(batch.real))
        logits, seen = forward(model, sites, batch)
        predicted += batch.predicted
        summed += float(token_loss_sum(logits, batch.labels))
        statistics.add(seen, None if batch.about is None else batch.about.flatten())
        tick(batch.predicted)
    model.train(training)
    ranks.settle(model)
    predicted, summed = ranks.total(torch.tensor([predicted, summed], dtype=torch.float64)).tolist()
    loss, found = summed / predicted, load_metrics(statistics.over(ranks.total))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(predicted), **found}


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Loop:
    """One training run.

    Args:
        model: parameters on their device; the chosen ones require gradients.
        held_out: None trains without a held-out loss.
        directory: of metrics.jsonl; None on every rank but the first.
        keeper: where states are kept; None keeps none, or leaves it to the first rank.
        precise: see :class:`moeforge.train.params.Masters`.
        teacher: whom to learn from beside the text, `settings.kd` of the loss.
        check: raises when the work should stop; called between forward passes.
        ranks: who trains; as the launcher says when left out.
    """

    def __init__(self, model: nn.Module, sites: list[Site], choice: Choice, settings: Settings, train: Packer,
                 held_out: Packer | None, directory: Path | None, *,
                 precise: Callable[[str], Tensor] | None = None, keeper: Keeper | None = None, check: Callable[[], None] = lambda: None,
                 say: Callable[[str], None] = lambda _: None, ranks: Ranks | None = None, teacher: Teacher | None = None):  # fmt: skip
        self.ranks = ranks or Ranks.here()
        self.model, self.sites, self.choice, self.settings = model, sites, choice, settings
        self.train, self.held_out, self.directory = train, held_out, directory
        self.keeper, self.check, self.say, self.teacher = keeper, check, say, teacher
        self.device = next(model.parameters()).device
        self.masters = Masters(choice.params, precise)
        self.named = self.masters.named
        self.scored = settings.route != "label" and any(site.scored for site in sites)
        self.started = {name: master.detach().clone() for name, master in self.named.items()
                        if settings.preserve and name in choice.experts}  # fmt: skip
        learning = [site for site in sites if any(param.requires_grad for param in site.router.parameters())]
        self.biased = {site.name: site.router for site in learning
                       if isinstance(site.router, Router) and site.router.selection_bias is not None}  # fmt: skip
        ours = {id(router.selection_bias) for router in self.biased.values()}
        self.biases = {name: buffer for name, buffer in model.named_buffers() if id(buffer) in ours}
        """Selection biases by name: moved by the load and not by gradients, so they are kept beside the parameters."""
        self.optimizer = make_optimizer(choice, self.masters, kind=settings.optimizer, rate=settings.learning_rate,
                                        router_scale=settings.router_scale, weight_decay=settings.weight_decay,
                                        lora_plus=settings.lora_plus)  # fmt: skip
        self.moved = 0.0
        """Squared distance of the experts that are to be preserved from where they started."""
        self.step = self.tokens = self._resumed_tokens = 0
        self._resumed_seconds = self._seconds = 0.0
        self.cursor = Cursor()
        self.accumulate = settings.accumulate
        """Passes of each rank before an update. A run that continues on other ranks keeps its rows of an update, so this changes."""

    def run(self, bar: Callable[[str, float, str], Any]) -> Result:
        """Train until the budget is spent.

        Args:
            bar: opens a progress bar for (title, total, unit), see :class:`moeforge.pipeline.context.Context`.

        Raises:
            GateRefused: the loss is not a number.
            Interrupted, ReaderGone: asked to stop; the state is saved first.
        """
        metrics = self._resume()
        self._clock = time.monotonic() - self._resumed_seconds
        amount = self.settings.amount
        with bar("training", amount - self.spent, self.settings.budget) as progress:
            while True:
                random = torch.get_rng_state()
                try:
                    self._read_clock()
                    self._evaluate_if_due(metrics)
                    before = self.spent
                    if before >= amount:
                        break
                    record = self._update()
                    self._read_clock()
                    metrics.add({"event": "step", "step": self.step, **record})
                    random = torch.get_rng_state()
                    progress.advance(self.spent - before, self._note(record["loss"]))
                except (Interrupted, ReaderGone):
                    # stopped between two forward passes: the half step is thrown away and done again
                    torch.set_rng_state(random)
                    self._save(metrics)
                    raise
                if self.settings.save_every and self.step % self.settings.save_every == 0 and self.spent < amount:
                    self._save(metrics)
        self._keep_result(metrics)
        return Result(self.step, self.tokens, self._elapsed(), self.speed, metrics)

    @property
    def spent(self) -> float:
        """How much of the budget is gone, in its unit."""
        return {"steps": self.step, "tokens": self.tokens, "minutes": self._seconds / 60}[self.settings.budget]

    def _elapsed(self) -> float:
        return time.monotonic() - self._clock

    def _read_clock(self) -> None:
        """Take the time where it decides; that of the first rank, as all must stop at the same step."""
        self._seconds = self._elapsed()
        if self.settings.budget == "minutes":
            self._seconds = self.ranks.share(self._seconds)

    @property
    def speed(self) -> float:
        """Tokens a second in this life of the run."""
        return (self.tokens - self._resumed_tokens) / max(self._elapsed() - self._resumed_seconds, 1e-9)

    def _note(self, loss: float) -> str:
        """What stands behind the progress bar."""
        return f"loss {loss:.4f}, {self.speed:.0f} tokens/s, peak {format_bytes(peak_memory(self.device))}"

    def _update(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics."""
        settings, ranks = self.settings, self.ranks
        factor = rate(min(self.spent / settings.amount, 1.0), settings.schedule, settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        stream = self.train.rows(self.cursor)
        chunks: list[list[Row]] = []
        for _ in range(self.accumulate):
            shares = [[next(stream) for _ in range(settings.rows)] for _ in range(ranks.data_size)]
            chunks.append(shares[ranks.data_rank])
            cursor = shares[-1][-1].cursor
        batches = [Batch.of(chunk, self.device) for chunk in chunks]
        sizes = [sum(batch.predicted for batch in batches), sum(int(batch.real.sum()) for batch in batches)]
        predicted, real = ranks.total(torch.tensor(sizes, dtype=torch.float64)).tolist()
        told = settings.routing_every > 0 and (self.step + 1) % settings.routing_every == 0
        step = Step(
            self.model,
            self.sites,
            settings,
            predicted,
            real,
            ranks,
            self.scored,
            Statistics() if told else None,
            self.teacher,
        )
        self.model.train()
        try:
            for batch in batches:
                ranks.stop_together(self.check)
                step.add(batch)
            norm = self._finish_gradients()
            if not math.isfinite(norm):
                raise GateRefused(f"the gradient norm became {norm}")
        except GateRefused as error:
            self._drop_gradients()
            raise GateRefused(
                f"{error} at step {self.step + 1}; nothing was written. "
                f"Lower --learning-rate ({settings.learning_rate:g}), lengthen --warmup, or use --precision fp32"
            ) from error
        self.optimizer.step()
        self._drop_gradients()
        self.masters.publish()
        for name, router in self.biased.items():
            router.balance_bias(step.counts[name], settings.bias_rate)
        self.step, self.tokens, self.cursor = self.step + 1, self.tokens + int(predicted), cursor
        record = {"tokens": int(predicted), "lr": settings.learning_rate * factor, "norm": norm, **step.record()}
        return record | ({"preserve": self.moved} if self.started else {})

    def _finish_gradients(self) -> float:
        """Complete gradients over ranks, add the pull towards the start, clip; returns the norm before clipping."""
        gradients: list[Tensor] = []
        self.moved = 0.0
        for name, master in self.named.items():
            if master.grad is None:
                # an expert without a token, or a parameter out of reach: it still decays and its moments fade
                master.grad = torch.zeros_like(master)
            self.ranks.complete(master)
            if name in self.started:
                away = master.detach() - self.started[name]
                self.moved += float(self.ranks.norm([away])) ** 2
                master.grad.add_(away, alpha=2 * self.settings.preserve)
            gradients.append(master.grad)
        norm = self.ranks.norm(gradients)
        if self.settings.clip > 0:
            self.ranks.scale_(gradients, (self.settings.clip / (norm + 1e-6)).clamp(max=1.0))
        return float(norm)

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _evaluate_if_due(self, metrics: Metrics) -> None:
        """Before the first step, after the last, and every so often; never twice for one step."""
        every, done = self.settings.evaluate_every, metrics.of("held_out")
        due = self.step == 0 or self.spent >= self.settings.amount or (every > 0 and self.step % every == 0)
        if self.held_out is None or not due or (done and done[-1]["step"] == self.step):
            return
        started = time.monotonic()
        found = evaluate(self.model, self.sites, self.held_out, self.settings.rows, self.device,
                         lambda _: self.ranks.stop_together(self.check), self.ranks)  # fmt: skip
        # the budget is for training
        self._clock += time.monotonic() - started
        self._read_clock()
        metrics.add({"event": "held_out", "step": self.step, **found})
        self.say(f"held-out loss {found['loss']:.4f} (perplexity {found['perplexity']:.2f}) after {self.step} steps")

    def _keep_result(self, metrics: Metrics) -> None:
        """What was learnt outlives a result that cannot be written; where there is no room for it, the result is still tried."""
        metrics.sync()
        try:
            self._save(metrics, finished=True)
        except OSError as error:
            self.say(f"what was learnt could not be saved before the result is written: {error}")

    def _save(self, metrics: Metrics, finished: bool = False) -> None:
        if not self.ranks.share(self.keeper is not None):
            return
        path = self.keeper.place(self.step) if self.keeper is not None else None
        meta = {"step": self.step, "tokens": self.tokens, "seconds": self._elapsed(), "metrics": metrics.sync(),
                "cursor": self.cursor.as_json(), "passes": self.accumulate * self.ranks.data_size}  # fmt: skip
        try:
            save_state(path, self.named | self.biases, None if finished else self.optimizer, meta, self.ranks)
            if self.keeper is not None and path is not None:
                self.keeper.record(path, self.step)
        finally:
            self.ranks.wait()  # whoever ends after it takes the others along, also the one that is still writing

    def _resume(self) -> Metrics:
        path = self.keeper.newest() if self.keeper is not None else None
        if not self.ranks.share(path is not None):
            return Metrics(self.directory)
        meta = load_state(path, self.named | self.biases, self.optimizer, self.ranks)
        self.masters.publish()
        passes = meta.get("passes", self.settings.accumulate)
        self.accumulate, left = divmod(passes, self.ranks.data_size)
        if left or not self.accumulate:
            raise UsageProblem(f"an update of this run takes {passes} passes of {self.settings.rows} rows, which "
                               f"{self.ranks.data_size} data-parallel ranks cannot share evenly; use a divisor")  # fmt: skip
        self.step = meta["step"]
        self.tokens = self._resumed_tokens = meta["tokens"]
        self._resumed_seconds = meta["seconds"]
        self.cursor = Cursor.from_json(meta["cursor"])
        changed = f", with --accumulate {self.accumulate}" if self.accumulate != self.settings.accumulate else ""
        self.say(f"continuing after step {self.step}{changed}")
        metrics = Metrics(self.directory, meta["metrics"])
        metrics.records = self.ranks.share(metrics.records)
        return metrics
