"""GGUF files: loaded by the real llama.cpp, which must compute what transformers computes, and read back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.gguf_header import read_header
from moeforge.errors import BadInput, MachineLacks
from moeforge.model.tokenizer import load_tokenizer
from moeforge.testing.inprocess import plan, run
from moeforge.testing.models import SIZES, tiny, tiny_tokenizer

ROPE = {"rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
QWEN2_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
             "norm_topk_prob": False}  # fmt: skip
QWEN3_MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "head_dim": 32,
}
MODELS = {
    "llama": ("llama", {}),
    "llama, biases and tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama, wide heads, llama3 rope": ("llama", {"head_dim": 64, "rope_parameters": LLAMA3}),
    "llama, linear rope": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear"}}),
    "llama, yarn": ("llama", {"rope_parameters": ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 32}}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, tied": (
        "mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "head_dim": 32, "tie_word_embeddings": True},
    ),
    "qwen2_moe": ("qwen2_moe", QWEN2_MOE),
    "qwen2_moe, tied": ("qwen2_moe", QWEN2_MOE | {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE),
    "qwen3_moe, tied": ("qwen3_moe", QWEN3_MOE | {"tie_word_embeddings": True}),
}


def build(directory: Path, name: str, **more):
    model_type, settings = MODELS[name]
    model, _ = tiny(AutoConfig.for_model(model_type, **{**SIZES, **settings, **more}))
    model.save_pretrained(directory)
    return model


def llama_cpp_logits(file: Path, ids: list[int]) -> np.ndarray:
    """[tokens, vocabulary] from the real llama.cpp, with float32 caches."""
    lib = pytest.importorskip("llama_cpp", reason="needs the extra `llamacpp`")
    lib.llama_log_set(_silent(lib), None)
    model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
    assert model, "llama.cpp does not load the file"
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch, settings.type_k, settings.type_v = 256, 1, 1, 0, 0
    settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it computes in float16
    context = lib.llama_init_from_model(model, settings)
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert lib.llama_decode(context, batch) == 0
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (size,)).copy() for i in range(len(ids))]
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return np.stack(rows)


_KEEP = []


def _silent(lib):
    _KEEP.append(lib.llama_log_callback(lambda level, text, data: None))
    return _KEEP[-1]


def difference(model, file: Path) -> float:
    """max |dlogit| / max |logit| over 40 random tokens; asserts the same favourite everywhere."""
    ids = torch.randint(0, SIZES["vocab_size"], (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(ids[None]).logits[0].float().numpy()
    got = llama_cpp_logits(file, ids.tolist())
    assert got.shape == wanted.shape
    assert (got.argmax(-1) == wanted.argmax(-1)).all()
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name, tmp_path):
    model = build(tmp_path / "m", name)
    done = run("export", tmp_path / "m", tmp_path / "out", to="gguf")
    assert done.manifest["kind"] == "gguf"
    assert done.manifest["verdicts"]["exact"] is True
    assert difference(model, tmp_path / "out" / "model-f32.gguf") < 2e-6


@pytest.mark.parametrize("name", MODELS)
def test_reading_it_back_gives_the_checkpoint(name, tmp_path):
    """Names, bytes and config survive the round trip, and stock transformers loads what comes back."""
    build(tmp_path / "m", name)
    run("export", tmp_path / "m", tmp_path / "gguf", to="gguf")
    run("export", tmp_path / "gguf", tmp_path / "back", to="hf")
    with open_checkpoint(tmp_path / "m") as before, open_checkpoint(tmp_path / "back") as after:
        assert set(after.tensors) - set(before.tensors) <= {"lm_head.weight"}
        for tensor in before.tensors:
            np.testing.assert_array_equal(after.read(tensor), before.read(tensor), err_msg=tensor)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / d)(ids).logits for d in ("m", "back"))
    assert torch.equal(first, second)


def test_an_all_zero_shared_gate_is_one_half(tmp_path):
    """llama.cpp divides by the gate's input: zero rows would give NaN."""
    model = build(tmp_path / "m", "qwen2_moe")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "shared_expert_gate" in name:
                value.zero_()
    model.save_pretrained(tmp_path / "m")
    run("export", tmp_path / "m", tmp_path / "out", to="gguf")
    assert difference(model, tmp_path / "out" / "model-f32.gguf") < 2e-6


