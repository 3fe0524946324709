import ml_dtypes
import numpy as np
import pytest
import torch

from moeforge.checkpoint import open_checkpoint
from moeforge.errors import BadInput
from moeforge.model import weights as weights_module
from moeforge.model.build import build
from moeforge.model.weights import WeightMap, to_torch, torch_dtype


@pytest.mark.parametrize(
    ("numpy_dtype", "torch_type"),
    [
        (np.float64, torch.float64),
        (np.float32, torch.float32),
        (np.float16, torch.float16),
        (ml_dtypes.bfloat16, torch.bfloat16),
        (ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn),
        (np.int64, torch.int64),
        (np.uint8, torch.uint8),
        (np.bool_, torch.bool),
    ],
)
def test_numpy_and_torch_hold_the_same_values(numpy_dtype, torch_type):
    values = np.random.default_rng(1).standard_normal((3, 5)).astype(numpy_dtype)
    found = to_torch(values)
    assert found.dtype == torch_type and found.shape == (3, 5)
    assert np.array_equal(found.to(torch.float64).numpy(), values.astype(np.float64))


def test_a_dtype_that_torch_lacks():
    with pytest.raises(BadInput, match="complex64"):
        to_torch(np.zeros(2, np.complex64))


@pytest.mark.parametrize("name", ["int8", "floaty", "bool", "nn"])
def test_only_floating_point_types_are_taken(name):
    with pytest.raises(BadInput, match=name):
        torch_dtype(name)
    assert torch_dtype("torch.bfloat16") is torch.bfloat16


def test_building_takes_no_memory_for_weights(saved):
    _, directory = saved("mixtral")
    with open_checkpoint(str(directory)) as checkpoint:
        huge = {**checkpoint.config, "hidden_size": 1 << 14, "intermediate_size": 1 << 16, "head_dim": 64}
        model = build(huge)  # 150 GB of experts
    assert all(p.device.type == "meta" for p in model.parameters())
    buffers = dict(model.named_buffers())
    assert buffers and all(b.device.type == "cpu" and torch.isfinite(b).all() for b in buffers.values())


def test_sources_name_the_tensors_of_a_parameter(saved):
    _, directory = saved("mixtral", tie_word_embeddings=True)
    with open_checkpoint(str(directory)) as checkpoint:
        weights = WeightMap(checkpoint, build(checkpoint.config))
        names = weights.names()
        fused = "model.layers.1.mlp.experts.gate_up_proj"
        assert fused in names and fused in weights
        assert weights.sources(fused) == [
            [f"model.layers.1.block_sparse_moe.experts.{e}.{w}.weight" for e in range(12)] for w in ("w1", "w3")
        ]
        assert weights.sources("lm_head.weight") == [["model.embed_tokens.weight"]]
        assert weights.nbytes([fused], torch.float32) == 4 * 12 * 2 * 96 * 64
        used = {source for name in names for block in weights.sources(name) for source in block}
        assert used == set(checkpoint.tensors)


def test_large_tensors_are_read_in_blocks(saved, monkeypatch):
    model, directory = saved("llama")
    monkeypatch.setattr(weights_module, "BLOCK", 1000)
    with open_checkpoint(str(directory)) as checkpoint:
        whole = []
        original = checkpoint.read
        monkeypatch.setattr(
            checkpoint, "read", lambda name, rows=None: (whole.append(rows is None), original(name, rows))[1]
        )
        built = build(checkpoint.config)
        WeightMap(checkpoint, built).fill(["model.embed_tokens.weight", "model.norm.weight"], torch.float32)
    assert whole.count(False) == -(-199 // 3) and whole.count(True) == 1  # 3 rows of 64 floats are below 1000 bytes
    assert torch.equal(built.model.embed_tokens.weight, model.model.embed_tokens.weight)
