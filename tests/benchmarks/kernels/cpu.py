"""expert_ffn on a processor beside transformers' experts and beside what the machine can do.

    python tests/benchmarks/kernels/cpu.py                    # every point, a few seconds each, some minutes on a quiet machine
    python tests/benchmarks/kernels/cpu.py --shapes smollm2 --dtypes bf16 --tokens 64 --passes fwd --seconds 1

Prints a table for RESULTS.md. At each point the contestants and the two probes of the machine take turns, the order turning by one
place a round; every figure is a minimum (medians in a second table), every ratio comes from one point's own rounds.

What counts: from (hidden states, chosen experts [T, K], their weights) to the answer, so ours includes making the list of pairs,
as theirs includes sorting. fwd: without autograd. fwd+bwd: gradients of hidden states, weights and gates, made anew each time.

On a machine that others use, wall time of several threads measures the others: `--cpu-time` takes one thread and counts its own seconds.

Bound: max(bytes of the touched weights / measured read bandwidth, the dense product of as many rows). For fwd+bwd the weights are read
twice and their gradients written once, and there are three products for one: three times both.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "kernels"))

from moeforge_kernels.expert_ffn import expert_ffn  # noqa: E402 - a bare checkout runs
from moeforge_kernels.pairs import pairs_from_slots  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """D, F, E, K of one layer."""

    width: int
    ffn: int
    experts: int
    active: int


SHAPES = {"smollm2": Shape(576, 1536, 8, 2), "olmoe": Shape(2048, 1024, 64, 8)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEERS = ("eager", "batched_mm", "grouped_mm")
COPIES_AT_MOST = 4e9
"""Bytes: `batched_mm` copies an expert's weights for every pair; beyond this it is left out."""
SLOW = 10.0
"""Seconds from which on a contestant runs twice only."""

Run = Callable[[], object]


