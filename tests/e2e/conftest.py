"""Small real inputs for whole-command tests."""

import pytest

from moeforge.testing.models import tiny_dense


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A two-layer Llama with perturbed norms, on disk; no tokenizer."""
    directory = tmp_path_factory.mktemp("tiny") / "llama"
    model, _ = tiny_dense("llama", seed=0)
    model.save_pretrained(directory)
    return directory
