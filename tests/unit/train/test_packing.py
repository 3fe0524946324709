"""Documents to rows: every token predicted once a pass, borders marked, order fixed by the seed."""

from functools import partial
from itertools import islice, pairwise

import numpy as np
import pytest

from moeforge.errors import BadInput
from moeforge.train.data import Document
from moeforge.train.packing import IGNORE, Cursor, Packer


def corpus(sizes):
    """Documents of the given lengths in tokens, each token unique over the corpus."""
    starts = np.cumsum([10, *sizes])
    bodies = {
        f"d{i}": list(range(start, start + size)) for i, (start, size) in enumerate(zip(starts, sizes, strict=False))
    }
    documents = [Document(key, len(body), partial(str, key)) for key, body in bodies.items()]
    return documents, lambda document: bodies[document.key], bodies


SIZES = [5, 1, 23, 2, 8, 0, 3, 17]


@pytest.mark.parametrize("shared", [True, False])
def test_every_token_is_predicted_once_a_pass(shared):
    documents, encode, bodies = corpus(SIZES)
    pairs = []
    for row in Packer(documents, encode, 8, 3, shared=shared).rows(repeat=False):
        assert len(row.tokens) == len(row.labels) == len(row.positions) == 8
        pairs += [(t, n) for t, n, real in zip(row.tokens.tolist(), row.labels.tolist(), row.real, strict=True) if real]
        assert (row.labels[~row.real] == IGNORE).all()
        assert not shared or row.real.any()
    expected = [pair for body in bodies.values() for pair in pairwise(body)]
    assert sorted(pairs) == sorted(expected)


def test_positions_restart_at_borders_and_at_padding():
    documents, encode, _ = corpus([4, 3])
    (row,) = Packer(documents, encode, 8, None).rows(repeat=False)
    assert row.tokens.tolist() == [10, 11, 12, 14, 15, 0, 0, 0]
    assert row.labels.tolist() == [11, 12, 13, 15, 16, -100, -100, -100]
    assert row.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert row.real.tolist() == [True] * 5 + [False] * 3


def test_one_document_a_row_when_not_shared():
    documents, encode, _ = corpus([4, 3])
    rows = list(Packer(documents, encode, 8, None, shared=False).rows(repeat=False))
    assert [row.tokens[row.real].tolist() for row in rows] == [[10, 11, 12], [14, 15]]


def flat(rows):
    return [(row.tokens.tolist(), row.labels.tolist(), row.positions.tolist(), row.real.tolist()) for row in rows]


@pytest.mark.parametrize("shared", [True, False])
def test_any_cursor_continues_the_same_stream(shared):
    documents, encode, _ = corpus(SIZES)
    packer = Packer(documents, encode, 6, 11, shared=shared)
    rows = list(islice(packer.rows(), 40))
    assert rows[-1].cursor.epoch >= 2
    for cut in range(0, 39, 5):
        fresh = Packer(documents, encode, 6, 11, shared=shared)
        assert flat(islice(fresh.rows(rows[cut].cursor), 39 - cut)) == flat(rows[cut + 1 :])


def test_the_seed_fixes_the_order_and_passes_differ():
    documents, encode, _ = corpus(SIZES)
    one, same, other = (list(islice(Packer(documents, encode, 6, seed).rows(), 30)) for seed in (4, 4, 5))
    assert flat(one) == flat(same) != flat(other)
    packer = Packer(documents, encode, 6, 4)
    assert sorted(packer.order(0)) == sorted(packer.order(1)) == list(range(len(SIZES)))
    assert packer.order(0) != packer.order(1)


def test_nothing_to_predict_is_refused():
    documents, encode, _ = corpus([1, 0, 1])
    with pytest.raises(BadInput, match="no text to learn from"):
        next(Packer(documents, encode, 6, 0).rows(Cursor()))