@pytest.mark.parametrize(("kind", "limit"), [("f16", 5e-3), ("bf16", 3e-2), ("q8_0", 5e-2)])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_narrower_types(kind, limit, name, tmp_path):
    model = build(tmp_path / "m", name)
    done = run("export", tmp_path / "m", tmp_path / "out", to="gguf", type=kind)
    assert done.manifest["verdicts"]["exact"] is False
    file = tmp_path / "out" / f"model-{kind}.gguf"
    kinds = {tensor.name: tensor.kind.name.lower() for tensor in read_header(file).tensors}
    assert kinds["blk.1.attn_q.weight"] == kind
    assert kinds["blk.1.attn_norm.weight"] == "f32"
    assert kinds.get("blk.1.ffn_gate_inp.weight", "f32") == "f32", "routers stay exact"
    ids = torch.arange(5, 45)
    with torch.no_grad():
        wanted = model(ids[None]).logits[0].numpy()
    got = llama_cpp_logits(file, ids.tolist())
    error = np.abs(got - wanted).max() / np.abs(wanted).max()
    assert 1e-6 < error < limit


def test_quantising_is_that_of_the_gguf_package(tmp_path, monkeypatch):
    from gguf import GGMLQuantizationType as Kind
    from gguf import quants

    from moeforge_export import gguf_file

    values = np.random.default_rng(0).normal(size=(37, 96)).astype(np.float32)
    wanted = quants.quantize(values, Kind.Q8_0).reshape(-1)
    for chunk in (1 << 20, 64):
        monkeypatch.setattr(gguf_file, "_CHUNK", chunk)
        np.testing.assert_array_equal(gguf_file.encode(values, Kind.Q8_0, "x"), wanted)


def test_a_window_bounds_the_context(tmp_path):
    """Within the window the function is the same; the file says so and the plan warns."""
    model = build(tmp_path / "m", "mistral", sliding_window=48)
    assert any("sliding window" in line for line in plan("export", tmp_path / "m", to="gguf").warnings)
    run("export", tmp_path / "m", tmp_path / "out", to="gguf")
    file = tmp_path / "out" / "model-f32.gguf"
    assert read_header(file).metadata["llama.context_length"] == 48
    assert difference(model, file) < 2e-6


REFUSED = [
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("qwen2", {"head_dim": 32}, "head_dim"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic"}}, "rope_type"),
    ("llama", {"rope_parameters": ROPE | {"rope_type": "yarn", "beta_fast": 16}}, "beta_fast"),
    ("llama", {"rope_parameters": ROPE | LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
]


@pytest.mark.parametrize(("name", "change", "word"), REFUSED)
def test_refuses_what_llama_cpp_would_compute_otherwise(name, change, word, tmp_path):
    build(tmp_path, name)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=word) as caught:
        plan("export", tmp_path, to="gguf")
    assert "\n" not in str(caught.value)


def test_refuses_unknown_architectures_and_tensors(tmp_path):
    from safetensors.numpy import load_file, save_file

    model, _ = tiny(AutoConfig.for_model("olmo2", **SIZES))
    model.save_pretrained(tmp_path / "o")
    with pytest.raises(BadInput, match=r"olmo2.*not an architecture that moeforge writes.*convert_hf_to_gguf"):
        plan("export", tmp_path / "o", to="gguf")
    build(tmp_path / "m", "llama")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    file = tmp_path / "m" / "model.safetensors"
    save_file(tensors | {"model.layers.0.self_attn.sinks": np.ones(4, np.float32)}, file)
    with pytest.raises(BadInput, match="sinks"):
        plan("export", tmp_path / "m", to="gguf")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(BadInput, match=r"model.layers.1.mlp.up_proj.weight.*missing"):
        plan("export", tmp_path / "m", to="gguf")


def test_overflow_is_refused(tmp_path):
    model = build(tmp_path / "m", "llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e5
    model.save_pretrained(tmp_path / "m")
    for to in ("gguf", "hf"):
        with pytest.raises(BadInput, match=r"up_proj.*beyond"):
            run("export", tmp_path / "m", tmp_path / to, to=to, type="f16")
        assert not (tmp_path / to).exists()


def test_a_vocabulary_without_merges_survives(tmp_path):
    build(tmp_path / "m", "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    run("export", tmp_path / "m", tmp_path / "out", to="gguf")
    assert read_header(tmp_path / "out" / "model-f32.gguf").metadata["tokenizer.ggml.merges"] == []
    text = "anywordatall"
    found = load_tokenizer(str(tmp_path / "out" / "model-f32.gguf"))
    assert found.encode(text) == load_tokenizer(str(tmp_path / "m")).encode(text)


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    build(tmp_path / "model", "llama")
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(MachineLacks, match=r"GB are to be written but the disk has 0\.000 GB free"):
        run("export", tmp_path / "model", tmp_path / "out", to="gguf")
    assert not list(tmp_path.rglob("*.gguf"))
