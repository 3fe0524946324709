"""The demo's table, from manifests alone."""

import importlib.util
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[3] / "examples" / "demo" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("moeforge_demo", DEMO)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("parent", "now", "said"),
    [(12.3456, 13.0, "perplexity 12.35 -> 13"), (12.3456, None, "perplexity 12.35 -> above 1e308")],
)
def test_a_perplexity_past_the_largest_float_is_told(demo, parent, now, said):
    """A manifest holds null then."""
    body = {"kind": "checkpoint", "verdicts": {}, "counts": {"perplexity_parent": parent, "perplexity": now}}
    assert demo.outcome(body) == said
