"""tune: a result that could not be written is written by the same command, without training again."""

import errno
import json
import os

import pytest
from safetensors.torch import load_file

from moeforge.errors import MachineLacks
from moeforge.testing import inprocess
from moeforge.testing.models import tiny_dense, tiny_tokenizer
from moeforge.train.loop import Loop
from moeforge_tune import write as work


@pytest.mark.parametrize("save_every", [0, 2])
def test_a_full_disk_costs_the_writing_and_not_the_training(tmp_path, monkeypatch, save_every):
    tiny_dense("llama")[0].save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} bottles, " * (i % 5 + 1)}) + "\n" for i in range(40)))
    options = {"data": (str(text),), "steps": 3, "sequence_length": 32, "batch_size": 2, "save_every": save_every}
    options |= {"learning_rate": 1e-2}
    whole = inprocess.run("tune", tmp_path / "dense", tmp_path / "whole", **options)
    assert not list(whole.path.glob("state-*"))

    def full(ops, path, **more):
        (path / "model.safetensors").write_bytes(os.urandom(100))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(work, "write_checkpoint", full)
        with pytest.raises(MachineLacks, match=r"full .* it resumes"):
            inprocess.run("tune", tmp_path / "dense", tmp_path / "made", **options)
    monkeypatch.setattr(Loop, "_update", lambda self: pytest.fail("trained again"))
    made = inprocess.run("tune", tmp_path / "dense", tmp_path / "made", **options)
    found, wanted, source = (
        load_file(place / "model.safetensors") for place in (made.path, whole.path, tmp_path / "dense")
    )
    assert all(found[name].equal(wanted[name]) for name in wanted) and found.keys() == wanted.keys()
    assert not any(found[name].equal(source[name]) for name in source if "mlp" in name)
    assert made.manifest["counts"]["steps"] == 3 and not list(made.path.glob("state-*"))
