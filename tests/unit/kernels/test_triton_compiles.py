"""Every Triton kernel compiles to machine code for Ampere and Hopper; no GPU is needed for that, and the interpreter forgives more."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
INDEX = {"Expert": "i32", "Row": "i32", "Offsets": "i32", "Token": "i64", "ByToken": "i64", "Lengths": "i64", "Index": "i64", "Order": "i64",
         "Before": "i32", "Counts": "i32", "Real": "i8", "Ends": "i64"}  # fmt: skip
FLOAT32 = {"Weight", "ToWeight", "Dots", "Scale", "Share", "LowDown", "ToLowGate", "ToLowUp", "Alone"}
DATA = {
    "A",
    "B",
    "W",
    "X",
    "Bias",
    "Out",
    "Pre",
    "Grad",
    "ToPre",
    "Hidden",
    "Total",
    "Rows",
    "Y",
    "ToY",
    "Up",
    "Down",
    "Logits",
    "Gate",
    "OutGate",
    "OutUp",
}
UNIT = {"a_depth", "w_depth", "grad_depth", "a_column", "b_column", "x_column", "grad_column", "column"}
DELTAS = {"LowGate", "LowUp", "BGate", "BUp", "ADown", "GradLow", "Hidden", "ToGate", "ToUp"}


def shared(kernel, dtype, capability, warps, stages, *, deltas=None, **constants):
    """Bytes of shared memory that the compiled program takes; pointers and strides aligned, inner strides 1, as they are at run time.
    `deltas`: another type than `dtype` for what LoRA's deltas make. A pointer that is None is a constant, as it is at run time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, fixed, aligned = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants or name in UNIT:
            signature[name], fixed[(at,)] = "constexpr", constants.get(name, 1)
            continue
        kind = INDEX.get(name) or ("fp32" if name in FLOAT32 else dtype if name in DATA else None)
        if name in DELTAS:
            kind = deltas or dtype
        signature[name] = "i32" if kind is None else f"*{kind}"
        aligned[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=aligned)
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )
    assert made.asm["cubin"]
    return made.metadata.shared


def main(capability, limit):
    import torch

    from moeforge_kernels import tuning
    from moeforge_kernels.combine import triton as combine
    from moeforge_kernels.expert_ffn import hidden
    from moeforge_kernels.expert_gemv import triton as gemv
    from moeforge_kernels.grouped_gemm import gram, product, tiles
    from moeforge_kernels.routing import triton as routing

    shape = tuning.Shape(4096, 4096, 4096)
    for dtype, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for name, kernel, more in (
            (
                "product",
                product._product,
                dict(GATHER=True, BIAS=True, ACT="identity", GATED=False, SAVE=False, CLEAR=True),
            ),
            ("gated", product._product, dict(GATHER=True, BIAS=True, ACT="gelu", GATED=True, SAVE=True, CLEAR=False)),
            ("hidden", hidden._hidden, dict(ACT="gelu_tanh", GATED=True)),
            ("gram", gram._gram, dict(GATHER_A=False, GATHER_B=True, SUM=False)),
        ):
            blocks = tuning.rule(name, shape, kind)
            depth = "ROWS" if name == "gram" else "K"
            sizes = {"M": blocks.m, "N": blocks.n, depth: blocks.k}
            took = shared(kernel, dtype, capability, blocks.warps, blocks.stages, **more, **sizes)
            one = (blocks.m + blocks.n * (2 if name == "gated" else 1)) * blocks.k * kind.itemsize
            print(capability, dtype, name, blocks, took, took / one)
            assert 2 * one <= took <= limit, (
                f"{name} {dtype}: {took} bytes of shared memory; a stage takes {one}, two at least are kept in flight, the device has {limit}"
            )
        shared(combine._sum, dtype, capability, 4, 3, WEIGHTED=True, SLOTS=0, N=1024)
        shared(combine._spread, dtype, capability, 4, 3, NEEDS_Y=True, N=1024)
        shared(gemv._up, dtype, capability, 4, 3, ACT="silu", GATED=True, BIAS=True, N=gemv.ROWS, K=gemv.DEPTH)
        shared(gemv._down, dtype, capability, 4, 3, SLOTS=8, BIAS=True, N=gemv.ROWS, K=gemv.DEPTH)
        lora(dtype, capability, limit)
        shared(
            routing._choose,
            dtype,
            capability,
            4,
            3,
            SOFTMAX=True,
            FIRST=False,
            BIAS=True,
            MASK=True,
            SLOTS=8,
            T=32,
            E=128,
        )
    shared(tiles._place, "bf16", capability, 4, 3, SIZE=128, WIDE=256, PROGRAM=32)
    shared(routing._place, "bf16", capability, 4, 3, SLOTS=8, T=32, E=128)


def lora(dtype, capability, limit):
    """The kernels of lora_ffn: every map and the largest rank; only what is left of them where maps are absent and nobody asks."""
    from moeforge_kernels.lora_ffn import RANK_BYTES, mixing, rows
    from moeforge_kernels.lora_ffn import triton as lora_ffn

    other = {"bf16": "fp32", "fp32": "bf16"}[dtype]
    ones = dict.fromkeys(("r", "pairs", "experts"), 1)  # an integer that is 1 is a constant too
    tile = dict(ACT="gelu_tanh", M=lora_ffn.TALL, N=lora_ffn.WIDE)
    largest = RANK_BYTES // (2 if dtype == "bf16" else 4)
    for kernel in (rows.forward, rows.backward):
        took = shared(kernel, dtype, capability, 8, 3, R=largest, **tile)
        assert took <= limit, f"{kernel.__name__} {dtype}: {took} bytes of shared memory, the device has {limit}"
        few = {
            n: None
            for n in ("Gate", "LowGate", "BGate", "LowUp", "BUp", "ToLowGate", "ToLowUp")
            if n in kernel.arg_names
        }
        shared(kernel, dtype, capability, 8, 3, R=16, **tile, **few)
        shared(kernel, dtype, capability, 8, 3, R=16, ADown=None, deltas=other, **tile, **ones)
    slots = dict(ACT="silu", N=lora_ffn.COLUMNS, SLOTS=2, Ends=None, Share=None, Gate=None)
    shared(mixing.forward, dtype, capability, 4, 3, **slots)
    shared(mixing.backward, dtype, capability, 4, 3, OutUp=None, OutGate=None, Alone=None, **slots)
    for kernel in (mixing.forward, mixing.backward):
        shared(kernel, dtype, capability, 4, 3, ACT="silu", N=lora_ffn.COLUMNS, SLOTS=0, deltas=other)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "limit"), [(80, 163 * 1024), (90, 227 * 1024)])
def test_every_kernel_compiles_and_its_pipeline_fits(capability, limit, tmp_path):
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, inspect.getfile(main), str(capability), str(limit)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
