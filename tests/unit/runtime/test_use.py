"""A model with mixtures is used as the dense one is: generation, training, adapters, copies, compilation."""

import copy

import peft
import pytest
import torch
from torch import nn

import moeforge
from moeforge.errors import BadInput, UsageProblem
from moeforge.mixture.config import ExpertsConfig, MixtureConfig, RouterConfig
from moeforge.mixture.experts import KINDS
from moeforge.model.config import MoeforgeConfig
from moeforge.model.runtime import MoeforgeForCausalLM

from .conftest import answer, auto_of, config_of, dense, inputs_of, mixed

DECODERS = ["llama", "gemma2", "gpt2", "falcon"]


def prompts(pad=3):
    """Two prompts, and the same behind `pad` tokens of padding with their mask."""
    ids = inputs_of("llama")["input_ids"]
    padded = torch.cat([torch.zeros(len(ids), pad, dtype=torch.long), ids], 1)
    return ids, padded, (padded != 0).long()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", DECODERS)
def test_generation_is_the_same_with_and_without_cache_and_padding(family, beams):
    model = mixed(family, scatter=0.1)
    ids, padded, mask = prompts()
    how = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    found = model.generate(ids, **how)
    assert torch.equal(found, model.generate(ids, use_cache=False, **how))
    assert torch.equal(found, model.generate(padded, attention_mask=mask, **how)[:, 3:])


@pytest.mark.parametrize("family", DECODERS)
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model = mixed(family, scatter=0.1).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _, padded, mask = prompts()
    found = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model(input_ids=padded, attention_mask=mask, labels=padded).loss.backward()
        found.append({name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None})
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys() and any("router" in name for name in plain)
    for name, wanted in plain.items():
        torch.testing.assert_close(checkpointed[name], wanted, rtol=1e-5, atol=1e-7)


def test_padding_goes_to_no_expert_and_decoding_sees_its_tokens():
    model = mixed("llama", scatter=0.1)
    _, padded, mask = prompts()
    with model.mixture_context.record() as seen:
        model(input_ids=padded, attention_mask=mask)
    assert {int(routing.pairs.offsets[-1]) for routing in seen.values()} == {int(mask.sum()) * 2}
    cache = model(input_ids=padded, attention_mask=mask).past_key_values
    longer = torch.cat([mask, mask[:, -1:]], 1)
    with model.mixture_context.record() as seen:
        model(input_ids=padded[:, -1:], attention_mask=longer, past_key_values=cache)
    assert {int(routing.pairs.offsets[-1]) for routing in seen.values()} == {2 * len(mask)}


def test_labels_reach_the_routers_and_not_the_dense_model():
    experts = ExpertsConfig(count=4)
    model = mixed("llama", MixtureConfig(experts=experts, router=RouterConfig(top_k=1, by_label=(1, 3))))
    ids, *_ = prompts()
    labels = torch.arange(ids.numel()).reshape(ids.shape) % 2
    with model.mixture_context.record() as seen:
        model(input_ids=ids, mixture_labels=labels)
    for routing in seen.values():
        assert int(routing.pairs.counts()[0]) == int((labels == 0).sum())


def test_a_copy_is_independent():
    model = mixed("llama", scatter=0.1)
    other = copy.deepcopy(model)
    assert other.mixture_context is not model.mixture_context
    for mount, (_, layer) in other.mixtures.items():
        assert layer is other.get_submodule(mount) and layer.context is other.mixture_context
    before = answer(model, **inputs_of("llama"))
    with torch.no_grad():
        for value in other.parameters():
            value.zero_()
    assert torch.equal(answer(model, **inputs_of("llama")), before)
    _, padded, mask = prompts()
    other(input_ids=padded, attention_mask=mask)
    assert model.mixture_context.real is None, "the mask of one model's batch is not the other's"


def test_adapters_train_on_attention():
    model = peft.get_peft_model(mixed("llama", scatter=0.1), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    ids = inputs_of("llama")["input_ids"]
    before = {name: value.clone() for name, value in model.named_parameters()}
    steps = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1.0)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)


def test_more_words():
    model = mixed("gpt2")
    model.resize_token_embeddings(101)
    assert model.config.vocab_size == model.config.base_config.vocab_size == 101
    assert answer(model, **inputs_of("gpt2")).shape[-1] == 101


