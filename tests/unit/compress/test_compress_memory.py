"""The memory that a plan foresees, against what a run of the real command takes."""

import json

import pytest
from transformers import AutoConfig

from moeforge.testing import command
from moeforge.testing.models import SIZES, tiny, tiny_tokenizer

MARGIN = 1.35
"""Libraries differ from machine to machine; a plan that is further off than this is of little use."""
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 40_000, "max_position_embeddings": 1024}
WAYS = {
    "nf4": ("llama", ("--method", "nf4", "--no-eval")),
    "int8": ("qwen3_moe", ("--method", "int8", "--no-eval")),
    "nf4, measured": ("qwen3_moe", ("--method", "nf4", "--eval-tokens", 2048)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_stays_within_its_plan(way, tmp_path):
    kind, words = WAYS[way]
    config = AutoConfig.for_model(
        kind,
        **{**SIZES, **WIDE, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    )
    model, _ = tiny(config)
    model.bfloat16().save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    done = command.run("compress", tmp_path / "source", *words, "-o", tmp_path / "out", check=True)
    manifest = json.loads((done.path / "moeforge.json").read_text())
    peak, facts = manifest["timings"]["peak_rss_bytes"], manifest["facts"]
    assert peak <= facts["peak_memory_bytes"] == max(facts["peak_memory_by_phase_bytes"].values())
    assert facts["peak_memory_bytes"] < MARGIN * peak + 20e6
