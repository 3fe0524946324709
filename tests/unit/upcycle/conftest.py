"""Tiny dense models, conversions without the command's start-up, and an oracle that is not ours: stock transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from moeforge.testing import inprocess
from moeforge.testing.models import save_tiny


@dataclass(frozen=True)
class Agreement:
    """How two checkpoints compare under the stock classes, in float32."""

    error: float
    """max|dlogit| / max|logit|"""
    argmax: bool
    """Whether both prefer the same token everywhere."""
    model_class: str
    loading: dict
    """Missing, unexpected and mismatched keys of the second."""


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Callable[..., Path]:
    """dense(model_type, **config): the directory of a tiny model, made once for each set of arguments."""
    made: dict = {}

    def make(model_type: str, **overrides) -> Path:
        key = (model_type, repr(sorted(overrides.items())))
        if key not in made:
            made[key] = save_tiny(tmp_path_factory.mktemp(model_type), model_type, **overrides)
        return made[key]

    return make


@pytest.fixture
def upcycle(tmp_path) -> Callable[..., inprocess.Done]:
    """upcycle(src, method, **options) -> what was written; four experts, no proof of our own unless asked for."""
    count = iter(range(1000))

    def convert(src: Path, method: str = "copy", **options) -> inprocess.Done:
        options = {"experts": 4, "router_std": 0.5, "verify": False, **options}
        return inprocess.run("upcycle", src, tmp_path / f"out{next(count)}", method, **options)

    return convert


@pytest.fixture(scope="session")
def logits() -> Callable:
    """logits(directory) -> ([2, 40, V] float32 logits of the stock class, loading report, class name)."""
    import torch
    from transformers import AutoModelForCausalLM

    kept: dict = {}

    def compute(directory: Path, keep: bool = False):
        if directory not in kept:
            model, loading = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
            ids = torch.randint(0, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                found = model.eval()(ids).logits
            assert torch.isfinite(found).all()
            answer = (found, {key: value for key, value in loading.items() if value}, type(model).__name__)
            if not keep:
                return answer
            kept[directory] = answer
        return kept[directory]

    return compute


@pytest.fixture(scope="session")
def compare(logits) -> Callable[[Path, Path], Agreement]:
    """compare(dense, mixture) -> Agreement."""

    def agreement(first: Path, second: Path) -> Agreement:
        a, _, _ = logits(first, keep=True)
        b, loading, name = logits(second)
        error = ((a - b).abs().max() / a.abs().max()).item()
        return Agreement(error, bool((a.argmax(-1) == b.argmax(-1)).all()), name, loading)

    return agreement
