"""MergedAdapter against peft's own merge_and_unload, on a tiny Llama with random adapters."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from moeforge.checkpoint import open_checkpoint
from moeforge.errors import BadInput
from moeforge.testing.models import save_tiny

CASES = {
    "plain": {"target_modules": ["q_proj", "down_proj"], "r": 5, "lora_alpha": 12},
    "rslora": {"target_modules": "all-linear", "r": 3, "lora_alpha": 7, "use_rslora": True},
    "dora": {"target_modules": ["v_proj", "gate_proj"], "r": 4, "lora_alpha": 9, "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 7},
        "alpha_pattern": {r"layers\.[02]\.mlp\.up_proj": 3, "k_proj": 20},
    },
    "saved": {"target_modules": ["o_proj"], "r": 2, "lora_alpha": 2, "modules_to_save": ["lm_head", "norm"]},
    "bias": {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 5, "bias": "all"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), "llama", attention_bias=True, tie_word_embeddings=False)


def make_adapter(base: Path, where: Path, seed: int = 0, **settings) -> dict[str, np.ndarray]:
    """Save an adapter with random weights; returns what peft merges it to."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or (name.endswith("bias") and settings.get("bias")):
                value.add_(0.3 * torch.randn_like(value))
    model.save_pretrained(where)
    merged = model.merge_and_unload()
    return {name: value.detach().float().numpy() for name, value in merged.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_peft(case, base, tmp_path):
    expected = make_adapter(base, tmp_path, **CASES[case])
    with open_checkpoint(tmp_path) as merged, open_checkpoint(base) as plain:
        assert set(merged.tensors) == set(expected)
        changed = 0
        for name, wanted in expected.items():
            got = merged.read(name)
            assert got.dtype == np.float32 and got.flags.c_contiguous and got.shape == wanted.shape
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6, err_msg=name)
            changed += not np.array_equal(got, plain.read(name))
            np.testing.assert_array_equal(merged.read(name, slice(1, 3)), got[1:3])
        assert changed >= len(load_file(tmp_path / "adapter_model.safetensors")) // 3
        touched = {name for name in expected if merged.extent(name) is None}
        assert touched and touched != set(expected), "untouched tensors keep their byte ranges"