def peers(shape: Shape, up: torch.Tensor, down: torch.Tensor) -> Callable[[str], torch.nn.Module]:
    """transformers' own module around the same weights, set to one of its implementations."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=shape.width, intermediate_size=shape.ffn, num_local_experts=shape.experts)
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj, module.down_proj = torch.nn.Parameter(up), torch.nn.Parameter(down)

    def with_(name: str) -> torch.nn.Module:
        config._experts_implementation = name
        return module

    return with_


class Point:
    """One layer, dtype, number of tokens and pass: its contestants and probes."""

    def __init__(
        self, shape: Shape, up: torch.Tensor, down: torch.Tensor, tokens: int, backward: bool, beside: list[str]
    ) -> None:
        generator = torch.Generator().manual_seed(tokens)
        dtype = up.dtype
        self.x = torch.randn(tokens, shape.width, generator=generator).to(dtype).requires_grad_(backward)
        self.index = torch.rand(tokens, shape.experts, generator=generator).topk(shape.active).indices
        self.weight = torch.rand(tokens, shape.active, generator=generator).to(dtype).requires_grad_(backward)
        self.towards = torch.randn(tokens, shape.width, generator=generator).to(dtype)
        self.up, self.down, self.backward = up.requires_grad_(backward), down.requires_grad_(backward), backward
        each = up[0].nbytes + down[0].nbytes
        self.bytes = len(self.index.unique()) * each
        self.rows = tokens * shape.active
        self.flops = 6 * self.rows * shape.width * shape.ffn
        self.runs: dict[str, Run] = {"moeforge": self._run(self._ours(shape.experts))}
        module = peers(shape, up, down)
        for name in beside:
            if name == "batched_mm" and self.rows * each > COPIES_AT_MOST:
                continue
            self.runs[name] = self._run(
                lambda name=name: module(name)(self.x, self.index, self.weight), module("eager")
            )
        self.runs["read"] = self._read(each)
        self.runs["dense"] = self._dense(shape)

    def _ours(self, experts: int) -> Run:
        def call() -> torch.Tensor:
            pairs = pairs_from_slots(self.index, self.weight.float(), experts)
            return expert_ffn(self.x, pairs, self.up, self.down, activation="silu", backend="cpu")

        return call

    def _run(self, call: Callable[[], object], module: torch.nn.Module | None = None) -> Run:
        weights = (self.up, self.down) if module is None else tuple(module.parameters())

        def run() -> object:
            if not self.backward:
                with torch.no_grad():
                    return call()
            out = call()
            assert isinstance(out, torch.Tensor)
            return torch.autograd.grad(out, (self.x, self.weight, *weights), self.towards)

        return run

    def _read(self, each: int) -> Run:
        flat = self.up.detach().view(-1)[: self.bytes // self.up.element_size()].view(torch.int64)
        self.read_bytes = flat.nbytes
        return lambda: flat.sum()

    def _dense(self, shape: Shape) -> Run:
        x = torch.randn(self.rows, shape.width).to(self.x.dtype)
        hidden = torch.randn(self.rows, shape.ffn).to(self.x.dtype)
        wide, out = x.new_empty(self.rows, 2 * shape.ffn), torch.empty_like(x)
        up, down = self.up.detach()[0].t(), self.down.detach()[0].t()

        def run() -> None:
            torch.mm(x, up, out=wide)
            torch.mm(hidden, down, out=out)

        return run

    def measure(self, seconds: float, clock: Callable[[], float]) -> dict[str, list[float]]:
        """Seconds of every run, rounds of everybody, for about that long."""
        times: dict[str, list[float]] = {name: [] for name in self.runs}
        names, ends, turn = list(self.runs), time.perf_counter() + seconds, 0
        while turn < 3 or time.perf_counter() < ends:
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if turn > 1 and min(times[name]) > SLOW:
                    continue
                start = clock()
                self.runs[name]()
                times[name].append(clock() - start)
            turn += 1
        return times

    def bound(self, times: dict[str, float]) -> tuple[float, float, float, float]:
        """(seconds, of which by memory, GB/s read, GFLOP/s dense)."""
        factor = 3 if self.backward else 1
        bandwidth = self.read_bytes / times["read"]
        memory = factor * self.bytes / bandwidth
        dense = factor * times["dense"]
        return max(memory, dense), memory, bandwidth / 1e9, self.flops / times["dense"] / 1e9


def row(label: str, point: Point, times: dict[str, float]) -> str:
    bound, memory, bandwidth, rate = point.bound(times)
    best = min(times[name] for name in PEERS if name in times)
    cells = [f"{1e3 * times[name]:.2f}" if name in times else "-" for name in ("moeforge", *PEERS)]
    by = "memory" if memory >= bound else "product"
    return (
        f"| {label} | {' | '.join(cells)} | {1e3 * bound:.2f} ({by}; {bandwidth:.0f} GB/s, {rate:.0f} GF/s) "
        f"| {best / times['moeforge']:.2f} | {times['moeforge'] / bound:.2f} |"
    )


HEAD = (
    f"| point | moeforge ms | {' | '.join(f'{name} ms' for name in PEERS)} | bound ms | best peer / ours | ours / bound |\n"
    f"| --- | --- | {' | '.join('---' for _ in PEERS)} | --- | --- | --- |"
)


def machine() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return (
        f"{names[0]}, {torch.get_num_threads()} thread(s), Linux {platform.release()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {version('transformers')}, load before {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--tokens", default="1,64,2048")
    parser.add_argument("--passes", default="fwd,fwd+bwd")
    parser.add_argument("--peers", default=",".join(PEERS), help="eager takes a minute for the gradients of olmoe's")
    parser.add_argument("--seconds", type=float, default=6.0, help="a point, after two rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and its own seconds instead of the wall's")
    asked = parser.parse_args()
    torch.set_num_threads(1 if asked.cpu_time else asked.threads)
    clock = time.thread_time if asked.cpu_time else time.perf_counter
    print(f"{machine()}, {'CPU' if asked.cpu_time else 'wall'} time", flush=True)
    print(f"\nMinima:\n\n{HEAD}", flush=True)
    medians = []
    for name in asked.shapes.split(","):
        shape = SHAPES[name]
        for kind in asked.dtypes.split(","):
            up = (torch.randn(shape.experts, 2 * shape.ffn, shape.width) * shape.width**-0.5).to(DTYPES[kind])
            down = (torch.randn(shape.experts, shape.width, shape.ffn) * shape.ffn**-0.5).to(DTYPES[kind])
            for way in asked.passes.split(","):
                for tokens in map(int, asked.tokens.split(",")):
                    point = Point(shape, up, down, tokens, way == "fwd+bwd", asked.peers.split(","))
                    times = point.measure(asked.seconds, clock)
                    label = f"{name} {kind} T {tokens} {way}"
                    print(row(label, point, {k: min(v) for k, v in times.items()}), flush=True)
                    medians.append(row(label, point, {k: statistics.median(v) for k, v in times.items()}))
                    point.runs.clear()
    print(f"\nMedians:\n\n{HEAD}\n" + "\n".join(medians))


if __name__ == "__main__":
    main()
