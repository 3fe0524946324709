import copy
import json
import shutil

import numpy as np
import pytest
import torch

from moeforge.checkpoint import open_checkpoint
from moeforge.errors import BadInput
from moeforge.model.load import load
from moeforge.model.streaming import StreamedModel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_same_state_as_from_pretrained(saved, kind, dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    model, _ = saved(kind)
    # a copy: rounding the shared model would round its rotary frequencies too
    copy.deepcopy(model).to(dtype).save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = load(str(tmp_path))
    wanted, found = stock.state_dict(), ours.state_dict()
    assert found.keys() == wanted.keys()
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in wanted.items()}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    ids = torch.randint(0, 199, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, stock(ids).logits)
    assert not ours.training


def test_tied_weights_are_one_parameter(saved):
    _, directory = saved("llama", tie_word_embeddings=True)
    model = load(str(directory))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    _, directory = saved("llama")
    model = load(str(directory))
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_a_second_copy_of_tied_weights(other):
    def same(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    model = load(str(other("llama", same, tie_word_embeddings=True)))
    assert model.lm_head.weight is model.model.embed_tokens.weight

    def differs(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(1)

    model = load(str(other("llama", differs, tie_word_embeddings=True)))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight + 1)


def test_dtype_and_generation_settings(saved, tmp_path):
    _, source = saved("llama")
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "do_sample": True}))
    model = load(str(tmp_path), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.temperature == 0.3
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(BadInput, match=r"generation_config\.json"):
        load(str(tmp_path))


def test_loaded_model_trains(saved):
    _, directory = saved("mixtral")
    model = load(str(directory))
    ids = torch.arange(12)[None]
    model(ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)


def _drop(name):
    return lambda tensors: tensors.pop(name)


def _rename(old, new):
    def edit(tensors):
        tensors[new] = tensors.pop(old)

    return edit


def _cut(name):
    def edit(tensors):
        tensors[name] = tensors[name][:-1].copy()

    return edit


EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w3.weight"


@pytest.mark.parametrize(
    ("kind", "edit", "told"),
    [
        ("llama", _drop("model.layers.1.mlp.up_proj.weight"), "missing model.layers.1.mlp.up_proj.weight"),
        ("llama", _rename("model.norm.weight", "model.norm.wheight"), "missing model.norm.weight.*unexpected"),
        ("llama", _cut("model.layers.2.self_attn.q_proj.weight"), r"shape \[63, 64\].*\[64, 64\]"),
        ("llama", _drop("lm_head.weight"), "missing lm_head.weight"),
        ("mixtral", _drop(EXPERT.format(3)), r"layers.1.*experts.0.w1.*shape"),
        # the count is right, the numbers are not: 11 has become 12
        ("mixtral", _rename(EXPERT.format(11), EXPERT.format(12)), r"shape"),
        ("mixtral", _cut(EXPERT.format(5)), r"shape"),
        ("mixtral", _drop("model.layers.0.block_sparse_moe.gate.weight"), "missing model.layers.0.mlp.gate.weight"),
        ("mixtral", _rename(EXPERT.format(0), "model.layers.1.block_sparse_moe.shared.w1"), "unexpected"),
    ],
)
def test_wrong_tensors_are_named(other, kind, edit, told):
    directory = other(kind, edit)
    with pytest.raises(BadInput, match=told):
        load(str(directory))
    with open_checkpoint(str(directory)) as checkpoint, pytest.raises(BadInput, match=told):
        StreamedModel(checkpoint)


def _config(saved, tmp_path, **changes):
    _, source = saved("llama")
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "martian", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "martian.*runs no code"),
        ({"num_attention_heads": "four"}, "refused by transformers|does not build"),
        ({"num_hidden_layers": 4}, r"missing model.layers.3"),
        ({"torch_dtype": None, "dtype": "int7"}, "int7"),
        ({"moeforge_compression": ["nf4"]}, "moeforge_compression"),
    ],
)
def test_wrong_configs_are_named(saved, tmp_path, changes, told):
    with pytest.raises(BadInput, match=told):
        load(_config(saved, tmp_path, **changes))


def test_compressed_checkpoints_go_to_their_method(saved, tmp_path, monkeypatch):
    from moeforge import registry

    ref = _config(saved, tmp_path, moeforge_compression={"method": "spy"})
    called = {}

    class Spy:
        def load_model(self, checkpoint, **options):
            called.update(options, ref=checkpoint.ref)
            return "a model"

    entry = registry.Entry("moeforge.compress", "spy", "none:none", "test")
    monkeypatch.setattr(registry, "find", lambda group, name, what: entry)
    monkeypatch.setattr(registry.Entry, "load", lambda self: Spy)
    assert load(ref, dtype="bfloat16") == "a model"
    assert called["dtype"] == "bfloat16" and called["ref"] == ref


def test_more_active_experts_than_there_are_is_refused_by_both_keys(saved, tmp_path):
    _, directory = saved("mixtral")
    shutil.copytree(directory, tmp_path / "wrong")
    config = json.loads((tmp_path / "wrong" / "config.json").read_text())
    config["num_experts_per_tok"] = config["num_local_experts"] + 1
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"num_experts_per_tok = \d+ is more than num_local_experts = \d+"):
        load(str(tmp_path / "wrong"))
