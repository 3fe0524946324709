"""Refusals that guard what a user would otherwise find out much later: adapters that do not fit, sources that lead out."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from moeforge.checkpoint import Input, TensorInfo, TensorOp, open_checkpoint
from moeforge.checkpoint.companions import write_companions
from moeforge.checkpoint.tensor import Companion
from moeforge.checkpoint.writer import plan_shards, write_checkpoint
from moeforge.errors import BadInput
from moeforge.testing.models import save_tiny

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), "llama", hidden_size=16, intermediate_size=24, vocab_size=40,
                     tie_word_embeddings=True)  # fmt: skip


@pytest.fixture
def adapter(base, tmp_path):
    rng = np.random.default_rng(3)

    def make(shapes, **settings):
        tensors = {
            f"base_model.model.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
        }
        where = tmp_path / "adapter"
        where.mkdir()
        save_file(tensors, where / "adapter_model.safetensors")
        known = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base), **settings}
        (where / "adapter_config.json").write_text(json.dumps(known))
        return where

    return make


A, B, M = (f"{UP}.lora_{x}" for x in ("A.weight", "B.weight", "magnitude_vector"))
GOOD = {A: (2, 16), B: (24, 2)}


@pytest.mark.parametrize(("shapes", "told"), [
    ({A: (2, 16)}, r"up_proj.lora_A.weight' stands without its '.*lora_B.weight'"),
    (GOOD | {B: (24, 3)}, r"up_proj': B \[24, 3\] A \[2, 16\] does not fit the base's \[24, 16\]"),
    (GOOD | {M: (16,)}, r"lora_magnitude_vector' is \[16\], not one for each row of \[24, 16\]"),
    (GOOD | {"model.norm.weight": (15,)}, r"norm.weight' is \[15\], the base's 'model.norm.weight' \[16\]"),
    (GOOD | {"model.ghost.weight": (15,)}, r"ghost.weight' has no counterpart in the base"),
    (GOOD | {"lm_head.weight": (40, 16)}, "lm_head.weight' was trained apart from the embedding"),
    (GOOD | {"model.embed_tokens.lora_embedding_A": (2, 40)}, "LoRA on an embedding is not merged"),
    ({f"model.ghost.{x}": s for x, s in (("lora_A.weight", (2, 16)), ("lora_B.weight", (24, 2)))}, "adapts 'model.ghost', which the base"),
])  # fmt: skip
def test_an_adapter_that_does_not_fit_its_base(adapter, shapes, told):
    with pytest.raises(BadInput, match=told):
        open_checkpoint(adapter(shapes, use_dora=M in shapes))


def test_a_tensor_that_no_adapter_has(adapter):
    with open_checkpoint(adapter(GOOD)) as merged, pytest.raises(BadInput, match="no tensor 'ghost'"):
        merged.read("ghost")


def test_plans_that_cannot_be_written(base, tmp_path):
    info = TensorInfo("w", "F32", (24, 16))
    with pytest.raises(BadInput, match="two tensors called 'w' would be written"):
        plan_shards([info, info])
    with pytest.raises(BadInput, match="no tensors to write"):
        plan_shards([])
    with open_checkpoint(base) as source:
        one = Input(source, f"{UP}.weight")
        for inputs, told in (
            ((one, one), "a copy has one input, the plan gives 2"),
            ((Input(source, "ghost"),), "no tensor 'ghost'"),
            ((Input(source, one.name, slice(0, 8, 2)),), "only contiguous rows are read"),
            ((Input(source, one.name, slice(0, 8)),), r"'w' is planned as F32 \[24, 16\], but is a copy of"),
        ):
            with pytest.raises(BadInput, match=told):
                write_checkpoint([TensorOp((info,), inputs)], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../out.txt", "/etc/out.txt", "a/../../out.txt", "", "config.json"])
def test_companions_that_lead_out(base, tmp_path, name, monkeypatch):
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    with open_checkpoint(base) as source:
        monkeypatch.setattr(source, "companions", lambda: [Companion(name, data=b"x")])
        with pytest.raises(BadInput, match=r"leads out of the output or replaces config\.json"):
            write_companions(source, out, None)
    assert not list(tmp_path.rglob("*.txt")) and not list(out.iterdir())


def test_a_file_that_no_real_one_is_as_large_as(base, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**34)  # sparse
    with pytest.raises(BadInput, match=r"config\.json has 17179869184 bytes; no real one is that large"):
        open_checkpoint(tmp_path)


def test_a_file_without_tensors(base, tmp_path):
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=r"model\.safetensors holds no tensors"):
        open_checkpoint(tmp_path)
