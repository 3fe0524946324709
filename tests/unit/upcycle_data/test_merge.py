"""Merges against direct float64 formulas on whole tensors; blocks of rows are an implementation detail."""

import numpy as np
import pytest

from moeforge_upcycle import merge


def tensors(*rows, width=5, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, width)).astype(dtype) for n in rows]


def arc(a, b, t):
    """t of the way from a to b, whole tensors as vectors."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    angle = np.arccos(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.fixture(params=[1, 1 << 22], ids=["row by row", "at once"], autouse=True)
def block(request, monkeypatch):
    monkeypatch.setattr(merge, "BLOCK", request.param)


def test_average_is_over_the_holders_of_a_row():
    a, b, c = tensors(9, 6, 7)
    wide = [x.astype(np.float64) for x in (a, b, c)]
    wanted = np.concatenate([(wide[0][:6] + wide[1] + wide[2][:6]) / 3, (wide[0][6:7] + wide[2][6:]) / 2, wide[0][7:]])
    assert np.allclose(merge.average([a, b, c]), wanted, rtol=1e-15)


def test_slerp_of_two_is_the_middle_of_the_arc():
    a, b = tensors(8, 8, seed=1)
    found = merge.slerp([a, b])
    assert np.allclose(found, arc(a, b, 0.5), rtol=1e-12)
    # as far from one as from the other
    assert np.sum(found * a) / np.linalg.norm(a) == pytest.approx(np.sum(found * b) / np.linalg.norm(b), rel=0.2)
    one_dimensional = merge.slerp([a[0], b[0]])
    assert np.allclose(one_dimensional, arc(a[0], b[0], 0.5), rtol=1e-12)


def test_slerp_of_more_goes_on_with_a_third_and_of_each_row_with_its_holders():
    a, b, c = tensors(8, 8, 8, seed=2)
    assert np.allclose(merge.slerp([a, b, c]), arc(arc(a, b, 1 / 2), c, 1 / 3), rtol=1e-12)
    a, b, c = tensors(8, 5, 8, seed=3)
    first = np.concatenate([arc(a[:5], b, 1 / 2), a[5:].astype(np.float64)])
    angle = np.arccos(np.sum(first * c) / np.linalg.norm(first) / np.linalg.norm(c.astype(np.float64)))
    share = np.array([1 / 3] * 5 + [1 / 2] * 3)[:, None]
    wanted = (np.sin((1 - share) * angle) * first + np.sin(share * angle) * c) / np.sin(angle)
    assert np.allclose(merge.slerp([a, b, c]), wanted, rtol=1e-12)


@pytest.mark.parametrize("kind", ["average", "slerp", "task"])
def test_equal_tensors_come_back_to_the_bit(kind):
    (a,) = tensors(7, seed=4)
    same = [a, a.copy(), a.copy()]
    made = merge.task_vector(same, a.copy(), 0.7) if kind == "task" else getattr(merge, kind)(same)
    assert np.array_equal(made.astype(np.float32), a)


def test_slerp_without_an_arc_is_the_mean():
    (a,) = tensors(4, seed=5)
    zero = np.zeros_like(a)
    assert np.allclose(merge.slerp([a, zero]), a / 2, rtol=1e-6)
    assert np.allclose(merge.slerp([a, -a]), 0, atol=1e-9)
    assert np.array_equal(merge.slerp([zero, zero]), zero)


def test_task_vectors_add_up_on_the_base():
    a, b, base = tensors(8, 6, 5, seed=6)
    wide = [x.astype(np.float64) for x in (a, b, base)]
    head = wide[2] + 0.3 * ((wide[0][:5] - wide[2]) + (wide[1][:5] - wide[2]))
    wanted = np.concatenate([head, (wide[0][5:6] + wide[1][5:]) / 2, wide[0][6:]])
    assert np.allclose(merge.task_vector([a, b], base, 0.3), wanted, rtol=1e-12)
