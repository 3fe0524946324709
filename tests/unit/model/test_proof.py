import json
import math

import numpy as np
import pytest
import torch

from moeforge.checkpoint import open_checkpoint
from moeforge.errors import BadInput
from moeforge.model import proof
from moeforge.model.proof import Proof, prove, token_batches


@pytest.fixture(scope="module")
def pair(saved, tmp_path_factory):
    """(kind of layout -> dense directory, mixture of four copies made by hand, without the code under test)."""
    from safetensors.numpy import load_file, save_file

    _, dense = saved("llama")
    tensors = load_file(dense / "model.safetensors")
    config = json.loads((dense / "config.json").read_text())
    rng = np.random.default_rng(3)
    made = {}
    for name, value in tensors.items():
        prefix, found, leaf = name.partition(".mlp.")
        if not found:
            made[name] = value
            continue
        new = {"gate_proj.weight": "w1", "up_proj.weight": "w3", "down_proj.weight": "w2"}[leaf]
        for expert in range(4):
            made[f"{prefix}.block_sparse_moe.experts.{expert}.{new}.weight"] = value
        made[f"{prefix}.block_sparse_moe.gate.weight"] = rng.standard_normal((4, 64), dtype=np.float32)
    config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4,
               "num_experts_per_tok": 2, "sliding_window": None}  # fmt: skip

    def write(edit=lambda tensors: None, **changes):
        directory = tmp_path_factory.mktemp("mixture")
        copy = dict(made)
        edit(copy)
        save_file(copy, directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(json.dumps({**config, **changes}))
        return directory

    return dense, write


def compare(dense, mixture, **options) -> Proof:
    with open_checkpoint(str(dense)) as first:
        return prove(first, mixture, **options)


def test_copies_are_the_same_function(pair):
    dense, write = pair
    found = compare(dense, write(), tokens=64, seed=5)
    assert found.exact and found.relative_error <= 1e-6
    assert found.argmax_equal == 1 and found.tokens == 64
    assert abs(found.kl) < 1e-9 and found.first_wrong is None
    assert [layer.sparse for layer in found.layers] == [True] * 3
    assert all(0 < layer.local_error < 1e-6 or layer.local_error == 0 for layer in found.layers)
    assert "same function" in found.summary()
    json.dumps(found.as_json(), allow_nan=False)


def test_figures_are_those_of_the_whole_models(pair):
    """Against stock models in float64, on a mixture that is slightly off."""
    from transformers import AutoModelForCausalLM

    dense, write = pair

    def nudge(tensors):
        name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
        tensors[name] = tensors[name] * np.float32(1.3)

    mixture = write(nudge)
    text = [[3, 5, 8, 13, 21, 34, 55], [2, 4, 8, 16, 32]]
    found = compare(dense, mixture, tokens=32, seed=2, text=text)
    models = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float64) for d in (dense, mixture)]
    models[1].set_experts_implementation("eager")  # the fast one has no float64
    batches = token_batches({}, 199, 32, 2, text)
    with torch.no_grad():
        logits = [[m(ids).logits for ids in batches] for m in models]
    a, b = (torch.cat([x.flatten(0, 1) for x in side]) for side in logits)
    p, q = a.log_softmax(1), b.log_softmax(1)
    kl = (p.exp() * (p - q)).sum(1)
    assert found.relative_error == pytest.approx(float((a - b).abs().max() / a.abs().max()), rel=1e-4)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.kl_max == pytest.approx(float(kl.max()), rel=1e-3)
    assert found.text_kl == pytest.approx(float(kl[32:].mean()), rel=1e-3)
    losses = []
    for side in logits:
        pieces = [torch.nn.functional.cross_entropy(x[0, :-1], torch.tensor(ids[1:]), reduction="sum")
                  for x, ids in zip(side[2:], text, strict=True)]  # fmt: skip
        losses.append(float(sum(pieces)) / 10)
    assert found.cross_entropy == pytest.approx(tuple(losses), rel=1e-5)
    assert found.argmax_equal == pytest.approx(float((a.argmax(1) == b.argmax(1)).double().mean()))
    assert not found.exact and found.finite


def _scale(name, factor):
    def edit(tensors):
        tensors[name] = tensors[name] * np.float32(factor)

    return edit


