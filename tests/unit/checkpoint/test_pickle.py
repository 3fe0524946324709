"""Pickled weights: refused by default, tensors only on request, code never."""

import json
import pickle

import pytest
import torch

from moeforge.checkpoint import open_checkpoint
from moeforge.errors import BadInput


@pytest.fixture
def pickled(state, save, tmp_path):
    source = save(state, tmp_path / "src")
    (source / "model.safetensors").unlink()
    return source


class Attack:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("modern", [True, False])
def test_the_same_bytes_as_from_safetensors(pickled, state, raw, modern):
    if not modern:  # which holds no float8
        state = {name: tensor for name, tensor in state.items() if tensor.dtype != torch.float8_e4m3fn}
    torch.save(state, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=modern)
    with pytest.raises(BadInput, match=r"pickled .*--allow-pickle"):
        open_checkpoint(pickled)
    with open_checkpoint(pickled, allow_pickle=True) as checkpoint:
        for name, tensor in state.items():
            assert checkpoint.read(name).tobytes() == raw(tensor)
            assert checkpoint.read(name).shape == tuple(tensor.shape)
        assert checkpoint.read("model.embed.weight", slice(3, 9)).tobytes() == raw(state["model.embed.weight"][3:9])
        assert checkpoint.provenance()["format"] == "pickle"
        assert [c.name for c in checkpoint.companions()] == ["tokenizer.json"]


def test_shards_and_views(pickled, state, raw):
    state["model.embed.weight"] = state["model.embed.weight"].T.contiguous().T
    names = list(state)
    placed = {name: f"pytorch_model-{i % 2 + 1:05d}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(placed.values()):
        torch.save({n: state[n] for n in names if placed[n] == file}, pickled / file)
    index = pickled / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    with open_checkpoint(pickled, allow_pickle=True) as checkpoint:
        assert {n: checkpoint.read(n).tobytes() for n in names} == {n: raw(t) for n, t in state.items()}
    index.write_text(json.dumps({"weight_map": {**placed, "ghost": placed[names[0]]}}))
    with pytest.raises(BadInput, match="ghost"):
        open_checkpoint(pickled, allow_pickle=True)
    index.write_text(json.dumps({"weight_map": {**placed, names[0]: placed[names[1]]}}))
    with pytest.raises(BadInput, match=names[0]):
        open_checkpoint(pickled, allow_pickle=True)


def test_code_in_a_pickle_is_never_run(pickled, tmp_path):
    mark = tmp_path / "ran"
    for write in (lambda f: pickle.dump({"a": Attack(mark)}, f), lambda f: torch.save({"a": Attack(mark)}, f)):
        with open(pickled / "pytorch_model.bin", "wb") as file:
            write(file)
        with pytest.raises(BadInput) as caught:
            open_checkpoint(pickled, allow_pickle=True)
        assert str(caught.value).isprintable() and "pytorch_model.bin" in str(caught.value)
        assert not mark.exists()


@pytest.mark.parametrize(
    "held", [[torch.zeros(2)], {"a": 3}, {"a": {"b": torch.zeros(2)}}, {7: torch.zeros(2)}, torch.zeros(3)]
)
def test_what_is_not_named_tensors_is_refused(pickled, held):
    torch.save(held, pickled / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"pytorch_model\.bin"):
        open_checkpoint(pickled, allow_pickle=True)