def test_gpt2_layout(tmp_path):
    """fan_in_fan_out: the base stores [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=24, n_head=2, vocab_size=50, n_positions=32)).save_pretrained(
        tmp_path / "b"
    )
    settings = {"target_modules": ["c_attn"], "r": 3, "lora_alpha": 4, "fan_in_fan_out": True}
    expected = make_adapter(tmp_path / "b", tmp_path / "a", **settings)
    with open_checkpoint(tmp_path / "a") as merged:
        for name in merged.tensors:
            np.testing.assert_allclose(merged.read(name), expected[name], rtol=2e-5, atol=2e-6)
            np.testing.assert_array_equal(merged.read(name, slice(0, 2)), merged.read(name)[:2])


def test_half_precision_rounds_once(base, tmp_path):
    """bf16 base: the sum is made in float32 and rounded to nearest once."""
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(tmp_path / "b")
    make_adapter(tmp_path / "b", tmp_path / "a", target_modules=["q_proj"], r=3, lora_alpha=6)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    with open_checkpoint(tmp_path / "a") as merged, open_checkpoint(tmp_path / "b") as plain:
        a, b = (stored[f"base_model.model.{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        exact = plain.read(name + ".weight").astype(np.float64) + 2 * b @ a
        got = merged.read(name + ".weight")
        assert got.dtype == plain.read(name + ".weight").dtype
        ulp = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
        assert np.all(np.abs(got.astype(np.float64) - exact) <= 0.5001 * ulp)


def test_relative_base_and_provenance(base, tmp_path, monkeypatch):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "b")
    make_adapter(tmp_path / "b", tmp_path / "a", target_modules=["q_proj"], r=2)
    _edit(tmp_path / "a", base_model_name_or_path="../b")
    (tmp_path / "a" / "chat_template.jinja").write_text("hello")
    with open_checkpoint(tmp_path / "a") as merged:
        first = merged.provenance()
        assert first["base"]["ref"].endswith("b") and first["digest"].startswith("sha256:")
        assert {c.name: c.read() for c in merged.companions()}["chat_template.jinja"] == b"hello"
    _edit(tmp_path / "a", lora_alpha=99)
    with open_checkpoint(tmp_path / "a") as other:
        assert other.provenance()["digest"] != first["digest"]


def _edit(adapter: Path, **changes) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


REFUSALS = [
    ({"peft_type": "IA3"}, "peft_type"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"use_qalora": True}, "use_qalora"),
    ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    ({"r": 9}, "rank"),
    ({"alpha_pattern": {"(": 3}}, "regular expression"),
    ({"alpha_pattern": {"(?=q)q_proj": 3}}, "not matched here"),
    ({"rank_pattern": {"(a|a)" * 150 + "(.*.*)*q_proj": 3, "q_proj": 4}}, "has rank 2, adapter_config.json says 4"),
    ({"rank_pattern": ["q_proj"]}, "an object is expected"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"use_dora": True, "fan_in_fan_out": True}, "use_dora with fan_in_fan_out"),
    ({"base_model_name_or_path": None}, "base_model_name_or_path"),
    ({"base_model_name_or_path": "x" * 5000}, "no such file or directory"),
    ({"base_model_name_or_path": "~nobody-of-that-name/x"}, "no such file or directory"),
    ({"lora_alpha": "many"}, "lora_alpha"),
]


@pytest.mark.parametrize(("change", "word"), REFUSALS)
def test_refuses_settings(change, word, base, tmp_path):
    make_adapter(base, tmp_path, target_modules=["q_proj"], r=2)
    _edit(tmp_path, **change)
    with pytest.raises(BadInput, match=word) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def _rename(old: str, new: str):
    def change(tensors):
        return {name.replace(old, new): value for name, value in tensors.items()}

    return change


DAMAGE = {
    "lora_embedding": _rename("self_attn.q_proj.lora_A.weight", "q.lora_embedding_A"),
    "does not have": _rename("layers.0.self_attn", "layers.7.self_attn"),
    "without its": lambda t: {k: v for k, v in t.items() if "layers.1.self_attn.q_proj.lora_B" not in k},
    "does not fit": lambda t: {k: (v[:, :-1] if "lora_A" in k else v) for k, v in t.items()},
    "counterpart": lambda t: t | {"base_model.model.nowhere.weight": np.ones(3, np.float32)},
    "adapts nothing": lambda t: {},
}


@pytest.mark.parametrize("word", DAMAGE)
def test_refuses_tensors(word, base, tmp_path):
    make_adapter(base, tmp_path, target_modules=["q_proj"], r=2)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in DAMAGE[word](load_file(file)).items()}, file)
    with pytest.raises(BadInput, match="embedding" if word == "lora_embedding" else word):
        open_checkpoint(tmp_path)


def test_pickled_adapter_is_refused(base, tmp_path):
    make_adapter(base, tmp_path, target_modules=["q_proj"], r=2)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(BadInput, match="pickled"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "adapter_model.safetensors", "adapter_config.json"])
def test_links_that_lead_out_are_refused(name, base, tmp_path):
    """A downloaded adapter must not hand out files of this machine."""
    adapter = tmp_path / "adapter"
    make_adapter(base, adapter, target_modules=["q_proj"], r=2)
    outside = tmp_path / "secret"
    outside.write_bytes((adapter / name).read_bytes() if (adapter / name).exists() else b"{}")
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).symlink_to(outside)
    with pytest.raises(BadInput, match=f"{name} is a link that leads out"), open_checkpoint(adapter) as merged:
        merged.companions()


def test_an_adapter_in_the_hubs_cache_links_to_its_blobs(base, tmp_path):
    adapter = tmp_path / "models--org--lora" / "snapshots" / "abc"
    make_adapter(base, adapter, target_modules=["q_proj"], r=2)
    (adapter / "tokenizer.json").write_text("{}")
    blobs = tmp_path / "models--org--lora" / "blobs"
    blobs.mkdir()
    for file in list(adapter.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    with open_checkpoint(adapter) as merged:
        assert {c.name: c.read() for c in merged.companions()}["tokenizer.json"] == b"{}"
        assert merged.read("model.layers.0.self_attn.q_proj.weight").any()


@pytest.mark.parametrize("dora", [False, True])
def test_row_groups_read_their_own_rows_and_hold_what_they_say(dora, tmp_path):
    """Any rows are those of the whole, bit for bit, and 20 groups read the base once and the adapter 20 times at most."""
    import tracemalloc

    rng = np.random.default_rng(7)
    name, rows, width, rank = "model.layers.0.mlp.up_proj", 1003, 512, 3
    (tmp_path / "b").mkdir()
    save_file(
        {f"{name}.weight": rng.normal(size=(rows, width)).astype(np.float32)}, tmp_path / "b" / "model.safetensors"
    )
    (tmp_path / "b" / "config.json").write_text('{"model_type": "llama"}')
    parts = {"lora_A.weight": (rank, width), "lora_B.weight": (rows, rank)} | (
        {"lora_magnitude_vector": (rows,)} if dora else {}
    )
    (tmp_path / "a").mkdir()
    save_file({f"base_model.model.{name}.{key}": rng.normal(size=shape).astype(np.float32) for key, shape in parts.items()},
              tmp_path / "a" / "adapter_model.safetensors")  # fmt: skip
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 5,
        "use_dora": dora,
        "base_model_name_or_path": str(tmp_path / "b"),
    }
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
    with open_checkpoint(tmp_path / "a") as merged:
        whole = merged.read(f"{name}.weight")
        base, inner = merged.base, merged.base.read
        taken = []
        base.read = lambda *words: taken.append(inner(*words)) or taken[-1]
        groups = [slice(at, min(at + 51, rows)) for at in range(0, rows, 51)]
        np.testing.assert_array_equal(np.concatenate([merged.read(f"{name}.weight", g) for g in groups]), whole)
        assert sum(part.nbytes for part in taken) == whole.nbytes
        for rows_asked in (slice(5, 5), slice(127, 129), slice(-3, None)):
            np.testing.assert_array_equal(merged.read(f"{name}.weight", rows_asked), whole[rows_asked])
        taken.clear()
        for asked in (slice(200, 700), None):
            tracemalloc.start()
            nbytes = merged.read(f"{name}.weight", asked).nbytes
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            taken.clear()
            assert 0.5 * peak < merged.read_memory(f"{name}.weight", nbytes) < 3 * peak
            assert peak <= merged.read_memory(f"{name}.weight", nbytes) + 20_000
