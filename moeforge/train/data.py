"""Text to train on: which documents there are, how often each source is drawn from, and which are held out. No torch.

A document is a reference (a file, a byte range, a table row) until it is read, so that a corpus need not fit in memory.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import BadInput, UsageProblem

TEXT = frozenset({".txt", ".md", ".rst", ".py"})
KINDS = TEXT | {".jsonl", ".parquet"}
PIECE = 2_000
"""Aim, in characters, when a lone document has to be cut so that some of it can be held out."""

Content = str | list[dict[str, Any]]
"""Plain text, or chat messages (`[{"role": ..., "content": ...}, ...]`) for the tokenizer's chat template."""


Label = int | str
"""What a document is about: the number or name of an expert."""


@dataclass(frozen=True)
class Document:
    """One document: attention never crosses its borders."""

    key: str
    """Where it comes from, for messages: `notes.jsonl:12`."""
    size: int
    """Bytes, or an estimate; only for plans."""
    read: Callable[[], Content]
    changed: int = 0
    """Time of the file's last change in nanoseconds, where there is a file that may change."""
    label: Label = 0
    """The number of its source among those of `--data`, or what its record says (:mod:`moeforge.train.labels`)."""

    @property
    def identity(self) -> list[str | int]:
        """What tells this document from an edited one, cheaply."""
        return [self.key, self.size, self.changed]


@dataclass(frozen=True)
class Pool:
    """Documents that are drawn from as one, and their part in the mixture beside other pools."""

    documents: tuple[Document, ...]
    weight: float = 1.0
    """Share of the predicted tokens, relative to the other pools' weights."""


def find_documents(specs: Iterable[str], *, first: int = 0, field: str | None = None) -> list[Document]:
    """Every document of the given sources, in a fixed order (files by name, then position within the file).

    A source is a file (.txt, .md, .rst, .py: one document; .jsonl: one a line, with `text` or `messages`; .parquet: one a
    row, with the same columns), a directory of such files, a text of :mod:`moeforge.texts`, or a dataset of the Hub
    (:mod:`moeforge.train.hub_data`).

    Args:
        first: label of the first source; each further one has the next number.
        field: what a .jsonl or .parquet record calls its label, instead of the source's number.

    Raises:
        UsageProblem: a source that does not exist or whose kind is unknown.
        BadInput: a file that is there but cannot be read, or sources without any document.
    """
    from .sources import documents_of

    specs = list(specs)
    found = [document if field else replace(document, label=number) for number, spec in enumerate(specs, first)
             for document in documents_of(spec, field)]  # fmt: skip
    if not found:
        raise BadInput(f"--data {' '.join(specs)}: no documents in it; give text files of {', '.join(sorted(KINDS))}")
    return found


def find_pools(specs: Sequence[str], field: str | None = None) -> list[Pool]:
    """The documents of `specs`, each a source or `SOURCE=WEIGHT`: one pool without weights, else one a source. `field` holds their
    labels (:func:`find_documents`).

    Raises:
        UsageProblem: a weight that is no positive number, or weights on some sources only; and what
            :func:`find_documents` raises.
    """
    parts = [split_weight(spec) for spec in specs]
    bare = [source for source, weight in parts if weight is None]
    if len(bare) == len(parts):
        return [Pool(tuple(find_documents(bare, field=field)))]
    if bare:
        raise UsageProblem(f"--data {bare[0]} has no weight while others have one; write {bare[0]}=WEIGHT too")
    return [Pool(tuple(find_documents([source], first=number, field=field)), weight)
            for number, (source, weight) in enumerate(parts) if weight is not None]  # fmt: skip


def split_weight(spec: str) -> tuple[str, float | None]:
    """`notes.txt=0.7` as (`notes.txt`, 0.7). A file that is really called so, or no number behind the sign, is no weight.

    Raises:
        UsageProblem: the number is not above 0.
    """
    source, sign, number = spec.rpartition("=")
    if not sign or Path(spec).expanduser().exists():
        return spec, None
    try:
        weight = float(number)
    except ValueError:
        return spec, None
    if not 0 < weight < math.inf:
        raise UsageProblem(f"--data {spec}: the weight {number} must be a number above 0; leave a source out instead")
    return source, weight


def hold_out_pools(pools: Sequence[Pool], fraction: float, seed: int) -> tuple[list[Pool], list[Document]]:
    """:func:`hold_out` in each pool, so that no source is missing from either side."""
    split = [hold_out(pool.documents, fraction, seed) for pool in pools]
    return ([Pool(tuple(train), pool.weight) for pool, (train, _) in zip(pools, split, strict=True)],
            [document for _, held in split for document in held])  # fmt: skip


def hold_out(documents: Sequence[Document], fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Split into (train, held out) by whole documents, chosen by `seed`; at least one on each side.

    A lone text is first cut at paragraph breaks. `fraction` 0 holds nothing out.

    Raises:
        UsageProblem: a single chat or a text too short to be cut.
    """
    if fraction == 0:
        return list(documents), []
    documents = list(documents)
    if len(documents) == 1:
        documents = _cut(documents[0])
    order = list(range(len(documents)))
    random.Random(f"{seed}/held-out").shuffle(order)
    count = min(max(round(fraction * len(documents)), 1), len(documents) - 1)
    chosen = set(order[:count])
    return (
        [d for i, d in enumerate(documents) if i not in chosen],
        [d for i, d in enumerate(documents) if i in chosen],
    )


def _cut(document: Document) -> list[Document]:
    """A lone text as pieces of about `PIECE` characters, cut at paragraph breaks where there are any."""
    content = document.read()
    pieces: list[str] = []
    if isinstance(content, str):
        breaker = "\n\n" if "\n\n" in content.strip() else "\n"
        for paragraph in content.split(breaker):
            if pieces and len(pieces[-1]) < PIECE:
                pieces[-1] += breaker + paragraph
            else:
                pieces.append(paragraph)
        pieces = [piece for piece in pieces if piece.strip()]
    if len(pieces) < 2:
        raise UsageProblem(f"--data {document.key}: one document only, too short to hold some of it out; give more text, or "
                           "pass --held-out 0 to train without a held-out loss")  # fmt: skip
    return [Document(f"{document.key}#{i}", len(piece), partial(str, piece), label=document.label)
            for i, piece in enumerate(pieces)]  # fmt: skip