def test_no_graph_breaks():
    model = mixed("llama", scatter=0.1)
    ids, padded, mask = prompts()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
    found = compiled(input_ids=padded, attention_mask=mask, labels=padded).loss
    torch.testing.assert_close(found, model(input_ids=padded, attention_mask=mask, labels=padded).loss)
    _, layer = next(iter(model.mixtures.values()))
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_a_config_that_says_what_nobody_knows_is_refused():
    config = mixed("llama").config.to_dict()
    with pytest.raises(BadInput, match="unknown key 'mixtrues'"):
        MoeforgeConfig.from_dict({**config, "mixtrues": []})
    with pytest.raises(BadInput, match="base_config = None: expected an object"):
        MoeforgeConfig.from_dict({**config, "base_config": None})
    with pytest.raises(BadInput, match="dense model"):
        MoeforgeConfig.from_dict({**config, "base_config": config})
    entry = {**config["mixtures"][0], "layers": [0, 9]}
    with pytest.raises(BadInput, match="layer 9 does not exist"):
        MoeforgeForCausalLM(MoeforgeConfig.from_dict({**config, "mixtures": [entry]}))
    with pytest.raises(BadInput, match="would stand in one place"):
        MoeforgeForCausalLM(MoeforgeConfig.from_dict({**config, "mixtures": config["mixtures"] * 2}))
    entry = {**config["mixtures"][0], "experts": {**config["mixtures"][0]["experts"], "type": "ffm"}}
    with pytest.raises(UsageProblem, match="no type of experts 'ffm'"):
        MoeforgeForCausalLM(MoeforgeConfig.from_dict({**config, "mixtures": [entry]}))


def test_settings_of_the_dense_model_are_read_and_changed_where_it_looks():
    config = mixed("gpt2").config
    assert (config.hidden_size, config.n_layer, config.get_text_config().num_hidden_layers) == (32, 2, 2)
    config.use_cache = False
    config.hidden_size = 40
    assert config.base_config.use_cache is False and config.base_config.n_embd == 40
    assert config.num_labels == config.base_config.num_labels


def test_a_new_model_starts_at_random():
    config = MoeforgeConfig(config_of("gpt2"), mixed("gpt2").config.mixtures)
    torch.manual_seed(0)
    model = auto_of("gpt2").from_config(config)
    assert isinstance(model, MoeforgeForCausalLM)
    for _, layer in model.mixtures.values():
        stds = layer.experts.up_proj.std((1, 2))
        assert bool((stds > 0.01).all()) and bool((stds < 0.03).all())
        assert not torch.equal(layer.experts.up_proj[0], layer.experts.up_proj[1])
    assert torch.isfinite(answer(model.eval(), **inputs_of("gpt2"))).all()


def test_mixing_refuses_what_it_cannot_mean():
    with pytest.raises(BadInput, match="has mixtures already"):
        moeforge.mix(mixed("llama"), [MixtureConfig()])
    wide = ExpertsConfig(count=4, width=50, activation="silu", gated=True, bias=True)
    with pytest.raises(BadInput, match=r"copies of .* are \[88, 32\], an expert has \[100, 32\]"):
        moeforge.mix(dense("llama"), [MixtureConfig(experts=wide)])
    with pytest.raises(BadInput, match=r"gated = true.*has the linear maps down, up"):
        moeforge.mix(dense("gpt2"), [MixtureConfig(experts=wide)])


def test_packages_provide_types_of_experts(monkeypatch):
    from moeforge import registry

    kind = registry.load_object(KINDS["ffn"])
    monkeypatch.delitem(KINDS, "ffn")
    entry = registry.Entry(registry.MIXTURES, "ffn", f"{kind.__module__}:{kind.__qualname__}", "moeforge-foo")
    monkeypatch.setattr(registry, "_third_party", lambda: (entry,))
    assert answer(mixed("llama"), **inputs_of("llama")).shape == (2, 9, 97)
    broken = registry.Entry(registry.MIXTURES, "ffn", "torch.nn:Linear", "moeforge-foo")
    monkeypatch.setattr(registry, "_third_party", lambda: (broken,))
    with pytest.raises(UsageProblem, match="Linear is no kind of experts"):
        mixed("llama")
