"""The training loop: rows in, a better model out, at any moment ready to be killed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..errors import BadInput, GateRefused, Interrupted, ReaderGone
from ..mixture.losses import Weights, assignments, layer_losses
from ..mixture.router import Router
from ..mixture.routing import Routing
from ..mixture.statistics import Statistics
from ..options import format_bytes
from ..pipeline.manifest import peak_rss_bytes
from .losses import token_loss_sum
from .metrics import Metrics, load_metrics
from .packing import Cursor, Packer, Row
from .params import Choice, Masters, Optimizer, make_optimizer
from .routing import Site, watch
from .schedule import Schedule, rate
from .state import load_state, save_state


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, apart from model and data."""

    rows: int
    """B, rows in one forward pass."""
    accumulate: int = 1
    """Forward passes before each update; the gradient is that of the mean over all their tokens."""
    budget: Literal["steps", "tokens", "minutes"] = "steps"
    amount: float = 100
    optimizer: Optimizer = "adamw"
    learning_rate: float = 1e-4
    router_scale: float = 1.0
    weight_decay: float = 0.1
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    clip: float = 1.0
    """Largest gradient norm; 0 is no clipping."""
    balance: float = 0.01
    z: float = 0.0
    bias_rate: float = 0.001
    """How far a selection bias moves in each step, for routers that have one (arXiv:2408.15664)."""
    evaluate_every: int = 0
    save_every: int = 0


class Keeper(Protocol):
    """Where the loop keeps its state between two lives."""

    def newest(self) -> Path | None: ...

    def place(self, step: int) -> Path: ...

    def record(self, path: Path, step: int) -> None: ...


@dataclass
class Batch:
    """Rows as tensors [B, T]."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    real: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> Batch:
        def stack(name: str) -> Tensor:
            return torch.stack([torch.from_numpy(getattr(row, name)) for row in rows]).to(device)

        return cls(stack("tokens"), stack("labels"), stack("positions"), stack("real"))

    @property
    def predicted(self) -> int:
        return int((self.labels >= 0).sum())


@dataclass
class Totals:
    """Sums over the forward passes of a step, or of an evaluation."""

    tokens: int = 0
    loss: float = 0.0
    balance: float = 0.0
    z: float = 0.0


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


def forward(model: nn.Module, sites: list[Site], batch: Batch) -> tuple[Tensor, dict[str, Routing]]:
    """Logits [B, T, V], and what the routers said by site. Positions that restart keep documents apart."""
    with watch(sites, batch.real) as seen:
        logits = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits
    return logits, seen


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
        logits, _ = forward(model, sites, Batch(tokens, tokens, positions, tokens >= 0))
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
             tick: Callable[[int], None] = lambda _: None) -> dict[str, Any]:  # fmt: skip
    """Held-out loss in nats a token, and each expert's share of the assignments, over one pass of `packer`."""
    training = model.training
    model.eval()
    totals, statistics = Totals(), Statistics()
    for chunk in _chunks(packer.rows(repeat=False), rows):
        batch = Batch.of(chunk, device)
        logits, seen = forward(model, sites, batch)
        totals.tokens += batch.predicted
        totals.loss += float(token_loss_sum(logits, batch.labels))
        statistics.add(seen)
        tick(batch.predicted)
    model.train(training)
    loss = totals.loss / totals.tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": totals.tokens, **load_metrics(statistics)}  # fmt: skip


