"""How well a model predicts text, and how far it is from another one: loss, accuracy, divergence.

Every document is cut, from its beginning, into windows of at most `length` predicted tokens; nothing is seen across the
border of a window, and every token but a document's first is predicted exactly once. So the numbers depend on text,
tokenizer and `length` alone, not on how windows are batched or on what a model's attention can be told about borders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.base import Checkpoint
from ..errors import BadInput, GateRefused, MachineLacks
from ..mixture.statistics import Statistics
from ..model.comparison import Comparison, Prediction
from ..model.tokenizer import has_tokenizer, load_tokenizer
from ..pipeline.context import Context
from .data import Document, Pool
from .encoding import Encoder
from .metrics import load_metrics, perplexity
from .packing import IGNORE, Packer
from .routing import find_sites, watch
from .runners import Memory, Runner, Whole, make_runners

TOKENS_AT_ONCE = 128
"""Tokens whose distributions are held in float64 at once."""
PROBES = 32
"""Documents that tell one tokenizer from another."""


@dataclass
class Score:
    """What is known of the predicted tokens: of this model's `own` predictions, of another one's and the distance from it."""

    comparison: Comparison = field(default_factory=Comparison)

    @property
    def own(self) -> Prediction:
        # the other model is the reference
        return self.comparison.second

    def add(self, logits: Tensor, labels: Tensor, other: Tensor | None) -> None:
        """logits, other: [B, t, V] (V may differ by unused ids); labels: [B, t], `IGNORE` where nothing is predicted."""
        known = labels != IGNORE
        if not known.any():
            return
        if other is None:
            self.own.add(logits[known], labels[known])
        else:
            self.comparison.add(other[known], logits[known], labels[known])

    def not_finite(self) -> list[int]:
        """Which of the two models (0: this one, 1: the other) the numbers so far are not finite for."""
        sums = (self.own.loss, self.comparison.first.loss)
        found = [index for index, value in enumerate(sums) if not math.isfinite(value)]
        return found if found or self.comparison.finite else [0, 1]

    def as_json(self, *, against: bool) -> dict[str, float | int | None]:
        """Means over the tokens; see :func:`perplexity` for where there is none."""
        count, own = self.own.tokens, self.own
        found: dict[str, float | int | None] = {"tokens": count, "loss": own.loss / count,
                                         "perplexity": perplexity(own.loss / count), "accuracy": own.right / count}  # fmt: skip
        if against:
            apart = self.comparison
            loss = apart.first.loss / count
            found |= {"against_loss": loss, "against_perplexity": perplexity(loss),
                      "kl": apart.kl / count, "agreement": apart.agreed / count}  # fmt: skip
        return found


@dataclass(frozen=True)
class Batch:
    """Windows side by side, padded on the right: causal attention never looks there."""

    ids: Tensor
    """[B, T] int64."""
    labels: Tensor
    """[B, T] int64, the next token or `IGNORE`."""
    about: Tensor
    """[B] int64, the label of each row's document."""

    @property
    def predicted(self) -> int:
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True)
class Window:
    """At most `length` + 1 token ids of one document, of which the first is not predicted, and the document's label."""

    ids: np.ndarray
    label: int


def cut(documents: Sequence[Document], encode: Callable[[Document], Sequence[int]], length: int, tokens: int | None,
        seed: int) -> list[Window]:  # fmt: skip
    """Windows of the documents.

    Args:
        tokens: stop after this many predicted tokens; the documents come in an order that `seed` fixes.

    Raises:
        BadInput: no text.
    """
    found, left = [], math.inf if tokens is None else tokens
    for row in Packer([Pool(tuple(documents))], encode, length, seed, shared=False).rows(repeat=False):
        count = int(min(row.real.sum(), left))
        ids = np.append(row.tokens[:count], row.labels[count - 1]).astype(np.int32)
        found.append(Window(ids, int(row.about[0])))
        left -= count
        if left == 0:
            break
    return found


