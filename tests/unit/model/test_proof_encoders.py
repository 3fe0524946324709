"""Proofs of encoders: padded ids, pixels, heads and bare bodies; what is wrong is found in its layer."""

import math

import pytest
import torch

from moeforge.checkpoint import open_checkpoint
from moeforge.model import encoders
from moeforge.model.proof import prove
from moeforge.model.streaming import StreamedModel
from moeforge.testing.models import tiny_dense

CASES = [("bert", "BertForMaskedLM"), ("bert", "BertModel"), ("bert", "BertForSequenceClassification"), ("roberta", "RobertaForQuestionAnswering"),
         ("vit", "ViTForImageClassification"), ("vit", "ViTModel"), ("dinov2", "Dinov2Model")]  # fmt: skip


def saved(directory, family, head, change=None, **config):
    model, _ = tiny_dense(family, 0, head, **config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if change is not None:
                change(name, value)
    model.save_pretrained(directory)
    return directory


def proof(first, second):
    with open_checkpoint(str(first)) as a, open_checkpoint(str(second)) as b:
        return prove(a, b)


@pytest.mark.parametrize(("family", "head"), CASES)
def test_a_model_is_itself_and_what_comes_out_is_what_transformers_gives(family, head, tmp_path):
    directory = saved(tmp_path / "m", family, head)
    found = proof(directory, directory)
    assert found.exact and found.relative_error == 0
    assert found.compared == ("hidden states" if head.endswith("Model") else "logits")
    assert found.compared in found.summary() or "argmax equal" in found.summary()
    with open_checkpoint(str(directory)) as checkpoint:
        streamed = StreamedModel(checkpoint)
        (given,) = encoders.batches(streamed, 3)
        (state,) = streamed.run([given])
        answers = streamed.outputs(state)
    model = tiny_dense(family, 0, head)[0]
    with torch.no_grad():
        wanted = model(**given)
    assert answers
    for name, value in answers.items():
        assert (value - wanted[name]).abs().max() <= 1e-6 * wanted[name].abs().max(), name


@pytest.mark.parametrize("leaf", ["intermediate.dense.weight", "output.dense.bias", "fc1.weight", "fc2.bias"])
def test_a_wrong_block_is_found_in_its_layer(leaf, tmp_path):
    family, head = ("bert", "BertForMaskedLM") if "dense" in leaf else ("dinov2", "Dinov2ForImageClassification")

    def change(name, value):
        if ".layer.1." in name and name.endswith(leaf) and "attention" not in name:
            value.add_(0.05 * value.std() if value.ndim > 1 else 0.05)
            changed.append(name)

    changed: list[str] = []
    first, second = saved(tmp_path / "a", family, head), saved(tmp_path / "b", family, head, change)
    assert len(changed) == 1
    found = proof(first, second)
    assert not found.exact
    assert found.first_wrong is not None and found.first_wrong.index == 1
    assert [layer.local_error > 1e-4 for layer in found.layers] == [False, True, False]
    assert "first differing layer 1" in found.summary()


def test_another_head_alone_is_another_function(tmp_path):
    def change(name, value):
        if name == "cls.predictions.transform.dense.bias":
            value.add_(0.1)

    found = proof(saved(tmp_path / "a", "bert", None), saved(tmp_path / "b", "bert", None, change))
    assert not found.exact
    assert found.first_wrong is None
    assert found.relative_error > 1e-4


def test_infinities_are_no_function(tmp_path):
    def change(name, value):
        if name.endswith("layer.2.output.dense.bias"):
            value[0] = math.inf

    found = proof(
        saved(tmp_path / "a", "bert", "BertModel", change), saved(tmp_path / "b", "bert", "BertModel", change)
    )
    assert not found.exact and not found.finite


def test_one_sequence_is_padded_and_padding_is_not_compared(tmp_path):
    directory = saved(tmp_path / "m", "bert", "BertModel")
    with open_checkpoint(str(directory)) as checkpoint:
        (given,) = encoders.batches(StreamedModel(checkpoint), 0)
    real = int(given["attention_mask"].sum())
    assert 0 < real < given["attention_mask"].numel()
    found = proof(directory, directory)
    assert found.tokens == real + 2  # the hidden states of real tokens, and what is pooled of each sequence