def test_the_wrong_layer_is_named(pair):
    dense, write = pair
    mixture = write(_scale("model.layers.1.block_sparse_moe.experts.0.w2.weight", 1.001))
    found = compare(dense, mixture, tokens=64)
    assert not found.exact
    assert found.first_wrong.index == 1
    assert found.layers[0].error < 1e-6 and found.layers[1].local_error > 1e-4
    # the last layer's own block is right, only its input is off: the local error says so
    assert found.layers[2].local_error < 1e-6 < found.layers[2].error
    assert "first differing layer 1" in found.summary()


@pytest.mark.parametrize("where", ["model.layers.2.block_sparse_moe.experts.3.w1.weight", "model.norm.weight"])
def test_nan_never_passes(pair, where):
    dense, write = pair

    def poison(tensors):
        tensors[where] = tensors[where].copy()
        tensors[where].flat[0] = np.nan

    found = compare(dense, write(poison), tokens=64, threshold=math.inf)
    assert not found.exact and not found.finite
    assert ("first in layer 2" if "layers.2" in where else "in the logits") in found.summary()
    json.dumps(found.as_json(), allow_nan=False)


def test_nan_in_the_reference_never_passes(pair, other):
    _, write = pair

    def poison(tensors):
        tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = np.nan

    for mixture in (write(), other("llama", poison)):
        found = compare(other("llama", poison), mixture, tokens=16)
        assert not found.exact and not found.finite


def test_an_error_that_drowns_before_the_logits_is_found(pair):
    """Under a huge residual stream a block may be wrong by 1 % without a trace in the logits; it must fail all the same."""
    from safetensors.numpy import load_file, save_file

    dense, write = pair

    def loud(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * np.float32(1e6)

    def loud_and_wrong(tensors):
        loud(tensors)
        _scale("model.layers.2.block_sparse_moe.experts.1.w3.weight", 1.01)(tensors)

    reference = write()
    tensors = load_file(dense / "model.safetensors")
    loud(tensors)
    save_file(tensors, reference / "model.safetensors", {"format": "pt"})
    (reference / "config.json").write_text((dense / "config.json").read_text())
    assert compare(reference, write(loud), tokens=64).exact
    found = compare(reference, write(loud_and_wrong), tokens=64)
    assert found.relative_error < 1e-5 and found.argmax_equal == 1
    assert found.layers[2].local_error > 1e-4
    assert not found.exact


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_in_any_one_batch_is_seen(place):
    good = [torch.ones(3), torch.ones(2), torch.ones(4)]
    bad = [t.clone() for t in good]

    def relative(found, wanted):
        return proof._ratio(*proof._sizes(found, wanted))

    bad[place][1] = math.nan
    assert relative(good, good) == 0
    assert relative(bad, good) == math.inf and relative(good, bad) == math.inf


def test_a_dropped_window_shows(saved, tmp_path):
    import shutil

    _, windowed = saved("mistral", sliding_window=150)
    shutil.copytree(windowed, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    found = compare(windowed, tmp_path, tokens=32)
    assert not found.exact and found.tokens > 150


def test_token_batches():
    plain = token_batches({}, 50, 64, 7)
    assert [b.shape for b in plain] == [(1, 32), (1, 32)]
    again = token_batches({}, 50, 64, 7)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert not torch.equal(plain[0], token_batches({}, 50, 64, 8)[0])
    assert plain[0].min() >= 0 and plain[0].max() < 50
    windowed = token_batches({"sliding_window": 100}, 50, 64, 7)
    assert windowed[2].shape[1] > 100
    assert len(token_batches({"sliding_window": 16}, 50, 64, 7)) == 2
    assert len(token_batches({"sliding_window": 1 << 20}, 50, 64, 7)) == 2
    with pytest.raises(BadInput, match="vocabulary of 50"):
        token_batches({}, 50, 64, 7, [[3, 50]])


def test_different_depths_are_refused(saved):
    _, dense = saved("llama")
    _, deeper = saved("llama", num_hidden_layers=4)
    with pytest.raises(BadInput, match=r"3 layers.*4"):
        compare(dense, deeper)


def test_interruption_is_noticed(pair):
    dense, write = pair

    class Stop(Exception):
        pass

    class Context:
        def check(self):
            raise Stop

    with pytest.raises(Stop):
        compare(dense, write(), ctx=Context())
