"""The kernels on a GPU, beside transformers' grouped_mm and the dense products of the same FLOPs.

    python tests/benchmarks/kernels/gpu.py                      # every shape; forward and backward; bfloat16
    python tests/benchmarks/kernels/gpu.py --shape olmoe --tokens 4096 --json

A row: layer, tokens, routing (uniform, or Zipf with exponent 1: a few experts get most tokens), milliseconds of ours and of the best
peer, their ratio, the share of the dense rate (cuBLAS on one product of each kind with the same FLOPs) or, for a decoding step, of the
copy bandwidth on the bytes of the touched weights, and the peak memory of a step beyond weights and inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from moeforge_kernels.expert_ffn import expert_ffn
from moeforge_kernels.expert_gemv import TOKENS, expert_gemv
from moeforge_kernels.pairs import pairs_from_slots

SHAPES = {  # D, F, E, K
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "olmoe": (2048, 1024, 64, 8),
    "deepseek-v3-like": (7168, 2048, 64, 8),  # a quarter of its 256 experts, as one of four devices holds them
}
COUNTS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096, 16384)


def route(tokens: int, experts: int, active: int, zipf: bool) -> tuple[torch.Tensor, torch.Tensor]:
    share = 1 / torch.arange(1, experts + 1, device="cuda") if zipf else torch.ones(experts, device="cuda")
    index = torch.multinomial(share.expand(tokens, experts), active)
    return index, torch.rand(tokens, active, device="cuda")


def timed(step, repeats: int = 20) -> tuple[float, float]:
    """(median milliseconds, bytes of peak memory beyond what was allocated before)."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    took = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        took.append(begin.elapsed_time(end))
    return statistics.median(took), torch.cuda.max_memory_allocated() - before


def theirs(name: str, up: torch.Tensor, down: torch.Tensor):
    """transformers' own experts function on a stand-in for its module."""
    from transformers.integrations import moe

    module = SimpleNamespace(
        num_experts=len(up), gate_up_proj=up, down_proj=down, has_gate=True, has_bias=False, is_transposed=False, is_concatenated=True,
        has_post_expert_norm=False, _is_expert_parallel=False, act_fn=F.silu, config=None,
    )  # fmt: skip
    module._apply_gate = lambda made: moe._default_apply_gate(module, made)
    function = {"grouped_mm": moe.grouped_mm_experts_forward, "batched_mm": moe.batched_mm_experts_forward}[name]
    return lambda x, index, weight: function(module, x, index, weight)


def ours(up: torch.Tensor, down: torch.Tensor):
    def run(x, index, weight):
        if len(x) <= TOKENS and not torch.is_grad_enabled():
            return expert_gemv(x, index, weight, up, down, activation="silu", backend="triton")
        pairs = pairs_from_slots(index, weight, len(up))
        return expert_ffn(x, pairs, up, down, activation="silu", backend="triton")

    return run


def training(run, x, index, weight, up, down):
    weight = weight.detach().requires_grad_()
    leaves = (x, weight, up, down)
    seed = torch.randn_like(x)
    return lambda: torch.autograd.grad(run(x, index, weight), leaves, seed)


def dense_rate(pairs: int, width: int, ffn: int, dtype: torch.dtype) -> float:
    """FLOPs a second of cuBLAS on the two products of a forward pass, all pairs through one expert."""
    rows = torch.randn(pairs, width, device="cuda", dtype=dtype)
    first = torch.randn(2 * ffn, width, device="cuda", dtype=dtype)
    hidden = torch.randn(pairs, ffn, device="cuda", dtype=dtype)
    second = torch.randn(width, ffn, device="cuda", dtype=dtype)
    ms, _ = timed(lambda: (rows @ first.t(), hidden @ second.t()))
    return 6 * pairs * width * ffn / ms * 1e3


def bandwidth() -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms, _ = timed(lambda: target.copy_(source))
    return 2 * source.numel() / ms * 1e3


def measure(shape: str, tokens: int, zipf: bool, train: bool, dtype: torch.dtype, speed: float) -> dict:
    width, ffn, experts, active = SHAPES[shape]
    torch.manual_seed(0)
    up = torch.randn(experts, 2 * ffn, width, device="cuda", dtype=dtype).mul_(width**-0.5).requires_grad_(train)
    down = torch.randn(experts, width, ffn, device="cuda", dtype=dtype).mul_(ffn**-0.5).requires_grad_(train)
    x = torch.randn(tokens, width, device="cuda", dtype=dtype).requires_grad_(train)
    index, weight = route(tokens, experts, active, zipf)
    contestants = {"moeforge": ours(up, down), "grouped_mm": theirs("grouped_mm", up, down)}
    if tokens <= TOKENS:
        contestants["batched_mm"] = theirs("batched_mm", up, down)
    row: dict = {
        "shape": shape,
        "tokens": tokens,
        "routing": "zipf" if zipf else "uniform",
        "pass": "fwd+bwd" if train else "fwd",
    }
    with torch.set_grad_enabled(train):
        for name, run in contestants.items():
            step = training(run, x, index, weight, up, down) if train else (lambda run=run: run(x, index, weight))
            row[f"{name}_ms"], row[f"{name}_peak_bytes"] = timed(step)
    row["times_best_peer"] = min(row[f"{n}_ms"] for n in contestants if n != "moeforge") / row["moeforge_ms"]
    pairs = tokens * active
    if tokens <= TOKENS and not train:
        touched = len(index.unique()) * 3 * width * ffn * dtype.itemsize
        row["share_of_bandwidth"] = touched / row["moeforge_ms"] * 1e3 / speed
    else:
        rate = dense_rate(pairs, width, ffn, dtype)
        row["share_of_dense"] = 6 * pairs * width * ffn * (3 if train else 1) / row["moeforge_ms"] * 1e3 / rate
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated")
    parser.add_argument("--tokens", action="append", type=int, help="may be repeated")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: torch finds no GPU here; run it where one is", file=sys.stderr)
        return 1
    dtype = getattr(torch, options.dtype)
    speed = bandwidth()
    if not options.json:
        print(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.dtype}, copy {speed / 1e9:.0f} GB/s\n"
        )
    for shape in options.shape or SHAPES:
        for tokens in options.tokens or COUNTS:
            for zipf in (False, True):
                for train in (False, True):
                    row = measure(shape, tokens, zipf, train, dtype, speed)
                    torch.cuda.empty_cache()
                    print(json.dumps(row) if options.json else
                          "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
