"""One frozen FFN under LoRA experts, beside plain LoRA and the ways that others run such experts.

    python tests/benchmarks/attach/ffn.py                                          # SmolLM2 and Qwen3-0.6B shapes, a few minutes
    python tests/benchmarks/attach/ffn.py --shapes llama-8b --tokens 4096 --dtype bfloat16 --rounds 3

Rows: ours; PEFT's plain LoRA on gate, up and down at rank r and at k r; the loop over experts of MixLoRA's package (its forward written
down here again: shared gate and up products, one `torch.where` an expert, the down product for each pair, sums in float32); naive experts
(a whole LoRA FFN for each expert on its tokens). Weights are random, routing is a router's own on random inputs. Times are medians over
rounds in which all rows take turns in one process, around the same frozen weights; peak memory is what one forward and backward adds, each
row in a process of its own. Before a call for few tokens other memory is read, so that weights come from there as they do in a model of
many layers. The floor is what the frozen products alone take, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from moeforge.mixture.config import ExpertsConfig, RouterConfig
from moeforge.mixture.experts.base import Place
from moeforge.mixture.experts.lora_ffn import LoraFFNExperts
from moeforge.mixture.layer import MixtureLayer
from moeforge.mixture.router import Router

SHAPES = {"smollm2": (576, 1536), "qwen3-0.6b": (1024, 3072), "llama-8b": (4096, 14336)}
E, K, R, ALPHA = 8, 2, 16, 32
FEW = 16
"""Tokens up to which weights are to come from memory."""
ROWS = ("ours", "peft r", "peft k r", "mixlora loop", "naive", "frozen alone")


ROUTING = {"even": 0.0, "zipf": 1.2, "one-hot": 1e6}
"""How tokens are spread -> s: without what the router sees in a token, expert e would be chosen like (e + 1)^-s."""


@torch.no_grad()
def spread(weight: torch.Tensor, bias: torch.Tensor, routing: str) -> None:
    """Make a router's logits N(-s log(e + 1), 1) on N(0, 1) inputs, the same ones in every row of the benchmark.

    Args:
        weight: [E, D]. bias: [E].
    """
    weight.normal_(std=weight.shape[1] ** -0.5, generator=torch.Generator().manual_seed(2))
    bias.copy_(-ROUTING[routing] * torch.arange(1, E + 1).log())


class Dense(nn.Module):
    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, ffn, bias=False), nn.Linear(width, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def twin(self) -> Dense:
        """Another module around the same linear maps: two copies may differ by several per cent in where they lie in memory."""
        made = copy.copy(self)
        made._modules = dict(self._modules)
        return made


class Loop(nn.Module):
    """MixLoRA 0.2.3's way, or (naive) a whole network for each expert."""

    def __init__(self, dense: Dense, naive: bool, routing: str = "even") -> None:
        super().__init__()
        self.dense, self.naive = dense, naive
        width, dtype = dense.gate_proj.in_features, dense.gate_proj.weight.dtype
        self.router = nn.Linear(width, E, dtype=torch.float32)
        spread(self.router.weight, self.router.bias, routing)
        self.a = nn.ModuleDict(
            {
                n: nn.ModuleList(nn.Linear(m.in_features, R, bias=False, dtype=dtype) for _ in range(E))
                for n, m in dense.named_children()
                if isinstance(m, nn.Linear)
            }
        )
        self.b = nn.ModuleDict(
            {
                n: nn.ModuleList(nn.Linear(R, m.out_features, bias=False, dtype=dtype) for _ in range(E))
                for n, m in dense.named_children()
                if isinstance(m, nn.Linear)
            }
        )

    def adapted(self, name, e, x, base=None):
        made = getattr(self.dense, name)(x) if base is None else base
        return made + ALPHA / R * self.b[name][e](self.a[name][e](x))

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, -2)
        p = F.softmax(self.router(x.float()), -1)
        weight, chosen = torch.topk(p, K)
        weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)
        mask = F.one_hot(chosen, E).permute(2, 1, 0)
        out = torch.zeros(x.shape, dtype=torch.float32)
        gate, up = (None, None) if self.naive else (self.dense.gate_proj(x), self.dense.up_proj(x))
        for e in range(E):
            slot, token = torch.where(mask[e])
            rows = x[token]
            g = self.adapted("gate_proj", e, rows, None if gate is None else gate[token])
            u = self.adapted("up_proj", e, rows, None if up is None else up[token])
            made = self.adapted("down_proj", e, F.silu(g) * u) * weight[token, slot, None]
            out.index_add_(0, token, made.float())
        return out.to(x.dtype).view(shape)


def frozen(width: int, ffn: int, dtype: torch.dtype) -> Dense:
    torch.manual_seed(0)
    return Dense(width, ffn).to(dtype).requires_grad_(False)


