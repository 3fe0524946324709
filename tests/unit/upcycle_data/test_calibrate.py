"""Against hooks on the whole stock model in float64."""

import json
import math

import numpy as np
import pytest
import torch

from moeforge.checkpoint import open_checkpoint
from moeforge.errors import BadInput
from moeforge.testing.models import save_tiny
from moeforge_upcycle.calibrate import ACTIVE, FIELDS, calibrate

DOMAINS = [[[1, 5, 9, 44, 8, 3, 77], [1, 6, 6]], [[1, 120, 7, 99]], [[1, 3, 3, 8, 8, 150, 2, 2, 61]]]
PLACES = {"gpt2": ("h", "mlp", "mlp.c_proj"), "falcon": ("h", "mlp", "mlp.dense_4h_to_h"),
          "bert": ("encoder.layer", "intermediate", "output.dense")}  # fmt: skip
"""Model type -> list of layers, what gets the router's input, what leads out; else as in Llama."""


def reference(directory, index):
    """(router inputs [N, D], activations [N, F], labels [N]) of layer `index`, first tokens left out, in float64."""
    import transformers

    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    model = getattr(transformers, name).from_pretrained(directory, dtype=torch.float64).eval()
    layers, ffn, down = PLACES.get(model.config.model_type, ("layers", "mlp", "mlp.down_proj"))
    layer = model.base_model.get_submodule(f"{layers}.{index}")
    inputs, hidden, labels = [], [], []
    layer.get_submodule(ffn).register_forward_pre_hook(lambda _, args: inputs.append(args[0][0, 1:].numpy()))
    layer.get_submodule(down).register_forward_pre_hook(lambda _, args: hidden.append(args[0][0, 1:].numpy()))
    with torch.no_grad():
        for label, texts in enumerate(DOMAINS):
            for ids in texts:
                model(torch.tensor([ids]))
                labels += [label] * (len(ids) - 1)
    return np.concatenate(inputs), np.concatenate(hidden), np.array(labels)


@pytest.fixture(scope="module", params=["llama", "phi3", "olmo2", "cohere2", "gpt2", "falcon", "bert"])
def measured(request, tmp_path_factory):
    directory = save_tiny(tmp_path_factory.mktemp("dense"), request.param)
    with open_checkpoint(str(directory)) as checkpoint:
        return directory, dict(calibrate(checkpoint, [0, 2], FIELDS, DOMAINS, samples=1000))


def close(found, wanted):
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("index", [0, 2])
def test_figures_are_those_of_the_true_router_input(measured, index):
    directory, stats = measured
    x, h, labels = reference(directory, index)
    found = stats[index]
    close(found.activation, np.abs(h).mean(0))
    close(found.gram, x.T @ x)
    close(found.domain_sums, np.stack([x[labels == d].sum(0) for d in range(3)]))
    assert found.domain_counts.tolist() == [8, 3, 8]
    # 1000 samples of 19 tokens: all of them, in order
    close(found.samples, x)
    close(found.activations, h)
    assert np.array_equal(found.labels, labels)
    assert found.samples.dtype == np.float32 and found.activation.dtype == np.float64
    count = math.ceil(ACTIVE * h.shape[1])
    rate = np.zeros(h.shape[1])
    for row in np.abs(h):
        rate[np.argsort(-row)[:count]] += 1
    assert np.abs(found.rate - rate / len(h)).max() <= 1.5 / len(h)  # one tie in rounding
    assert found.rate.sum() == pytest.approx(count)


def test_only_what_was_asked_for(measured):
    directory, _ = measured
    with open_checkpoint(str(directory)) as checkpoint:
        (pair,) = calibrate(checkpoint, [1], {"activation"}, DOMAINS)
    assert pair[0] == 1
    assert {name for name, value in vars(pair[1]).items() if value is not None} == {"activation"}


def test_a_sample_is_spread_over_domains_and_the_same_everywhere(measured):
    directory, _ = measured
    with open_checkpoint(str(directory)) as checkpoint:
        first, again, other = (
            dict(calibrate(checkpoint, [0, 1], {"samples", "activations"}, DOMAINS, samples=9, seed=seed))
            for seed in (1, 1, 2)
        )
    assert np.bincount(first[0].labels).tolist() == [3, 3, 3]
    assert np.array_equal(first[0].labels, first[1].labels)
    assert np.array_equal(first[1].samples, again[1].samples)
    assert not np.array_equal(first[0].samples, other[0].samples)
    x, h, _ = reference(directory, 1)
    rows = [int(np.abs(x - row).sum(1).argmin()) for row in first[1].samples]
    assert len(set(rows)) == 9
    close(first[1].activations, h[rows])


def test_the_pass_ends_after_the_last_layer_asked_for(measured, monkeypatch):
    directory, _ = measured
    with open_checkpoint(str(directory)) as checkpoint:
        read = []
        original = checkpoint.read
        monkeypatch.setattr(checkpoint, "read", lambda name, rows=None: (read.append(name), original(name, rows))[1])
        assert [index for index, _ in calibrate(checkpoint, [0], {"gram"}, DOMAINS)] == [0]
        assert not any("layers.1." in name for name in read)
        read.clear()
        assert list(calibrate(checkpoint, [0], (), DOMAINS)) == [] and not read


def test_refusals(measured, tmp_path):
    directory, _ = measured
    with open_checkpoint(str(directory)) as checkpoint:
        with pytest.raises(ValueError, match="entropy"):
            next(calibrate(checkpoint, [0], {"entropy"}, DOMAINS))
        with pytest.raises(BadInput, match="vocabulary of 199"):
            next(calibrate(checkpoint, [0], {"gram"}, [[[1, 199]]]))
        with pytest.raises(BadInput, match="no calibration text"):
            next(calibrate(checkpoint, [0], {"gram"}, [[[1]], []]))


def test_weights_that_are_not_finite_are_named(tmp_path):
    from safetensors.numpy import load_file, save_file

    save_tiny(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 5] = np.inf
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with (
        open_checkpoint(str(tmp_path)) as checkpoint,
        pytest.raises(BadInput, match=r"layer 1.*activation.*not finite"),
    ):
        list(calibrate(checkpoint, [0, 1], {"activation"}, DOMAINS))


def test_a_mixture_is_not_measured(tmp_path):
    from transformers import MixtralConfig

    from moeforge.testing.models import SIZES, tiny

    tiny(MixtralConfig(**SIZES, num_local_experts=4))[0].save_pretrained(tmp_path)
    with open_checkpoint(str(tmp_path)) as checkpoint, pytest.raises(BadInput, match="holds experts already"):
        next(calibrate(checkpoint, [0], {"gram"}, DOMAINS))
