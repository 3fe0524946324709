"""Plain directories, from every kind of source."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.gguf import GGUFCheckpoint
from moeforge.errors import BadInput, UsageProblem
from moeforge.testing.conformance import check_stage
from moeforge.testing.inprocess import plan, run
from moeforge.testing.models import save_tiny
from moeforge.testing.real import smollm2_gguf

SMOL = smollm2_gguf()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3")


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_keeps_every_rule_of_a_stage(to, tiny, tmp_path):
    check_stage("export", tiny, ["--to", to], tmp_path, exact=True)


def test_same_bytes_in_several_files(tiny, tmp_path):
    done = run("export", tiny, tmp_path / "out", to="hf", max_shard_size="60kB")
    assert len(list(done.path.glob("*.safetensors"))) > 2
    with open_checkpoint(tiny) as before, open_checkpoint(done.path) as after:
        assert set(before.tensors) == set(after.tensors)
        for name in before.tensors:
            np.testing.assert_array_equal(after.read(name), before.read(name))


def test_a_narrower_type_rounds_to_nearest(tiny, tmp_path):
    done = run("export", tiny, tmp_path / "out", to="hf", type="bf16")
    assert done.manifest["verdicts"]["exact"] is False
    model, wanted = AutoModelForCausalLM.from_pretrained(done.path), AutoModelForCausalLM.from_pretrained(tiny)
    assert model.dtype == torch.bfloat16
    for (name, got), value in zip(model.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.equal(got, value.to(torch.bfloat16)), name


def test_the_real_gguf_in_full_precision(tmp_path):
    """f32 from a quantised GGUF holds what the codes say, not its bf16 rounding; the default says that it rounds."""
    assert any("Q4_1" in line and "BF16" in line for line in plan("export", SMOL, to="hf").warnings)
    assert not plan("export", SMOL, to="hf", type="f32").warnings
    done = run("export", SMOL, tmp_path / "out", to="hf", type="f32")
    name, rows = "model.layers.7.self_attn.q_proj.weight", slice(64, 128)
    with (
        open_checkpoint(done.path) as made,
        GGUFCheckpoint(SMOL, dtype="F32") as exact,
        GGUFCheckpoint(SMOL) as rounded,
    ):
        np.testing.assert_array_equal(made.read(name, rows), exact.read(name, rows))
        assert not np.array_equal(made.read(name, rows), rounded.read(name, rows).astype(np.float32))
    assert len(AutoTokenizer.from_pretrained(done.path)) == 49152


def test_gguf_of_the_real_model_is_the_same_model(tmp_path):
    """GGUF to GGUF: the tokenizer and config come out as they went in."""
    done = run("export", SMOL, tmp_path / "out", to="gguf")
    with GGUFCheckpoint(SMOL) as before, open_checkpoint(done.path) as after:
        assert after.config == before.config
        assert {c.name: c.read() for c in after.companions()} == {c.name: c.read() for c in before.companions()}
        for name in list(before.tensors)[::17]:
            np.testing.assert_array_equal(after.read(name), before.read(name))


def test_a_compressed_checkpoint_needs_to_be_asked(tiny, tmp_path):
    packed = run("compress", tiny, tmp_path / "nf4", method="nf4", eval=False)
    with pytest.raises(BadInput, match="dequantize"):
        plan("export", packed.path, to="hf")
    done = run("export", packed.path, tmp_path / "out", to="hf", dequantize=True)
    with open_checkpoint(tiny) as before, open_checkpoint(done.path) as after:
        assert set(before.tensors) == set(after.tensors)
        for name in before.tensors:
            change = np.abs(after.read(name) - before.read(name)).max() / np.abs(before.read(name)).max()
            assert change < 0.3, name
            assert ("proj" in name) == (change > 0)


def test_a_dry_pipe_is_planned(tiny, tmp_path):
    from moeforge.pipeline.artifact import Artifact
    from moeforge.pipeline.run import plan_stage
    from moeforge.testing.inprocess import request

    before = plan("export", tiny, to="hf", type="bf16")
    planned = Artifact("plan", "-", verb="export", plan=before.as_json())
    after = plan_stage(request("export", None, {"to": "gguf"}), planned)
    assert after.facts["write_bytes"] == pytest.approx(before.facts["write_bytes"], rel=0.02)
    assert after.payload.name == "model-bf16.gguf"


def test_contradictions_are_usage(tiny):
    with pytest.raises(UsageProblem, match="q8_0"):
        plan("export", tiny, to="hf", type="q8_0")
