"""Calibration: the fits, the file, and one real measurement."""

import dataclasses
import json
import random

import pytest

from moeforge.errors import BadInput, MachineLacks, UsageProblem
from moeforge_plan import local, probe

RAW = {
    "title": "a machine", "ranks": 2, "backend": "gloo", "dtype": "float32", "torch": "2", "memory_gb": 12.0, "copy_gbs": 9.0,
    "matmul": {"tflops": 0.2, "half_rows": 30.0},
    "all_gather": {"alpha_s": 2e-4, "beta_gbs": 0.8}, "all_to_all": {"alpha_s": 1e-4, "beta_gbs": 1.5},
}  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_latency_and_bandwidth_are_found_again(seed):
    r = random.Random(seed)
    alpha, beta = 10 ** r.uniform(-6, -3), 10 ** r.uniform(8, 11)
    sizes = [10**5, 10**7, 10**9]
    found = probe.line({size: alpha + size / beta for size in sizes})
    assert (found["alpha_s"], found["beta_gbs"]) == pytest.approx((alpha, beta / 1e9), rel=1e-6)
    noisy = probe.line({size: (alpha + size / beta) * r.uniform(0.95, 1.05) for size in sizes})
    assert noisy["beta_gbs"] == pytest.approx(beta / 1e9, rel=0.3)


def test_a_latency_below_zero_is_none():
    found = probe.line({100: 0.9e-7, 1000: 1.05e-6, 10000: 1.2e-5})
    assert found["alpha_s"] == 0.0
    assert found["beta_gbs"] == pytest.approx(1.0, rel=0.2)


def test_times_that_shrink_with_size_still_give_a_bandwidth():
    first, slope = probe.fit([(1, 3.0), (2, 2.0), (4, 1.0)])
    assert first == 0.0
    assert slope > 0


def test_peak_and_half_speed_are_found_again():
    side, peak, half = 1024, 0.3e12, 40.0
    seconds = {rows: 2 * rows * side * side / (peak * rows / (rows + half)) for rows in (16, 64, 256, 1024)}
    found = probe.half_speed(seconds, side)
    assert (found["tflops"], found["half_rows"]) == pytest.approx((0.3, 40.0), rel=1e-6)


def test_the_slower_collective_is_the_link():
    gpu = local.from_raw(RAW)
    assert (gpu.link, gpu.network, gpu.link_alpha, gpu.node, gpu.memory) == (0.8, 0.8, 2e-4, 2, 12.0)
    assert (gpu.efficiency, gpu.link_efficiency, gpu.small_rows) == (1.0, 1.0, 30.0)


def test_what_was_measured_is_used(ask, write, tmp_path):
    kept = local.place(tmp_path / "home")
    kept.parent.mkdir()
    body = {"schema": 1, "facts": local.facts(), "hardware": dataclasses.asdict(local.from_raw(RAW)), "measured": RAW}
    kept.write_text(json.dumps(body))
    model = write(hidden_size=256, num_attention_heads=8, num_hidden_layers=4, intermediate_size=512, vocab_size=1000)
    data = ask(model, gpus=2, gpu="local", global_batch=4, seq=512).data
    assert (data["gpu"]["name"], data["gpu"]["tflops"], data["memory_budget_bytes"]) == ("local", 0.2, 12e9)
    assert data["notes"] == []
    wide = ask(model, gpus=4, gpu="local", global_batch=4, seq=512)
    assert "between machines 0.8 GB/s are assumed" in wide.text
    assert ask(model, gpus=4, gpu="local", global_batch=4, seq=512, network=0.1).data["notes"] == []


def test_another_machine_has_another_file(monkeypatch, tmp_path):
    mine = local.place(tmp_path)
    assert local.place(tmp_path) == mine
    changed = {**local.facts(), "gpus": ["another"]}
    monkeypatch.setattr(local, "facts", lambda: changed)
    assert local.place(tmp_path) != mine


@pytest.mark.parametrize(
    "body", ["", "[]", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "hardware": {"tflops": 1}}']
)
def test_a_file_that_is_not_ours_is_named(body, tmp_path):
    place = local.place(tmp_path)
    place.write_text(body)
    with pytest.raises(
        BadInput, match=rf"{place.name}: unreadable calibration: .*run `moeforge plan --calibrate` again"
    ):
        local.stored(tmp_path)


def test_one_gpu_has_no_link(ask, write, tmp_path):
    kept = local.place(tmp_path / "home")
    kept.parent.mkdir()
    raw = {key: value for key, value in RAW.items() if not key.startswith("all_")} | {"ranks": 1}
    kept.write_text(json.dumps({"schema": 1, "hardware": dataclasses.asdict(local.from_raw(raw)), "measured": raw}))
    model = write(hidden_size=256, num_attention_heads=8, num_hidden_layers=4, intermediate_size=512, vocab_size=1000)
    assert ask(model, gpus=1, gpu="local", global_batch=2, seq=256).data["ranked"]
    with pytest.raises(UsageProblem, match="only one GPU was measured here"):
        ask(model, gpus=2, gpu="local")


def test_processes_that_fail_are_told_and_a_signal_is_tried_once_more(monkeypatch, tmp_path, ask):
    tried = []

    def spawn(codes):
        def run(ranks, folder, ctx):
            tried.append(ranks)
            return codes

        return run

    monkeypatch.setattr(probe, "_spawn", spawn([1, 0]))
    with pytest.raises(MachineLacks, match=r"ended with codes \[1, 0\]"):
        ask(calibrate=True)
    assert len(tried) == 1
    monkeypatch.setattr(probe, "_spawn", spawn([-6, 0]))
    with pytest.raises(MachineLacks, match=r"codes \[-6, 0\]"):
        ask(calibrate=True)
    assert len(tried) == 3


@pytest.mark.slow
def test_this_machine_can_be_measured(ask, tmp_path):
    answer = ask(calibrate=True)
    kept = json.loads(local.place(tmp_path / "home").read_text())
    assert kept["hardware"] == answer.data["hardware"]
    measured = answer.data["measured"]
    for name in ("all_to_all", "all_gather"):
        assert len(measured[name]["seconds"]) == 3
        assert measured[name]["beta_gbs"] > 0
    assert measured["matmul"]["tflops"] > 0
    assert local.stored(tmp_path / "home") == local.from_raw(measured)
    assert "used by --gpu local" in answer.text
