"""GGUFCheckpoint: names, row order, config and numbers, from files written with the `gguf` package alone."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter

from moeforge.checkpoint.gguf import GGUFCheckpoint
from moeforge.checkpoint.gguf_config import llama3_factors
from moeforge.checkpoint.tensor import NUMPY_DTYPES
from moeforge.errors import BadInput, UsageProblem
from moeforge.testing.models import tiny_dense

FAMILIES = {
    "llama": ("llama", "llama", {}),
    "llama with biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", "llama", {"tie_word_embeddings": True}),
    "llama, wide heads": ("llama", "llama", {"head_dim": 32}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen3": ("qwen3", "qwen3", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_rows_and_config(family, tmp_path, make_gguf):
    model_type, arch, settings = FAMILIES[family]
    model, config = tiny_dense(model_type, **settings)
    held = make_gguf(tmp_path / "m.gguf", model, arch=arch)
    with GGUFCheckpoint(tmp_path / "m.gguf") as source:
        assert set(source.tensors) == set(held)
        for name, value in held.items():
            info = source.tensors[name]
            assert (info.dtype, info.shape) == ("F32", value.shape)
            np.testing.assert_array_equal(source.read(name), value, err_msg=name)
            extent = source.extent(name)
            permuted = arch == "llama" and ("q_proj" in name or "k_proj" in name)
            assert (extent is None) == permuted
            if extent is not None:
                raw = extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
                assert raw == value.tobytes()
        wanted, found = config.to_dict(), source.config
        for key in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
                    "num_key_value_heads", "vocab_size", "max_position_embeddings", "tie_word_embeddings"):  # fmt: skip
            assert found[key] == wanted[key], key
        assert found["rms_norm_eps"] == wanted["rms_norm_eps"], "the decimal, not its float32 neighbour"
        assert found.get("attention_bias", False) == wanted.get("attention_bias", False)
        assert found.get("mlp_bias", False) == wanted.get("mlp_bias", False)
        assert found["rope_parameters"] == wanted["rope_parameters"]
        assert found["rope_theta"] == wanted["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
def test_encodings_and_dtypes(kind, tmp_path, make_gguf):
    model, _ = tiny_dense("llama", num_hidden_layers=1, head_dim=32)
    held = make_gguf(tmp_path / "m.gguf", model, kind)
    for asked in (None, "F32", "F16", "BF16"):
        with GGUFCheckpoint(tmp_path / "m.gguf", dtype=asked) as source:
            dtype = asked or {Kind.F32: "F32", Kind.F16: "F16"}.get(kind, "BF16")
            assert source.dtype == dtype == source.provenance()["read_as"]
            for name, value in held.items():
                got = source.read(name)
                assert got.dtype == NUMPY_DTYPES[dtype]
                assert got.flags.c_contiguous
                np.testing.assert_array_equal(got, value.astype(NUMPY_DTYPES[dtype]), err_msg=name)
                for rows in (slice(0, 1), slice(3, 30), slice(5, 5), slice(20, None), slice(-2, None)):
                    part = source.read(name, rows)
                    np.testing.assert_array_equal(part, got[rows])
                    assert part.shape == got[rows].shape


def test_experts_are_unstacked(tmp_path):
    """Mixtral: one GGUF tensor [E, F, D] is E tensors, and rows of each are read alone."""
    path, rng = tmp_path / "m.gguf", np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    for key, value in {"block_count": 1, "context_length": 32, "embedding_length": 32, "feed_forward_length": 64, "expert_count": 3,
                       "expert_used_count": 2, "attention.head_count": 2}.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    shapes = {"token_embd": (10, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (32, 32),
              "blk.0.attn_v": (32, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,), "blk.0.ffn_gate_inp": (3, 32),
              "blk.0.ffn_gate_exps": (3, 64, 32), "blk.0.ffn_up_exps": (3, 64, 32), "blk.0.ffn_down_exps": (3, 32, 64)}  # fmt: skip
    held = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in held.items():
        writer.add_tensor(f"{name}.weight", value)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with GGUFCheckpoint(path) as source:
        assert source.config["model_type"] == "mixtral"
        assert (source.config["num_local_experts"], source.config["num_experts_per_tok"]) == (3, 2)
        assert source.config["num_key_value_heads"] == 2
        for role, gguf in {"w1": "gate", "w2": "down", "w3": "up"}.items():
            for e in range(3):
                name = f"model.layers.0.block_sparse_moe.experts.{e}.{role}.weight"
                np.testing.assert_array_equal(source.read(name), held[f"blk.0.ffn_{gguf}_exps"][e])
                np.testing.assert_array_equal(source.read(name, slice(7, 9)), held[f"blk.0.ffn_{gguf}_exps"][e][7:9])


def test_rope_scaling_comes_back(tmp_path, make_gguf):
    model, _ = tiny_dense("llama", head_dim=64, num_hidden_layers=1)
    wanted = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factors = llama3_factors(wanted, 64, 500000.0)
    assert len(set(factors.tolist())) > 3, "untouched, blended and stretched frequencies"
    make_gguf(tmp_path / "a.gguf", model, extra={"rope_freqs.weight": factors}, **{"llama.rope.freq_base": 500000.0})
    with GGUFCheckpoint(tmp_path / "a.gguf") as source:
        assert source.config["rope_scaling"] == wanted | {"rope_type": "llama3"}
        assert source.config["rope_parameters"] == wanted | {"rope_type": "llama3", "rope_theta": 500000.0}
        assert "rope_freqs" not in str(source.tensors)
    make_gguf(
        tmp_path / "b.gguf", model, extra={"rope_freqs.weight": factors * np.linspace(1, 2, 32, dtype=np.float32)}
    )
    with pytest.raises(BadInput, match="rope_freqs"):
        GGUFCheckpoint(tmp_path / "b.gguf")


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_other_rope_scaling(kind, tmp_path, make_gguf):
    model, _ = tiny_dense("llama", num_hidden_layers=1)
    keys = {"type": kind, "factor": 4.0, "original_context_length": 64}
    make_gguf(tmp_path / "m.gguf", model, **{f"llama.rope.scaling.{key}": value for key, value in keys.items()})
    with GGUFCheckpoint(tmp_path / "m.gguf") as source:
        found = source.config["rope_parameters"]
        assert (found["rope_type"], found["factor"]) == (kind, 4.0)
        assert found.get("original_max_position_embeddings") == (64 if kind == "yarn" else None)


REFUSED = {
    "architecture": ({"arch": "gpt2"}, {}),
    "dimension_count": ({}, {"llama.rope.dimension_count": 8}),
    "longrope": ({}, {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}),
    "layers": ({}, {"llama.block_count": 400}),
    "'blk.2.": ({}, {"llama.block_count": 2}),
    "'blk.3.": ({}, {"llama.block_count": 4}),
    "whole heads": ({}, {"llama.attention.head_count_kv": 3}),
    "one of 3 parts": ({}, {"split.count": 3}),
    "not of its kind": ({}, {"llama.embedding_length": "wide"}),
}


@pytest.mark.parametrize("word", REFUSED)
def test_refuses(word, tmp_path, make_gguf):
    how, metadata = REFUSED[word]
    model, _ = tiny_dense("llama")
    make_gguf(tmp_path / "m.gguf", model, **how, **metadata)
    with pytest.raises(BadInput, match=word) as caught:
        GGUFCheckpoint(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


def test_refuses_what_it_does_not_know(tmp_path, make_gguf):
    model, _ = tiny_dense("llama", num_hidden_layers=1)
    make_gguf(tmp_path / "m.gguf", model, extra={"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
    with pytest.raises(BadInput, match="attn_sinks"):
        GGUFCheckpoint(tmp_path / "m.gguf")
    make_gguf(tmp_path / "n.gguf", model)
    with pytest.raises(UsageProblem, match="F64"):
        GGUFCheckpoint(tmp_path / "n.gguf", dtype="F64")
    with GGUFCheckpoint(tmp_path / "n.gguf") as source, pytest.raises(BadInput, match="no tensor"):
        source.read("model.nowhere")
    with GGUFCheckpoint(tmp_path / "n.gguf") as source, pytest.raises(BadInput, match="contiguous"):
        source.read("model.norm.weight", slice(0, 8, 2))


def test_digest_follows_content_and_dtype(tmp_path, make_gguf):
    model, _ = tiny_dense("llama", num_hidden_layers=1)
    make_gguf(tmp_path / "m.gguf", model)
    digests = {GGUFCheckpoint(tmp_path / "m.gguf", dtype=d).provenance()["digest"] for d in ("F32", "BF16")}
    make_gguf(tmp_path / "m.gguf", tiny_dense("llama", 1, num_hidden_layers=1)[0])
    digests.add(GGUFCheckpoint(tmp_path / "m.gguf").provenance()["digest"])
    assert len(digests) == 3
