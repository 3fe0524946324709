"""The memory that a plan foresees, against what a run of the real command takes; and --max-memory as a limit."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from moeforge.checkpoint.architectures import find
from moeforge.errors import ExitCode, MachineLacks
from moeforge.model import memory
from moeforge.testing import command, inprocess

SIZES = {
    "model_type": "llama",
    "vocab_size": 4000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
MARGIN = 1.35
"""Libraries differ from machine to machine; a plan that is further off than this is of little use."""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A random Llama of 70 MB in float16, and the bytes of its largest tensor."""
    directory, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    family = find("llama")
    (directory / "config.json").write_text(json.dumps(SIZES))
    tensors = {
        part.name: (0.02 * rng.standard_normal(part.shape, np.float32)).astype(np.float16)
        for part in family.locate(family.resolve(SIZES)).values()
    }
    save_file(tensors, directory / "model.safetensors")
    return directory, max(tensor.nbytes for tensor in tensors.values())


WAYS = {
    "copy": ("--experts", 4, "--no-verify"),
    "copy and proof": ("--experts", 4, "--verify"),
    "split": ("--method", "split", "--partition", "kmeans", "--experts", 4, "--no-verify"),
    "stacked and proof": ("--target", "granitemoe", "--experts", 4, "--verify"),
    # one thread: whether the peaks of two coincide, as the plan must assume, is chance
    "stacked": ("--target", "granitemoe", "--experts", 4, "--no-verify", "--workers", 1),
    "noise": ("--method", "noise", "--experts", 4, "--no-verify"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_stays_within_its_plan(way, large, tmp_path):
    """And writing takes less than three times the largest tensor and 300 MB, whatever the size of the model."""
    source, largest = large
    done = command.run("upcycle", source, *WAYS[way], "-o", tmp_path / "out", check=True)
    manifest = json.loads((done.path / "moeforge.json").read_text())
    peak, facts = manifest["timings"]["peak_rss_bytes"], manifest["facts"]
    assert peak <= facts["peak_memory_bytes"] == max(facts["peak_memory_by_phase_bytes"].values())
    assert facts["peak_memory_bytes"] < MARGIN * peak + 20e6
    if "--no-verify" in WAYS[way]:
        written = max(size for name, size in sizes(done.path / "model.safetensors"))
        assert peak < 3 * max(largest, written) + 300e6


def test_two_workers_whose_peaks_coincide_stay_within_the_plan(large, tmp_path):
    words = ("--target", "granitemoe", "--experts", 4, "--no-verify", "--workers", 2)
    done = command.run("upcycle", large[0], *words, "-o", tmp_path / "out", check=True)
    manifest = json.loads((done.path / "moeforge.json").read_text())
    assert manifest["timings"]["peak_rss_bytes"] <= manifest["facts"]["peak_memory_bytes"]


def sizes(file):
    from safetensors import safe_open

    with safe_open(file, "np") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            yield name, int(np.prod(tensors.get_slice(name).get_shape())) * 2


def test_a_limit_is_kept(large, tmp_path):
    """With just enough for one op at a time, the run takes no more."""
    source, _ = large
    limit = 110_000_000
    done = command.run("upcycle", source, "--method", "noise", "--experts", 4, "--no-verify", "--max-memory", limit,
                       "-o", tmp_path / "out", check=True)  # fmt: skip
    manifest = json.loads((done.path / "moeforge.json").read_text())
    assert manifest["facts"]["peak_memory_bytes"] <= limit
    assert manifest["timings"]["peak_rss_bytes"] <= limit


@pytest.mark.parametrize(
    ("limit", "options", "said"),
    [
        (1_000_000, {}, "--max-memory 1 MB is too little: writing takes .* MB at least"),
        (300_000_000, {"verify": True}, "proof takes .* MB at least; --no-verify does without the proof"),
        (80_000_000, {"verify": False, "method": "split", "partition": "kmeans"}, "recipes takes .* MB at least"),
    ],
)
def test_a_limit_that_cannot_be_kept_is_refused(limit, options, said, large, tmp_path):
    source, _ = large
    with pytest.raises(MachineLacks, match=said) as refusal:
        inprocess.run("upcycle", source, tmp_path / "out", max_memory=limit, **options)
    assert refusal.value.exit_code == ExitCode.MACHINE
    assert not (tmp_path / "out.partial").exists()


def test_a_proof_that_does_not_fit_is_not_planned(large):
    source, _ = large
    phases = inprocess.plan("upcycle", source, max_memory=300_000_000).facts["peak_memory_by_phase_bytes"]
    assert set(phases) == {"recipes", "writing"}
    roomy = inprocess.plan("upcycle", source, max_memory=3_000_000_000).facts["peak_memory_by_phase_bytes"]
    assert set(roomy) == {"recipes", "writing", "proof"}
    assert roomy["proof"] > memory.RUNNING


def test_a_limit_above_what_the_machine_has_makes_it_no_larger(large, monkeypatch):
    """A proof that the free memory cannot hold is left out however much --max-memory would allow."""
    source, _ = large
    monkeypatch.setattr("moeforge.model.memory.available_memory", lambda: 600_000_000)
    assert "proof" not in inprocess.plan("upcycle", source).facts["peak_memory_by_phase_bytes"]
    assert "proof" not in inprocess.plan("upcycle", source, max_memory=1 << 50).facts["peak_memory_by_phase_bytes"]
    asked = inprocess.plan("upcycle", source, max_memory=1 << 50, verify=True).facts["peak_memory_by_phase_bytes"]
    assert "proof" in asked


def test_text_costs_what_is_measured_on_it(dense, monkeypatch):
    """Statistics of more tokens and of wider layers take more; a method that needs none has no such phase."""
    from moeforge_upcycle import measure

    monkeypatch.setattr(measure, "has_tokenizer", lambda checkpoint: True)

    def measuring(method, **options):
        phases = inprocess.plan("upcycle", dense("llama"), method, **options).facts["peak_memory_by_phase_bytes"]
        return phases.get("measuring")

    assert measuring("copy") is None
    few = measuring("copy", router_init="kmeans", calibration_tokens=512)
    many = measuring("copy", router_init="kmeans", calibration_tokens=65536)
    # 2 texts: hidden states before and after the layer, and a row of the mask for every token
    assert many - few == 2 * (65536 - 512) * 4 * (2 * 64 + 512) + 8 * 64 * (2048 - 1024)