def batch(windows: Sequence[Window], rows: int) -> list[Batch]:
    """Batches of windows of like length, the longest first, so that little is padding and memory shows its peak at once."""
    made = []
    order = sorted(windows, key=lambda window: len(window.ids), reverse=True)
    for start in range(0, len(order), rows):
        chunk = order[start : start + rows]
        ids = torch.zeros(len(chunk), len(chunk[0].ids) - 1, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORE)
        for row, window in enumerate(chunk):
            ids[row, : len(window.ids) - 1] = torch.from_numpy(window.ids[:-1])
            labels[row, : len(window.ids) - 1] = torch.from_numpy(window.ids[1:])
        made.append(Batch(ids, labels, torch.tensor([window.label for window in chunk])))
    return made


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        length: predicted tokens of a window at most; `tokens`: in all, None for the whole text.
        rows: windows in one forward pass.
        memory: hold models whole, or one decoder layer at a time; `auto` holds them whole where they fit.
        dtype: of the computation; None is float32 on a CPU, elsewhere the checkpoint's.
        routing: also watch the routers of the first model.
    """

    length: int = 1024
    tokens: int | None = None
    rows: int = 1
    seed: int = 0
    memory: Memory = "auto"
    dtype: str | None = None
    device: str = "cpu"
    routing: bool = False


class Watching:
    """What the routers of a model do, over all batches and by the labels of their documents.

    Raises:
        BadInput: it has none.
        MachineLacks: it is not whole in memory.
    """

    def __init__(self, runner: Runner, labels: int) -> None:
        if not isinstance(runner, Whole):
            raise MachineLacks(f"{runner.ref}: its routers are watched while it is whole in memory, and it is run one layer at a time; "
                               "leave --routing or --memory layers out")  # fmt: skip
        self.sites = find_sites(runner.model)
        if not self.sites:
            raise BadInput(f"{runner.ref} has no mixtures, so there is no routing to watch; leave --routing out")
        self.device, self.statistics = runner.device, Statistics(labels if labels > 1 else 0)

    @contextmanager
    def over(self, one: Batch) -> Iterator[None]:
        """While the model runs a batch."""
        with watch(self.sites, (one.labels != IGNORE).to(self.device)) as seen:
            yield
        self.statistics.add(seen, one.about.repeat_interleave(one.ids.shape[1]).to(self.device))


@dataclass(frozen=True)
class Measured:
    """The outcome of :func:`measure`: `values` of :meth:`Score.as_json`, tokens a second of the first model alone."""

    values: dict[str, Any]
    tokens_per_second: float
    how: str
    """`whole` or `layers`."""
    dtype: str
    windows: int = field(default=0)
    routing: dict[str, Any] | None = None
    """Of :func:`moeforge.train.metrics.load_metrics`, where it was asked for."""


def measure(documents: Sequence[Document], checkpoint: Checkpoint, against: Checkpoint | None, setting: Setting,
            ctx: Context) -> Measured:  # fmt: skip
    """Let a model (and another one) predict the documents.

    Raises:
        BadInput: a model cannot be run, there is no tokenizer or no text, or the two cut text into other tokens.
        GateRefused: a model gives infinities or NaN, of which no number would mean anything.
        MachineLacks: routers are to be watched of a model that does not fit into memory.
    """
    encode = _encoder(checkpoint, against, documents)
    batches = batch(cut(documents, encode, setting.length, setting.tokens, setting.seed), setting.rows)
    checkpoints = [checkpoint] if against is None else [checkpoint, against]
    runners = make_runners(checkpoints, setting.memory, setting.dtype, setting.device, ctx,
                           setting.rows * setting.length)  # fmt: skip
    total = sum(one.predicted for one in batches)
    largest = max(int(one.ids.max()) for one in batches)
    for runner in runners:
        if largest >= runner.vocabulary:
            raise BadInput(f"{runner.ref}: the tokenizer gives id {largest}, the model has {runner.vocabulary}; "
                           "is this its tokenizer?")  # fmt: skip
    watching = Watching(runners[0], 1 + max(int(one.about.max()) for one in batches)) if setting.routing else None
    score = Score()
    with ctx.bar("measuring", sum(one.ids.numel() for one in batches) * len(runners), "tokens") as bar:
        for group in _groups(batches, runners):
            ids = [one.ids for one in group]
            with ExitStack() as stack:
                # whoever watches holds the model whole, and such a model is given one batch at a time
                with watching.over(group[0]) if watching is not None else nullcontext():
                    outs = [stack.enter_context(runners[0].run(ids, bar.advance))]
                outs += [stack.enter_context(runner.run(ids, bar.advance)) for runner in runners[1:]]
                for at, one in enumerate(group):
                    _add(score, one, [out[at] for out in outs])
                    _check_finite(score, runners)
                    bar.advance(0, f"loss {score.own.loss / score.own.tokens:.4f}")
    values = score.as_json(against=against is not None)
    first = runners[0]
    return Measured(
        values, total / max(first.seconds, 1e-9), first.how, first.dtype, sum(len(one.ids) for one in batches),
        None if watching is None else load_metrics(watching.statistics),
    )  # fmt: skip


def _add(score: Score, one: Batch, logits: Sequence[Callable[[slice], Tensor]]) -> None:
    step = max(1, TOKENS_AT_ONCE // len(one.ids))
    for start in range(0, one.ids.shape[1], step):
        rows = slice(start, start + step)
        found = [get(rows) for get in logits]
        score.add(found[0], one.labels[:, rows].to(found[0].device), found[1] if len(found) > 1 else None)


def _check_finite(score: Score, runners: Sequence[Runner]) -> None:
    if wrong := score.not_finite():
        told = " and ".join(f"{runners[index].ref} (computed in {runners[index].dtype})" for index in wrong)
        raise GateRefused(f"{told}: infinities or NaN within {score.own.tokens} predicted tokens, so there is nothing to measure; "
                          "its weights are damaged, or the type is too narrow for it")  # fmt: skip


def _groups(batches: Sequence[Batch], runners: Sequence[Runner]) -> Iterator[list[Batch]]:
    """As many batches as every runner takes in one go."""
    room = min(runner.tokens_at_once for runner in runners)
    group: list[Batch] = []
    for one in batches:
        if group and sum(b.ids.numel() for b in group) + one.ids.numel() > room:
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def _encoder(checkpoint: Checkpoint, against: Checkpoint | None, documents: Sequence[Document]) -> Encoder:
    """The tokenizer of the first checkpoint that has one.

    Raises:
        BadInput: none has, or the two do not agree.
    """
    found = [Encoder(load_tokenizer(c)) for c in (checkpoint, against) if c is not None and has_tokenizer(c)]
    if not found:
        raise BadInput(
            f"{checkpoint.ref} has no tokenizer files, so text means nothing to it; copy them beside its weights"
        )
    if len(found) == 2 and against is not None:
        for document in documents[:PROBES]:
            ids = [encode(document) for encode in found]
            if ids[0] != ids[1]:
                raise BadInput(f"{checkpoint.ref} and {against.ref} cut {document.key} into {len(ids[0])} and {len(ids[1])} "
                               "tokens, not the same ones; only models with one tokenizer can be compared")  # fmt: skip
    return found[0]
