"""A relative error above the threshold counts as rounding only when the reference itself is as far from itself."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moeforge.checkpoint import open_checkpoint
from moeforge.model.proof import prove, rounding_error, token_batches
from moeforge.model.streaming import StreamedModel
from moeforge.testing.models import save_tiny


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """Make a copy of a tiny model whose last norm, which lies in no block, is scaled by a factor."""
    dense = save_tiny(tmp_path_factory.mktemp("dense"), "llama")

    def scale(factor):
        other = tmp_path_factory.mktemp("other") / "model"
        shutil.copytree(dense, other)
        tensors = load_file(dense / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(factor)
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        return other

    return dense, scale


def compare(dense, other, **how):
    with open_checkpoint(str(dense)) as first:
        return prove(first, other, tokens=32, **how)


def test_rounding_is_excused_and_said(changed):
    dense, scale = changed
    found = compare(dense, scale(1 + 2**-22), threshold=1e-8)
    assert found.relative_error > 1e-8
    assert found.rounding >= found.relative_error
    assert found.exact and "rounding alone" in found.summary()


def test_a_real_difference_is_not_excused(changed):
    dense, scale = changed
    found = compare(dense, scale(1 + 1e-4))
    assert found.argmax_equal == 1 and all(layer.local_error == 0 for layer in found.layers)
    assert found.relative_error > 5e-5 > found.rounding > 0
    assert not found.exact


def test_it_is_not_measured_where_it_is_not_needed(changed):
    dense, scale = changed
    assert compare(dense, scale(1)).rounding is None


def test_the_same_seed_measures_the_same(changed):
    dense, _ = changed
    with open_checkpoint(str(dense)) as checkpoint:
        batches = token_batches(checkpoint.config, 199, 32, 0)
        model = StreamedModel(checkpoint)
        reference = model.run(batches)
        found = [rounding_error(model, reference, seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert 1e-8 < found[0] < 1e-5
