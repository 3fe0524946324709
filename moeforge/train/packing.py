"""Documents to rows of `length` tokens, in an order that a seed fixes and a cursor can continue from. No torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import BadInput
from .data import Document

IGNORE = -100
"""Label of a token that is not predicted from (the last of a document, padding)."""


@dataclass(frozen=True)
class Cursor:
    """Where the next row begins: `offset` tokens into the `place`-th document of pass `epoch`."""

    epoch: int = 0
    place: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Row:
    """T token slots.

    Attributes:
        tokens: [T] int64.
        labels: [T] int64, the token that follows in the same document, or `IGNORE`. Already shifted.
        positions: [T] int64, restart at 0 with each piece of a document: the sign of a border to packed attention.
        real: [T] bool, False for padding.
        cursor: where the row after this one begins.
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    real: np.ndarray
    cursor: Cursor


class Packer:
    """Lays documents one behind the other into rows, shuffled anew in each pass.

    A document that does not fit is continued in the next row (as a piece of its own, without sight of its beginning);
    its tokens are each predicted exactly once a pass. With `shared=False` a row holds one piece only and is padded: for
    models whose attention cannot be told about borders.

    Args:
        documents: what to train on.
        encode: content to token ids, end-of-document token included.
        length: T, slots in a row.
        seed: None keeps the given order (held-out text).
    """

    def __init__(self, documents: Sequence[Document], encode: Callable[[Document], Sequence[int]], length: int,
                 seed: int | None, *, shared: bool = True, pad: int = 0):  # fmt: skip
        self.documents, self.encode, self.length, self.seed = documents, encode, length, seed
        self.shared, self.pad = shared, pad
        self._tokens: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def order(self, epoch: int) -> list[int]:
        """The order of documents in pass `epoch`."""
        order = list(range(len(self.documents)))
        if self.seed is not None:
            random.Random(f"{self.seed}/order/{epoch}").shuffle(order)
        return order

    def rows(self, cursor: Cursor = Cursor(), *, repeat: bool = True) -> Iterator[Row]:
        """Rows from `cursor` on: for ever (full rows that run on into the next pass), or to the end of one pass.

        Raises:
            BadInput: a whole pass without one token to predict.
        """
        pieces: list[np.ndarray] = []
        room = self.length
        while True:
            order = self.order(cursor.epoch)
            predicted = cursor.place + cursor.offset  # 0: a whole pass lies ahead
            while cursor.place < len(order):
                tokens = self._encoded(order[cursor.place])
                # the last token has nothing to predict, so a piece ends before it; it still is the label before
                left = len(tokens) - 1 - cursor.offset
                if left <= 0:
                    cursor = replace(cursor, place=cursor.place + 1, offset=0)
                    continue
                take = min(left, room)
                pieces.append(tokens[cursor.offset : cursor.offset + take + 1])
                cursor = replace(cursor, offset=cursor.offset + take)
                room -= take
                predicted += take
                if room == 0 or not self.shared:
                    yield self._row(pieces, cursor)
                    pieces, room = [], self.length
            if predicted == 0:
                raise BadInput("the documents hold no text to learn from: each is shorter than two tokens")
            if not repeat:
                if pieces:
                    yield self._row(pieces, cursor)
                return
            cursor = Cursor(cursor.epoch + 1)

    def _encoded(self, index: int) -> np.ndarray:
        """The tokens of a document; the latest is kept, since its pieces are asked for one after another."""
        if self._tokens[0] != index:
            self._tokens = (index, np.asarray(self.encode(self.documents[index]), np.int64))
        return self._tokens[1]

    def _row(self, pieces: list[np.ndarray], cursor: Cursor) -> Row:
        spare = self.length - sum(len(piece) - 1 for piece in pieces)
        tokens = [piece[:-1] for piece in pieces] + [np.full(spare, self.pad, np.int64)]
        labels = [piece[1:] for piece in pieces] + [np.full(spare, IGNORE, np.int64)]
        # padding restarts at 0 too: a piece of its own, which nothing real can see
        positions = [np.arange(len(part), dtype=np.int64) for part in tokens]
        real = np.arange(self.length) < self.length - spare
        return Row(np.concatenate(tokens), np.concatenate(labels), np.concatenate(positions), real, cursor)
