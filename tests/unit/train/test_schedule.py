"""The learning rate over the budget."""

import pytest

from moeforge.train.schedule import rate


def test_warm_up_rises_to_the_peak_from_above_zero():
    factors = [rate(step / 100, "cosine", 0.1) for step in range(11)]
    assert 0 < factors[0] < 0.1
    assert factors == sorted(factors)
    assert factors[10] == pytest.approx(1.0)


def test_ends():
    assert rate(1.0, "cosine", 0.1) == pytest.approx(0.1)
    assert rate(0.55, "cosine", 0.1) == pytest.approx(0.55)
    assert rate(0.99, "constant", 0.1) == 1.0
    assert rate(0.8, "wsd", 0.1) == 1.0
    assert rate(0.9, "wsd", 0.1) == pytest.approx(0.5)
    assert rate(1.0, "wsd", 0.1) == 0.0
    assert rate(0.0, "constant", 0.0) == 1.0
