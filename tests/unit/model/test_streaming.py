import copy

import numpy as np
import pytest
import torch

from moeforge.checkpoint import open_checkpoint
from moeforge.model.build import ffn_modules, is_sparse
from moeforge.model.streaming import StreamedModel, ffn_calls, ffn_output
from moeforge.testing.models import tiny_dense


def batches(seed: int, *shapes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 199, shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_streamed_logits_are_the_stock_models(saved, kind, tie):
    model, directory = saved(kind, tie_word_embeddings=tie)
    with open_checkpoint(str(directory)) as checkpoint:
        streamed = StreamedModel(checkpoint)
        # longer than the tiny windows, of two shapes
        for state in streamed.run(batches(1, (2, 19), (1, 7))):
            with torch.no_grad():
                wanted = model(state.ids).logits
            found = streamed.logits(state)
            assert found.shape == wanted.shape
            assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["llama", "mixtral", "granitemoeshared"])
def test_only_the_running_layer_holds_weights(saved, kind):
    _, directory = saved(kind)
    with open_checkpoint(str(directory)) as checkpoint:
        streamed = StreamedModel(checkpoint)
        held = []

        def look(index, layer, states):
            names = {n for n, p in streamed.module.named_parameters() if p.device.type != "meta"}
            held.append((index, names))

        states = streamed.run(batches(2, (1, 5)), look)
        streamed.logits(states[0])
    for index, names in held:
        assert names and all(name.startswith(f"model.layers.{index}.") for name in names)
    assert all(p.device.type == "meta" for p in streamed.module.parameters())


def test_each_tensor_is_read_once_for_any_number_of_batches(saved, monkeypatch):
    _, directory = saved("mixtral")
    with open_checkpoint(str(directory)) as checkpoint:
        reads = []
        original = checkpoint.read
        monkeypatch.setattr(checkpoint, "read", lambda name, rows=None: (reads.append(name), original(name, rows))[1])
        StreamedModel(checkpoint).run(batches(3, (1, 5), (2, 6), (1, 9)))
    layers = [name for name in reads if ".layers." in name]
    assert len(layers) == len(set(layers)) == sum(".layers." in name for name in checkpoint.tensors)


def test_router_input_is_the_normed_state_after_attention(saved):
    model, directory = saved("llama")
    seen = []
    layer = model.model.layers[1]
    handle = layer.post_attention_layernorm.register_forward_hook(lambda _, __, out: seen.append(out))
    ids = batches(4, (2, 11))[0]
    with torch.no_grad():
        model(ids)
    handle.remove()
    with open_checkpoint(str(directory)) as checkpoint:
        streamed = StreamedModel(checkpoint)
        (state,) = streamed.start([ids])
        with streamed.layer(0) as first:
            streamed.advance(state, first)
        with streamed.layer(1) as second:
            ((found, answer),) = ffn_calls(second, lambda: streamed.advance(state, second))
    assert (found - seen[0]).abs().max() <= 1e-6 * seen[0].abs().max()
    with torch.no_grad():
        wanted = layer.mlp(seen[0])
    assert (answer - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_shared_and_sparse_parts_are_summed(saved):
    model, _ = saved("granitemoeshared")
    layer = model.model.layers[0]
    x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = layer.shared_mlp(x) + layer.block_sparse_moe(x)
        assert torch.allclose(ffn_output(layer, x), wanted, atol=1e-6)
        ((given, answer),) = ffn_calls(layer, lambda: ffn_output(layer, x))
        assert given is x and torch.allclose(answer, wanted, atol=1e-6)
    assert set(ffn_modules(layer)) == {"shared_mlp", "block_sparse_moe"}
    assert is_sparse(ffn_modules(layer))
    assert not is_sparse(ffn_modules(saved("llama")[0].model.layers[0]))


def test_a_half_finished_state_has_no_logits(saved):
    _, directory = saved("llama")
    with open_checkpoint(str(directory)) as checkpoint:
        streamed = StreamedModel(checkpoint)
        (state,) = streamed.start(batches(6, (1, 4)))
        with pytest.raises(ValueError, match="0 of 3"):
            streamed.logits(state)


def test_bfloat16_weights_are_read_as_they_are(saved, tmp_path):
    from transformers import AutoModelForCausalLM

    model, _ = saved("qwen3_moe")
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = batches(7, (1, 9))[0]
    with open_checkpoint(str(tmp_path)) as checkpoint:
        streamed = StreamedModel(checkpoint)
        (state,) = streamed.run([ids])
        with torch.no_grad():
            wanted = rounded(ids).logits
        assert (streamed.logits(state) - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert np.isfinite(wanted.numpy()).all()


@pytest.mark.parametrize(
    ("family", "config"),
    [("gpt2", {}), ("gpt_neox", {}), ("phi", {}), ("falcon", {}), ("falcon", {"alibi": True, "parallel_attn": False})],
)
def test_layers_that_take_arguments_by_position_or_answer_with_tuples(family, config, tmp_path):
    model, _ = tiny_dense(family, **config)
    model.save_pretrained(tmp_path)
    with open_checkpoint(str(tmp_path)) as checkpoint:
        streamed = StreamedModel(checkpoint)
        (state,) = streamed.run(batches(8, (2, 19)))
        with torch.no_grad():
            wanted = model(state.ids).logits
        for rows in (slice(None), slice(3, 7)):
            assert (streamed.logits(state, rows) - wanted[:, rows]).abs().max() <= 1e-6 * wanted.abs().max()
