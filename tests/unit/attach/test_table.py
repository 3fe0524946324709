"""Experts by layer."""

import pytest

from moeforge.errors import UsageProblem
from moeforge_attach.table import experts_by_layer, layers_of


@pytest.mark.parametrize(
    ("pattern", "depth", "expected"),
    [
        ("8", 3, [8, 8, 8]),
        ("16", 2, [16, 16]),
        ("2468", 8, [2, 2, 4, 4, 6, 6, 8, 8]),
        ("8642", 6, [8, 6, 6, 4, 2, 2]),
        ("8228", 4, [8, 2, 2, 8]),
        ("5555", 5, [5] * 5),
        ("diamond", 4, [2, 8, 8, 2]),
        ("diamond:40", 4, [4, 16, 16, 4]),
        ("hourglass", 4, [8, 2, 2, 8]),
        ("1,2,3", 3, [1, 2, 3]),
        ("2468", 3, [4, 6, 8]),
    ],
)
def test_patterns(pattern, depth, expected):
    assert experts_by_layer(pattern, depth) == expected


@pytest.mark.parametrize("depth", [1, 2, 3, 7, 24, 30, 32, 33, 61])
def test_a_group_covers_its_quarter_of_any_depth(depth):
    found = experts_by_layer("2468", depth)
    assert len(found) == depth
    for i, count in enumerate((2, 4, 6, 8)):
        assert found[i * depth // 4 : (i + 1) * depth // 4] == [count] * ((i + 1) * depth // 4 - i * depth // 4)


def test_mola_spends_the_same_in_every_shape():
    """160 experts at each linear map of Llama's 32 layers (arXiv:2402.08562, table 1)."""
    for shape in ("2468", "8642", "8228", "5555", "diamond"):
        assert sum(experts_by_layer(shape, 32)) == 160


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("0", "'0' is not a number of experts"),
        ("2,2", "2 numbers for 3 layers"),
        ("2,x,2", "'x' is not a number"),
        ("pyramid", "expected a number, four digits"),
        ("2068", "'0' is not"),
        ("diamond:7", "does not scale"),
        ("8:20", "expected a number"),
        ("-3", "expected a number"),
    ],
)
def test_patterns_that_are_none(pattern, message):
    with pytest.raises(UsageProblem, match=message):
        experts_by_layer(pattern, 3)


def test_layers():
    assert layers_of("all", 3) == [0, 1, 2]
    assert layers_of("0,2-4", 6) == [0, 2, 3, 4]
    for bad, message in (
        ("6", "layers 0 to 5"),
        ("a", "neither a number"),
        ("3-", "neither"),
        ("4-2", "layers 0 to 5"),
    ):
        with pytest.raises(UsageProblem, match=message):
            layers_of(bad, 6)
