"""What a mixture of several checkpoints gained and lost: its loss on every domain's text beside each parent's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.base import Checkpoint

from .job import Job
from .measure import drift_text

if TYPE_CHECKING:
    from moeforge.pipeline.context import Context

POSITIONS = 64
"""Tokens whose float64 distributions are held at once."""


def by_domain(job: Job, written: Path, ctx: Context) -> dict[str, dict[str, Any]]:
    """Domain -> {"mixture": loss, "parents": [loss of each, SRC first]} in nats a token, in float32 from the files.

    None stands for a parent whose vocabulary lacks a token of the text. Without a tokenizer there is nothing to measure.
    """
    text = drift_text(job)
    if not text:
        return {}
    # a --base comes last and is no expert: it is not among those whose loss the mixture should reach
    experts = job.parents[:-1] if getattr(job.method.options, "base", None) is not None else job.parents
    parents = [mean_losses(parent.checkpoint, list(text.values()), ctx) for parent in experts]
    with open_checkpoint(str(written)) as mixture:
        mixed = mean_losses(mixture, list(text.values()), ctx)
    return {
        name: {"mixture": mixed[index], "parents": [found[index] for found in parents]}
        for index, name in enumerate(text)
    }


def lines(found: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """A line for each domain, for people."""

    def told(loss: float | None) -> str:
        return "-" if loss is None else f"{loss:.3f}"

    return tuple(
        f"loss on {name}: mixture {told(losses['mixture'])}; "
        + ", ".join(f"{'SRC' if i == 0 else f'parent {i}'} {told(loss)}" for i, loss in enumerate(losses["parents"]))
        for name, losses in found.items()
    )


def mean_losses(checkpoint: Checkpoint, domains: Sequence[Sequence[Sequence[int]]], ctx: Context) -> list[float | None]:
    """Mean next-token loss on each domain's sequences of token ids; None where ids are outside the vocabulary.

    One pass over the weights, a layer in memory at a time.
    """
    import torch

    from moeforge.model.streaming import StreamedModel

    model = StreamedModel(checkpoint)
    vocabulary = model.module.config.get_text_config().vocab_size
    known = [max(max(ids) for ids in texts) < vocabulary for texts in domains]
    sequences = [
        (label, torch.tensor([list(ids)])) for label, texts in enumerate(domains) if known[label] for ids in texts
    ]
    states = model.run([ids for _, ids in sequences], lambda *_: ctx.check())
    sums, counts = [0.0] * len(domains), [0] * len(domains)
    with model.holding():
        for (label, ids), state in zip(sequences, states, strict=True):
            for start in range(0, ids.shape[1] - 1, POSITIONS):
                rows = slice(start, min(start + POSITIONS, ids.shape[1] - 1))
                targets = ids[0, rows.start + 1 : rows.stop + 1]
                logits = model.logits(state, rows)[0].double()
                sums[label] += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
                counts[label] += len(targets)
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]
