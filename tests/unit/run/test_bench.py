"""moeforge bench: a table of this machine."""

import json

import pytest

from moeforge.errors import UsageProblem
from moeforge.options import build
from moeforge.testing.command import run
from moeforge_run.bench import Bench, parse


def test_a_row_an_op_and_backend_with_ratios_to_the_best_peer():
    done = run("bench", "kernels", "--shape", "4x32x16x4x2", "--repeats", "2", "--json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["device"] == "cpu" and data["backward"] is False
    by_op = {}
    for row in data["rows"]:
        assert row["ms"] > 0
        by_op.setdefault(row["op"], {})[row["backend"]] = row
    assert set(by_op) == {"grouped_gemm", "combine", "expert_ffn", "expert_gemv"}
    for found in by_op.values():
        best = min(found[peer]["ms"] for peer in ("torch", "reference"))
        assert all(row["ratio"] == pytest.approx(row["ms"] / best) for row in found.values())


def test_forward_and_backward_as_text():
    done = run("bench", "--shape", "20x32x16x4x2", "--repeats", "1", "--backward", "--dtype", "bfloat16")
    assert done.code == 0, done.err
    assert "bfloat16, forward and backward" in done.out and "20x32x16x4x2  expert_ffn" in done.out
    assert "expert_gemv" not in done.out  # forward only


@pytest.mark.parametrize(("options", "told"), [
    ({"shape": ("3x4",)}, "--shape 3x4: expected five positive numbers"),
    ({"shape": ("3x4x0x2x1",)}, "--shape 3x4x0x2x1: expected five positive numbers"),
    ({"shape": ("3x4x5x2x3",)}, "--shape 3x4x5x2x3: 3 of 2 experts cannot be active"),
    ({"tune": True}, "--tune measures Triton's kernels, which run on a GPU; --device is cpu"),
    ({"what": "disks"}, "bench disks: expected kernels"),
])  # fmt: skip
def test_refusals(options, told):
    with pytest.raises(UsageProblem, match=told):
        build(Bench.Options, options)


def test_a_shape_is_tokens_width_ffn_experts_active():
    assert parse("64x2048x1024x32x8") == (64, 2048, 1024, 32, 8)