def _chunks(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
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
        keeper: where states are kept; None keeps none.
        precise: see :class:`moeforge.train.params.Masters`.
        check: raises when the work should stop; called between forward passes.
    """

    def __init__(self, model: nn.Module, sites: list[Site], choice: Choice, settings: Settings, train: Packer,
                 held_out: Packer | None, directory: Path, *,
                 precise: Callable[[str], Tensor] | None = None, keeper: Keeper | None = None, check: Callable[[], None] = lambda: None,
                 say: Callable[[str], None] = lambda _: None, accelerator: Any = None):  # fmt: skip
        from accelerate import Accelerator

        self.accelerator = accelerator or Accelerator()
        self.model, self.sites, self.choice, self.settings = model, sites, choice, settings
        self.train, self.held_out, self.directory = train, held_out, directory
        self.keeper, self.check, self.say = keeper, check, say
        self.device = next(model.parameters()).device
        self.masters = Masters(choice.params, precise)
        self.named = self.masters.named
        self.scored = any(site.scored for site in sites)
        learning = [site for site in sites if any(param.requires_grad for param in site.router.parameters())]
        self.biased = {site.name: site.router for site in learning
                       if isinstance(site.router, Router) and site.router.selection_bias is not None}  # fmt: skip
        ours = {id(router.selection_bias) for router in self.biased.values()}
        self.biases = {name: buffer for name, buffer in model.named_buffers() if id(buffer) in ours}
        """Selection biases by name: moved by the load and not by gradients, so they are kept beside the parameters."""
        self.optimizer = make_optimizer(choice, self.masters, kind=settings.optimizer, rate=settings.learning_rate,
                                        router_scale=settings.router_scale, weight_decay=settings.weight_decay)  # fmt: skip
        self.step = self.tokens = self._resumed_tokens = 0
        self._resumed_seconds = 0.0
        self.cursor = Cursor()

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
                    self._evaluate_if_due(metrics)
                    before = self.spent
                    if before >= amount:
                        break
                    record = self._update()
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
        return {"steps": self.step, "tokens": self.tokens, "minutes": self._elapsed() / 60}[self.settings.budget]

    def _elapsed(self) -> float:
        return time.monotonic() - self._clock

    @property
    def speed(self) -> float:
        """Tokens a second in this life of the run."""
        return (self.tokens - self._resumed_tokens) / max(self._elapsed() - self._resumed_seconds, 1e-9)

    def _note(self, loss: float) -> str:
        """What stands behind the progress bar."""
        return f"loss {loss:.4f}, {self.speed:.0f} tokens/s, peak {format_bytes(peak_memory(self.device))}"

    def _update(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics."""
        settings, world = self.settings, self.accelerator.num_processes
        factor = rate(min(self.spent / settings.amount, 1.0), settings.schedule, settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        stream = self.train.rows(self.cursor)
        chunks: list[list[Row]] = []
        for _ in range(settings.accumulate):
            shares = [[next(stream) for _ in range(settings.rows)] for _ in range(world)]
            chunks.append(shares[self.accelerator.process_index])
            cursor = shares[-1][-1].cursor
        batches = [Batch.of(chunk, self.device) for chunk in chunks]
        sizes = [sum(batch.predicted for batch in batches), sum(int(batch.real.sum()) for batch in batches)]
        predicted, real = self._sum(torch.tensor(sizes, dtype=torch.float64)).tolist()
        totals, weights = Totals(int(predicted)), Weights(balance=settings.balance, z=settings.z)
        counts: dict[str, Tensor] = {}
        self.model.train()
        for batch in batches:
            self.check()
            logits, seen = forward(self.model, self.sites, batch)
            summed = token_loss_sum(logits, batch.labels)
            # every mean is over all tokens of the step, on all ranks, so uneven padding weighs nothing extra
            loss = summed / predicted
            totals.loss += float(summed.detach())
            with torch.no_grad():
                counts = {name: counts.get(name, 0) + self._sum(count) for name, count in assignments(seen).items()}
            if self.scored:
                # what is a mean over real tokens weighs by them, as its share of the whole step's
                terms, share = layer_losses(seen, counts), int(batch.real.sum()) / real
                loss = loss + share * terms.layers * weights.total(terms)
                totals.balance += share * float(terms.balance.detach())
                totals.z += share * float(terms.z.detach())
            if not math.isfinite(float(loss.detach())):
                self._drop_gradients()
                raise GateRefused(
                    f"the loss became {float(loss.detach())} at step {self.step + 1}; nothing was written. "
                    f"Lower --learning-rate ({settings.learning_rate:g}), lengthen --warmup, or use --precision fp32"
                )
            loss.backward()
        norm = self._finish_gradients()
        if not math.isfinite(norm):
            self._drop_gradients()
            raise GateRefused(f"the gradient norm became {norm} at step {self.step + 1}; nothing was written. "
                              f"Lower --learning-rate ({settings.learning_rate:g}) or use --precision fp32")  # fmt: skip
        self.optimizer.step()
        self._drop_gradients()
        self.masters.publish()
        for name, router in self.biased.items():
            router.balance_bias(counts[name], settings.bias_rate)
        self.step, self.tokens, self.cursor = self.step + 1, self.tokens + totals.tokens, cursor
        sums = self._sum(torch.tensor([totals.loss, totals.balance, totals.z], dtype=torch.float64)).tolist()
        record = {
            "tokens": totals.tokens,
            "loss": sums[0] / predicted,
            "lr": settings.learning_rate * factor,
            "norm": norm,
        }
        if self.scored:
            record |= {"balance": sums[1], "z": sums[2]}
        return record

    def _sum(self, value: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.accelerator.num_processes == 1:
            return value
        total = self.accelerator.reduce(value.to(self.device), "sum")
        assert isinstance(total, Tensor)
        return total

    def _finish_gradients(self) -> float:
        """Sum gradients over ranks, clip them; returns the norm before clipping."""
        gradients = []
        for master in self.named.values():
            if master.grad is None:
                # an expert without a token, or a parameter out of reach: it still decays and its moments fade
                master.grad = torch.zeros_like(master)
            if self.accelerator.num_processes > 1:
                master.grad.copy_(self._sum(master.grad))
            gradients.append(master.grad)
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True if self.device.type != "cpu" else None)
        if self.settings.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.named.values(), self.settings.clip, norm)
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
        found = evaluate(self.model, self.sites, self.held_out, self.settings.rows, self.device, lambda _: self.check())
        # the budget is for training
        self._clock += time.monotonic() - started
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
        if self.keeper is None:
            return
        path = self.keeper.place(self.step)
        meta = {"step": self.step, "tokens": self.tokens, "seconds": self._elapsed(), "metrics": metrics.sync(),
                "cursor": self.cursor.as_json()}  # fmt: skip
        save_state(path, self.named | self.biases, None if finished else self.optimizer, meta)
        self.keeper.record(path, self.step)

    def _resume(self) -> Metrics:
        path = self.keeper.newest() if self.keeper is not None else None
        if path is None:
            return Metrics(self.directory)
        meta = load_state(path, self.named | self.biases, self.optimizer)
        self.masters.publish()
        self.step = meta["step"]
        self.tokens = self._resumed_tokens = meta["tokens"]
        self._resumed_seconds = meta["seconds"]
        self.cursor = Cursor.from_json(meta["cursor"])
        self.say(f"continuing after step {self.step}")
        return Metrics(self.directory, meta["metrics"])
