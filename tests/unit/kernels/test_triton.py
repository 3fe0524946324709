"""The Triton backends under Triton's interpreter, in a process of their own: it is chosen when the kernels are first imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
OPS = [word for op in ("grouped_gemm", "combine", "expert_ffn", "expert_gemv", "lora_ffn") for word in ("--op", op)]
SCRIPT = ROOT / "tests/benchmarks/kernels/agreement.py"

pytest.importorskip("triton")


def agreement(*arguments, backend="triton", **more):
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "kernels")} | more
    command = [sys.executable, str(SCRIPT), "--backend", backend, "--json", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_the_kernels_agree_with_the_reference_in_float32():
    found = agreement("--dtype", "float32", *OPS)
    assert {row["op"].split(",")[0] for row in found if "error" in row} == {
        "grouped_gemm",
        "combine",
        "expert_ffn",
        "expert_gemv",
        "lora_ffn",
    }
    assert [row for row in found if not row.get("fits") and "refused" not in row] == []
    assert {row["op"].split(",")[0] for row in found if "refused" in row} == {"expert_gemv"}


@pytest.mark.slow
def test_every_activation_and_its_slope():
    found = agreement("--dtype", "float32", "--op", "activation", "--case", "a token an expert")
    assert len(found) >= 9 and [row for row in found if not row.get("fits")] == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_kernels_agree_with_the_reference_in_16_bits(dtype):
    found = agreement(
        "--dtype", dtype, *OPS, "--case", "one expert of seven", "--case", "experts choose", "--case", "views"
    )
    assert len(found) >= 15
    assert [row for row in found if not row.get("fits") and "refused" not in row] == []


@pytest.mark.slow
def test_low_rank_experts_through_the_grouped_product_and_the_sum():
    """The wish makes it an error where an op below would run on anything but its Triton kernels."""
    ops = ("--op", "lora_experts", "--op", "lora_shrink")
    found = agreement("--dtype", "float32", *ops, backend="grouped", MOEFORGE_KERNELS="triton")
    assert {row["op"] for row in found} == {"lora_experts", "lora_experts, one A", "lora_shrink"}
    assert [row for row in found if not row.get("fits")] == []


@pytest.mark.slow
def test_lora_ffn_under_the_interpreter():
    script = Path(__file__).with_name("lora_ffn_interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(script.parent)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout


def test_without_a_gpu_or_the_interpreter_triton_says_so():
    import torch

    from moeforge_kernels.combine import combine
    from moeforge_kernels.pairs import pairs_from_slots

    pairs = pairs_from_slots(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), 1)
    with pytest.raises(
        ValueError, match="backend 'triton' cannot run this: Triton runs on a CPU only under its interpreter"
    ):
        combine(torch.randn(2, 4), pairs, backend="triton")


COMPILED = """
import torch
from moeforge_kernels.expert_ffn import expert_ffn
from moeforge_kernels.pairs import pairs_from_slots

torch.manual_seed(0)
index = torch.rand(20, 4).topk(2).indices
leaves = [t.requires_grad_() for t in (torch.randn(20, 16), torch.rand(20, 2), torch.randn(4, 64, 16), torch.randn(4, 16, 32))]

def run(x, weight, up, down):
    return expert_ffn(x, pairs_from_slots(index, weight, 4), up, down, activation="silu", backend="triton")

plain, compiled = run(*leaves), torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
seed = torch.randn_like(plain)
assert torch.equal(plain, compiled) and plain.abs().max() > 0
for a, b in zip(torch.autograd.grad(plain, leaves, seed), torch.autograd.grad(compiled, leaves, seed), strict=True):
    assert torch.equal(a, b)
"""


LORA = """
import torch
from moeforge_kernels.lora_ffn import lora_ffn, triton
from moeforge_kernels.pairs import pairs_from_slots

torch.manual_seed(0)
triton.COLUMNS = 96  # so that 150 columns take two launches, the first of which cuts them into tiles
index = torch.rand(20, 4).topk(2).indices
shapes = ((20, 150), (20, 150), (40, 5), (40, 5), (4, 150, 5), (4, 150, 5), (4, 5, 150))
leaves = [torch.rand(20, 2).requires_grad_(), *(torch.randn(*shape).requires_grad_() for shape in shapes)]

def run(which, weight, gate, up, low_gate, low_up, b_gate, b_up, a_down):
    pairs = pairs_from_slots(index, weight, 4)
    return lora_ffn(gate, up, low_gate, low_up, pairs, b_gate, b_up, a_down, torch.tensor([0.5, 1, 2, 3]), activation="silu", rest=True, backend=which)

def answers(run, leaves):
    outs = run(*leaves)
    seeds = [torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype) for out in outs]
    return *outs, *torch.autograd.grad(outs, leaves, seeds)

plain = answers(lambda *leaves: run("triton", *leaves), leaves)
compiled = answers(torch.compile(lambda *leaves: run("triton", *leaves), fullgraph=True, backend="aot_eager"), leaves)
true = answers(lambda *leaves: run("reference", *leaves), [leaf.detach().double().requires_grad_() for leaf in leaves])
for one, two, other in zip(plain, compiled, true, strict=True):
    assert torch.equal(one, two) and (one - other).abs().max() <= 1e-5 * other.abs().max() and other.abs().max() > 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [COMPILED, LORA], ids=["expert_ffn", "lora_ffn"])
def test_the_kernels_are_single_nodes_of_a_compiled_graph(script):
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
