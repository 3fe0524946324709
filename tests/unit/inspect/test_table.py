import pytest

from moeforge.report.table import table


def test_numbers_lean_right_and_words_left():
    assert table(("name", "MB"), [("ab", 5), ("c", 1200)]) == ["name    MB", "----  ----", "ab       5", "c     1200"]
    assert table(("a",), []) == ["a", "-"]
    with pytest.raises(ValueError, match="zip"):
        table(("a", "b"), [("only one",)])
