"""What running a model layer by layer is foreseen to take, from headers alone."""

from itertools import pairwise

import pytest

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.planned import PlannedCheckpoint
from moeforge.model import memory
from moeforge.model.memory import fits, layer_bytes, proof_bytes, weight_bytes


def planned(checkpoint, **config):
    tensors = {info.name: [info.dtype, list(info.shape)] for info in checkpoint.tensors.values()}
    return PlannedCheckpoint({"config": {**checkpoint.config, **config}, "tensors": tensors})


def test_weights_are_one_layer_whatever_the_depth(saved):
    with (
        open_checkpoint(str(saved("mixtral")[1])) as shallow,
        open_checkpoint(str(saved("mixtral", num_hidden_layers=6)[1])) as deep,
    ):
        layer = sum(4 * i.size for n, i in shallow.tensors.items() if ".layers.0." in n)
        assert layer_bytes(shallow.tensors.values()) == layer_bytes(deep.tensors.values()) == layer
        assert layer < weight_bytes(shallow) == weight_bytes(deep) < 2 * layer


def test_a_proof_takes_the_larger_model_and_the_text(saved):
    with (
        open_checkpoint(str(saved("llama")[1])) as dense,
        open_checkpoint(str(saved("mixtral", sliding_window=None)[1])) as mixture,
    ):
        assert weight_bytes(mixture) > weight_bytes(dense)
        found = proof_bytes(dense, mixture)
        assert found - proof_bytes(dense, dense) >= weight_bytes(mixture) - weight_bytes(dense)
        assert proof_bytes(mixture, dense) - found <= weight_bytes(dense)
        # what is planned counts as the plain files that will be written
        assert proof_bytes(dense, planned(mixture)) == found
        width, length = 64, 512
        text = proof_bytes(dense, mixture, [length]) - found
        assert text >= 8 * 4 * length * width + 2 * 4 * length**2
        widths = [proof_bytes(dense, planned(mixture, num_experts_per_tok=k)) for k in (1, 4, 12)]
        assert all(one <= more for one, more in pairwise(widths)) and widths[0] < widths[-1]


@pytest.mark.parametrize(("needed", "limit", "allowed"), [
    (750, None, True), (751, None, False), (600, 600, True), (601, 600, False), (751, 10_000, False), (1, 0, False),
])  # fmt: skip
def test_three_quarters_of_what_is_free_may_be_taken(needed, limit, allowed, monkeypatch):
    """A limit above what the machine has makes it no larger."""
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    assert fits(needed, limit) is allowed
