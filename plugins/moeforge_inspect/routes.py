"""Where a text's tokens go: one forward pass, and what every router said of every token."""

from __future__ import annotations

from typing import Any

import torch

from moeforge.checkpoint.anatomy import plain_config
from moeforge.checkpoint.base import Checkpoint
from moeforge.errors import BadInput
from moeforge.mixture.routing import Routing
from moeforge.model.kernels import use_kernels_where_faster
from moeforge.model.tokenizer import load_tokenizer
from moeforge.pipeline.context import Context
from moeforge.train.routing import find_sites, watch
from moeforge.train.runners import Whole

PAIRS = 120_000
"""Most choices (tokens, layers, experts) that are kept: a page of them stays below a megabyte."""


def route(checkpoint: Checkpoint, text: str, most: int, dtype: str | None, device: str, ctx: Context) -> dict[str, Any]:
    """Run the model on the beginning of a text.

    Args:
        most: tokens at most; fewer where the model's positions or :data:`PAIRS` end before.

    Returns:
        `tokens` [T] pieces of the text, `ids` [T], `of` (tokens of the whole text), `sites` [L] names, `counts` [L] experts there,
        `routes` [L][T] of [expert, weight, expert, weight, ...], the heaviest first; `load` [L][E] shares of the assignments.

    Raises:
        BadInput: no tokenizer, no tokens, or no routers.
    """
    tokenizer: Any = load_tokenizer(checkpoint)
    ids, pieces = _cut(tokenizer, text)
    if not ids:
        raise BadInput("the text is empty: no token comes out of it; write something to route")
    runner = Whole(checkpoint, dtype, device)
    sites = find_sites(runner.model)
    if not sites:
        raise BadInput(
            f"{checkpoint.ref} has no mixtures, so there is no routing to show; `moeforge upcycle` makes some of a dense model"
        )
    limit = plain_config(checkpoint.config).get("max_position_embeddings")
    length = min(
        len(ids), most, limit if isinstance(limit, int) else most, max(1, PAIRS // sum(site.top_k for site in sites))
    )
    if (largest := max(ids[:length])) >= runner.vocabulary:
        raise BadInput(
            f"{checkpoint.ref}: the tokenizer gives id {largest}, the model has {runner.vocabulary}; is this its tokenizer?"
        )
    use_kernels_where_faster(runner.model)
    ctx.say(f"routing {length} tokens")
    with torch.no_grad(), watch(sites) as seen:
        runner.model(input_ids=torch.tensor([ids[:length]], device=runner.device), use_cache=False)
    routes = {name: _choices(routing, length) for name, routing in seen.items()}
    return {
        "tokens": pieces[:length], "ids": ids[:length], "of": len(ids), "sites": list(routes),
        "counts": [routing.pairs.experts for routing in seen.values()], "routes": list(routes.values()),
        "load": [_load(rows, routing.pairs.experts) for rows, routing in zip(routes.values(), seen.values(), strict=True)],
    }  # fmt: skip


def _cut(tokenizer: Any, text: str) -> tuple[list[int], list[str]]:
    """(ids, pieces of the text), the pieces as they stand in the text where the tokenizer knows."""
    if not tokenizer.is_fast:
        ids = list(tokenizer(text)["input_ids"])
        return ids, [str(tokenizer.decode([one])) for one in ids]
    found = tokenizer(text, return_offsets_mapping=True)
    ids = list(found["input_ids"])
    spans = [tuple(span) for span in found["offset_mapping"]]
    pieces = [text[slice(*span)] or str(tokenizer.decode([one])) for one, span in zip(ids, spans, strict=True)]
    # a character of several tokens is shown at the first of them
    return ids, [
        "" if at and spans[at] == spans[at - 1] and len(set(spans[at])) > 1 else piece
        for at, piece in enumerate(pieces)
    ]


def _choices(routing: Routing, tokens: int) -> list[list[float]]:
    """[T] of [expert, weight, ...]."""
    pairs = routing.pairs
    real = int(pairs.offsets[-1])
    found: list[list[tuple[float, int]]] = [[] for _ in range(tokens)]
    rows = (value[:real].tolist() for value in (pairs.token, pairs.expert, pairs.weight.float()))
    for token, expert, weight in zip(*rows, strict=True):
        found[token].append((weight, expert))
    return [
        [value for weight, expert in sorted(chosen, reverse=True) for value in (expert, round(weight, 4))]
        for chosen in found
    ]


def _load(rows: list[list[float]], experts: int) -> list[float]:
    counts = [0] * experts
    for row in rows:
        for expert in row[::2]:
            counts[int(expert)] += 1
    return [count / max(sum(counts), 1) for count in counts]
