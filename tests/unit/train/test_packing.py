"""Documents to rows: every token predicted once a pass, borders marked, order fixed by the seed."""

from dataclasses import replace
from functools import partial
from itertools import islice, pairwise

import numpy as np
import pytest

from moeforge.errors import BadInput
from moeforge.train.data import Document, Pool
from moeforge.train.packing import IGNORE, Cursor, Packer


def corpus(sizes):
    """Documents of the given lengths in tokens, each token unique over the corpus."""
    starts = np.cumsum([10, *sizes])
    bodies = {
        f"d{i}": list(range(start, start + size)) for i, (start, size) in enumerate(zip(starts, sizes, strict=False))
    }
    documents = [Document(key, len(body), partial(str, key)) for key, body in bodies.items()]
    return [Pool(tuple(documents))], lambda document: bodies[document.key], bodies


SIZES = [5, 1, 23, 2, 8, 0, 3, 17]


@pytest.mark.parametrize("shared", [True, False])
def test_every_token_is_predicted_once_a_pass(shared):
    pools, encode, bodies = corpus(SIZES)
    pairs = []
    for row in Packer(pools, encode, 8, 3, shared=shared).rows(repeat=False):
        assert len(row.tokens) == len(row.labels) == len(row.positions) == 8
        pairs += [(t, n) for t, n, real in zip(row.tokens.tolist(), row.labels.tolist(), row.real, strict=True) if real]
        assert (row.labels[~row.real] == IGNORE).all()
        assert not shared or row.real.any()
    expected = [pair for body in bodies.values() for pair in pairwise(body)]
    assert sorted(pairs) == sorted(expected)


def test_positions_restart_at_borders_and_at_padding():
    pools, encode, _ = corpus([4, 3])
    (row,) = Packer(pools, encode, 8, None).rows(repeat=False)
    assert row.tokens.tolist() == [10, 11, 12, 14, 15, 0, 0, 0]
    assert row.labels.tolist() == [11, 12, 13, 15, 16, -100, -100, -100]
    assert row.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert row.real.tolist() == [True] * 5 + [False] * 3


def test_one_document_a_row_when_not_shared():
    pools, encode, _ = corpus([4, 3])
    rows = list(Packer(pools, encode, 8, None, shared=False).rows(repeat=False))
    assert [row.tokens[row.real].tolist() for row in rows] == [[10, 11, 12], [14, 15]]


def flat(rows):
    return [(row.tokens.tolist(), row.labels.tolist(), row.positions.tolist(), row.real.tolist()) for row in rows]


@pytest.mark.parametrize("shared", [True, False])
def test_any_cursor_continues_the_same_stream(shared):
    pools, encode, _ = corpus(SIZES)
    packer = Packer(pools, encode, 6, 11, shared=shared)
    rows = list(islice(packer.rows(), 40))
    assert rows[-1].cursor.places[0].epoch >= 2
    for cut in range(0, 39, 5):
        fresh = Packer(pools, encode, 6, 11, shared=shared)
        assert flat(islice(fresh.rows(rows[cut].cursor), 39 - cut)) == flat(rows[cut + 1 :])


def test_the_seed_fixes_the_order_and_passes_differ():
    pools, encode, _ = corpus(SIZES)
    one, same, other = (list(islice(Packer(pools, encode, 6, seed).rows(), 30)) for seed in (4, 4, 5))
    assert flat(one) == flat(same) != flat(other)
    packer = Packer(pools, encode, 6, 4)
    assert sorted(packer.order(0, 0)) == sorted(packer.order(0, 1)) == list(range(len(SIZES)))
    assert packer.order(0, 0) != packer.order(0, 1)


def test_nothing_to_predict_is_refused():
    pools, encode, _ = corpus([1, 0, 1])
    with pytest.raises(BadInput, match="no text to learn from"):
        next(Packer(pools, encode, 6, 0).rows(Cursor()))


def mixture(weights, sizes=((40, 7, 30, 1, 22), (9, 5), (13, 60, 2))):
    """Pools of unlike documents; the tokens of pool i lie in [1000 i, 1000 i + 1000)."""
    pools, bodies = [], {}
    for i, (weight, lengths) in enumerate(zip(weights, sizes, strict=True)):
        starts = np.cumsum([1000 * i, *lengths])
        documents = []
        for start, length in zip(starts, lengths, strict=False):
            bodies[f"p{start}"] = list(range(start, start + length))
            documents.append(Document(f"p{start}", length, partial(str, start)))
        pools.append(Pool(tuple(documents), weight))
    return pools, lambda document: bodies[document.key]


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (1, 1, 1), (1, 30, 4)])
@pytest.mark.parametrize("shared", [True, False])
def test_shares_of_tokens_follow_the_weights_at_any_time(weights, shared):
    pools, encode = mixture(weights)
    seen = np.zeros(3)
    for row in islice(Packer(pools, encode, 16, 2, shared=shared).rows(), 400):
        seen += np.bincount(row.tokens[row.real] // 1000, minlength=3)
        # ahead by one document at most (the longest has 60 tokens), behind by what the others are ahead
        ahead = seen - seen.sum() * np.array(weights) / sum(weights)
        assert ahead.max() <= 60 and ahead.min() >= -120
    np.testing.assert_allclose(seen / seen.sum(), np.array(weights) / sum(weights), atol=0.03)
    # all of a pool is seen, again and again
    assert row.cursor.places[1].epoch > 3


def test_a_mixture_continues_from_any_cursor():
    pools, encode = mixture((0.5, 0.3, 0.2))
    rows = list(islice(Packer(pools, encode, 11, 7).rows(), 60))
    for cut in range(0, 59, 7):
        cursor = Cursor.from_json(rows[cut].cursor.as_json())
        assert flat(islice(Packer(pools, encode, 11, 7).rows(cursor), 59 - cut)) == flat(rows[cut + 1 :])


def test_one_pass_of_several_pools_is_one_of_each():
    pools, encode = mixture((5, 1, 1))
    rows = Packer(pools, encode, 16, 1).rows(repeat=False)
    found = sorted(t for row in rows for t in row.tokens[row.real].tolist())
    assert found == sorted(t for pool in pools for d in pool.documents for t in encode(d)[:-1])


def test_a_pool_without_text_is_refused_even_beside_others():
    pools, encode = mixture((1, 1, 1), ((20, 9), (1, 1), (5,)))
    with pytest.raises(BadInput, match=r"p1000.*no text to learn from"):
        list(islice(Packer(pools, encode, 8, 0).rows(), 20))


@pytest.mark.parametrize("shared", [True, False])
def test_every_token_knows_what_its_document_is_about(shared):
    """Two pools, documents of several labels in a row, cut over rows; the same after a cursor."""
    pools, encode, bodies = corpus(SIZES)
    documents = [replace(d, label=i % 3) for i, d in enumerate(pools[0].documents)]
    owner = {token: d.label for d in documents for token in bodies[d.key]}
    packer = Packer([Pool(tuple(documents[:5])), Pool(tuple(documents[5:]), 0.5)], encode, 8, 3, shared=shared)
    rows = list(islice(packer.rows(), 12))
    for row in rows:
        assert [owner[t] for t in row.tokens[row.real].tolist()] == row.about[row.real].tolist()
        assert (row.about[~row.real] == -1).all()
    assert not shared or any(len(set(row.about.tolist())) > 1 for row in rows)
    again = list(islice(packer.rows(rows[4].cursor), 7))
    assert all((a.about == b.about).all() for a, b in zip(rows[5:], again, strict=True))