def make(row: str, dense: Dense, routing: str = "even") -> nn.Module:
    torch.manual_seed(1)
    width, ffn, dtype = dense.gate_proj.in_features, dense.gate_proj.out_features, dense.gate_proj.weight.dtype
    dense = dense.twin()
    if row == "frozen alone":
        return dense
    if row.startswith("peft"):
        from peft import LoraConfig, get_peft_model

        rank = R * (K if row == "peft k r" else 1)
        made = get_peft_model(
            dense, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["gate_proj", "up_proj", "down_proj"])
        )
        for name, p in made.named_parameters():
            if "lora_" in name:
                p.data = (0.02 * torch.randn(p.shape)).to(dtype)
        return made
    if row in ("mixlora loop", "naive"):
        return Loop(dense, row == "naive", routing)
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    config = ExpertsConfig(type="lora_ffn", count=E, width=ffn, options={"rank": R, "alpha": ALPHA})
    experts = LoraFFNExperts.at(Place(width, width, names), config).to(dtype)
    experts.reset_parameters(0.0)
    for p in experts.parameters():
        nn.init.normal_(p, std=0.02)
    experts.adopt({role: (name, getattr(dense, name)) for role, name in names.items()}, "silu")
    router = Router(RouterConfig(top_k=K, logit_bias=True), width, E)
    spread(router.weight, router.bias, routing)
    return MixtureLayer(router, experts)


COLD = torch.ones(1 << 26)
"""256 MB: more than caches hold."""


def step(module: nn.Module, x, upstream, backward: bool) -> float:
    if len(x) <= FEW:
        COLD.sum()
    started = time.perf_counter()
    if backward:
        module(x).backward(upstream)
    else:
        with torch.no_grad():
            module(x)
    return time.perf_counter() - started


def inputs(width: int, tokens: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    x, up = (torch.randn(tokens, width, generator=generator).to(dtype) for _ in range(2))
    return x.requires_grad_(), up


def peak(row: str, width: int, ffn: int, tokens: int, dtype: str, routing: str) -> int:
    """Bytes that forward and backward add to the process."""
    module = make(row, frozen(width, ffn, getattr(torch, dtype)), routing)
    x, up = inputs(width, 8, getattr(torch, dtype))
    step(module, x, up, True)
    x, up = inputs(width, tokens, getattr(torch, dtype))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")
    step(module, x, up, True)
    high = (
        next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        * 1024
    )
    return high - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="smollm2,qwen3-0.6b")
    parser.add_argument("--tokens", default="1,16,256,4096")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--routing", choices=ROUTING, default="even")
    parser.add_argument("--only", default=",".join(ROWS), help="rows to run; ours is always one")
    parser.add_argument("--peak", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        row, width, ffn, tokens, dtype, routing = args.peak
        print(peak(row, int(width), int(ffn), int(tokens), dtype, routing))
        return
    rows = [row for row in ROWS if row == "ours" or row in args.only.split(",")]
    threads = torch.get_num_threads()
    print(
        f"{platform.processor() or platform.machine()}, {threads} threads, torch {torch.__version__}; E {E}, k {K}, r {R}; "
        + " ".join(sys.argv)
    )
    found = []
    for shape in args.shapes.split(","):
        width, ffn = SHAPES[shape]
        for dtype in args.dtype.split(","):
            dense = frozen(width, ffn, getattr(torch, dtype))
            modules = {row: make(row, dense, args.routing) for row in rows}
            for tokens in map(int, args.tokens.split(",")):
                x, up = inputs(width, tokens, getattr(torch, dtype))
                load = modules["ours"].router(x.detach()).pairs.counts() / tokens
                print(
                    f"share of the tokens that visit each expert: {', '.join(f'{share:.2f}' for share in load.tolist())}"
                )
                for backward in (False, True):
                    times: dict[str, list[float]] = {row: [] for row in rows}
                    for number in range(args.rounds + 1):
                        for row, module in modules.items():
                            took = step(module, x, up, backward)
                            if number:  # the first warms up
                                times[row].append(took)
                    medians = {row: statistics.median(values) for row, values in times.items()}
                    found.append(
                        {
                            "shape": shape,
                            "dtype": dtype,
                            "tokens": tokens,
                            "routing": args.routing,
                            "pass": "fwd+bwd" if backward else "fwd",
                            "seconds": medians,
                        }
                    )
                    ours = medians["ours"]
                    told = ", ".join(
                        f"{row} {value * 1e3:.2f} ms ({ours / value:.2f}x)"
                        for row, value in medians.items()
                        if row != "ours"
                    )
                    print(
                        f"{shape} {dtype} T {tokens} {'fwd+bwd' if backward else 'fwd'}: ours {ours * 1e3:.2f} ms; ours over {told}",
                        flush=True,
                    )
                if not args.no_memory:
                    words = [sys.executable, __file__, "--peak"]
                    peaks = {row: int(subprocess.run([*words, row, str(width), str(ffn), str(tokens), dtype, args.routing], capture_output=True, text=True,
                                                     check=True).stdout) for row in rows}  # fmt: skip
                    found[-1]["peak_bytes"] = peaks
                    told = ", ".join(f"{row} {value / 1e6:.0f} MB" for row, value in peaks.items())
                    print(
                        f"    added by forward and backward: {told}; ours over peft r {peaks['ours'] / max(peaks.get('peft r', 0), 1):.2f}x",
                        flush=True,
                    )
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
