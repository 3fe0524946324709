"""The list of refusals that no test reaches finds what it should, and nothing else."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCE = """
class MoeforgeError(Exception): ...
class Refused(MoeforgeError): ...
class Worse(errors.Refused): ...
def refusal(what) -> Refused: return Refused(what)
def f(x):
    if x == 1:
        raise Refused("one")
    if x == 2:
        raise errors.Worse(
            "two"
        ) from None
    if x == 3:
        raise refusal("three")
    if x == 4:
        raise ValueError("no refusal")
    raise
"""


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("refusals", ROOT / "tests/coverage/refusals.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_counts_raises_of_our_errors(tool):
    trees = {"a.py": ast.parse(SOURCE)}
    assert tool.error_names(trees.values()) == {"MoeforgeError", "Refused", "Worse", "refusal"}
    assert tool.unreached(trees, {}) == (3, ["a.py:8", "a.py:10", "a.py:14"])
    assert tool.unreached(trees, {"a.py": {7, 8, 11}}) == (3, ["a.py:14"])


def test_it_finds_ours(tool):
    found, missing = tool.unreached(tool.sources(), {})
    assert found == len(missing) > 400
    assert {"moeforge/checkpoint/finite.py", "plugins/moeforge_push/stage.py"} <= {
        place.split(":")[0] for place in missing
    }
