"""Documents to rows of `length` tokens, in an order that a seed fixes and a cursor can continue from. No torch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import BadInput
from .data import Document, Pool

IGNORE = -100
"""Label of a token that is not predicted from (the last of a document, padding)."""


@dataclass(frozen=True)
class Place:
    """How far one pool is read: `offset` tokens into the `index`-th document of pass `epoch`, `tokens` predicted so far."""

    epoch: int = 0
    index: int = 0
    offset: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Cursor:
    """Where the next row begins: a place in each pool; none is the beginning of all."""

    places: tuple[Place, ...] = ()

    @classmethod
    def from_json(cls, places: Sequence[Sequence[int]]) -> Cursor:
        return cls(tuple(Place(*place) for place in places))

    def as_json(self) -> list[list[int]]:
        return [[place.epoch, place.index, place.offset, place.tokens] for place in self.places]


@dataclass(frozen=True)
class Row:
    """T token slots.

    Attributes:
        tokens: [T] int64.
        labels: [T] int64, the token that follows in the same document, or `IGNORE`. Already shifted.
        positions: [T] int64, restart at 0 with each piece of a document: the sign of a border to packed attention.
        real: [T] bool, False for padding.
        about: [T] int64, the label of the document that a token is from; -1 for padding.
        cursor: where the row after this one begins.
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    real: np.ndarray
    about: np.ndarray
    cursor: Cursor


class Packer:
    """Lays documents one behind the other into rows, shuffled anew in each pass.

    A document that does not fit is continued in the next row (as a piece of its own, without sight of its beginning);
    its tokens are each predicted exactly once a pass. With `shared=False` a row holds one piece only and is padded: for
    models whose attention cannot be told about borders.

    Of several pools, the next document always comes from the one whose predicted tokens lag most behind its weight, so that
    no pool is ever ahead of its weight by more than one document; each pool has passes of its own, a small one
    is repeated while a large one is not yet through.

    Args:
        pools: what to train on.
        encode: content to token ids, end-of-document token included.
        length: T, slots in a row.
        seed: None keeps the given order (held-out text).
    """

    def __init__(self, pools: Sequence[Pool], encode: Callable[[Document], Sequence[int]], length: int,
                 seed: int | None, *, shared: bool = True, pad: int = 0):  # fmt: skip
        self.pools, self.encode, self.length, self.seed = pools, encode, length, seed
        self.shared, self.pad = shared, pad
        self._orders: dict[int, tuple[int, list[int]]] = {}
        self._tokens: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0, np.int64))

    def order(self, pool: int, epoch: int) -> list[int]:
        """The order of a pool's documents in pass `epoch`."""
        if self._orders.get(pool, (-1,))[0] != epoch:
            order = list(range(len(self.pools[pool].documents)))
            if self.seed is not None:
                random.Random(f"{self.seed}/order/{epoch}").shuffle(order)
            self._orders[pool] = (epoch, order)
        return self._orders[pool][1]

    def rows(self, cursor: Cursor = Cursor(), *, repeat: bool = True) -> Iterator[Row]:
        """Rows from `cursor` on: for ever (full rows that run on into the next pass), or to the end of one pass.

        Raises:
            BadInput: a whole pass of a pool without one token to predict.
        """
        places = list(cursor.places) or [Place()] * len(self.pools)
        last = [math.inf if repeat else place.epoch for place in places]
        pieces: list[tuple[np.ndarray, int]] = []
        room = self.length
        while (turn := self._turn(places, last)) is not None:
            place = places[turn]
            index = self.order(turn, place.epoch)[place.index]
            tokens, label = self._encoded(turn, index), self.pools[turn].documents[index].label
            # the last token has nothing to predict, so a piece ends before it; it still is the label before
            left = len(tokens) - 1 - place.offset
            take = min(max(left, 0), room)
            places[turn] = self._after(turn, place, take, done=take >= left)
            if take == 0:
                continue
            assert isinstance(label, int)  # words have been numbered (moeforge.train.labels)
            pieces.append((tokens[place.offset : place.offset + take + 1], label))
            room -= take
            if room == 0 or not self.shared:
                yield self._row(pieces, Cursor(tuple(places)))
                pieces, room = [], self.length
        if pieces:
            yield self._row(pieces, Cursor(tuple(places)))

    def _turn(self, places: Sequence[Place], last: Sequence[float]) -> int | None:
        """Whose document is next: one that is not yet through, else that of the pool which lags most; None when all are
        through their last pass."""
        waiting = [i for i, place in enumerate(places) if place.epoch <= last[i]]
        begun = [i for i in waiting if places[i].offset]
        return begun[0] if begun else min(waiting, key=lambda i: places[i].tokens / self.pools[i].weight, default=None)

    def _after(self, pool: int, place: Place, taken: int, *, done: bool) -> Place:
        """The place behind `taken` tokens; `done` with the document."""
        tokens = place.tokens + taken
        if not done:
            return replace(place, offset=place.offset + taken, tokens=tokens)
        if place.index + 1 < len(self.pools[pool].documents):
            return Place(place.epoch, place.index + 1, 0, tokens)
        if tokens == 0:
            first = self.pools[pool].documents[0].key
            raise BadInput(f"the documents ({first}, ...) hold no text to learn from: each is shorter than two tokens")
        return Place(place.epoch + 1, 0, 0, tokens)

    def _encoded(self, pool: int, index: int) -> np.ndarray:
        """The tokens of a document; the latest is kept, since its pieces are asked for one after another."""
        if self._tokens[0] != (pool, index):
            encoded = np.asarray(self.encode(self.pools[pool].documents[index]), np.int64)
            self._tokens = ((pool, index), encoded)
        return self._tokens[1]

    def _row(self, pieces: list[tuple[np.ndarray, int]], cursor: Cursor) -> Row:
        spare = self.length - sum(len(piece) - 1 for piece, _ in pieces)
        tokens = [piece[:-1] for piece, _ in pieces] + [np.full(spare, self.pad, np.int64)]
        labels = [piece[1:] for piece, _ in pieces] + [np.full(spare, IGNORE, np.int64)]
        about = [np.full(len(piece) - 1, label, np.int64) for piece, label in pieces] + [np.full(spare, -1, np.int64)]
        # padding restarts at 0 too: a piece of its own, which nothing real can see
        positions = [np.arange(len(part), dtype=np.int64) for part in tokens]
        real = np.arange(self.length) < self.length - spare
        join = np.concatenate
        return Row(join(tokens), join(labels), join(positions), real, join(about), cursor)
