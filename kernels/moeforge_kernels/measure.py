"""How long backends take on this machine; what `moeforge bench` prints."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tuning
from .combine import OP as COMBINE
from .expert_ffn import OP as EXPERT_FFN
from .expert_gemv import OP as EXPERT_GEMV
from .expert_gemv import TOKENS
from .grouped_gemm import OP as GROUPED_GEMM
from .pairs import pairs_from_slots

PEERS = ("torch", "reference")
"""Backends that are nobody's kernels: what the others are compared with."""


class Layer(NamedTuple):
    tokens: int
    width: int
    ffn: int
    experts: int
    active: int


def tensors(layer: Layer, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Random inputs of a gated FFN mixture with uniform routing; weights as large as trained ones, so that nothing overflows."""
    make = torch.Generator(device="cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=make) * shape[-1] ** -0.5).to(device, dtype)

    index = torch.rand(layer.tokens, layer.experts, generator=make).topk(layer.active, -1).indices.to(device)
    weight = torch.rand(layer.tokens, layer.active, generator=make).to(device)
    return {
        "x": normal(layer.tokens, layer.width), "index": index, "weight": weight, "pairs": pairs_from_slots(index, weight, layer.experts),
        "up": normal(layer.experts, 2 * layer.ffn, layer.width), "down": normal(layer.experts, layer.width, layer.ffn),
        "hidden": normal(layer.tokens * layer.active, layer.ffn), "y": normal(layer.tokens * layer.active, layer.width),
    }  # fmt: skip


def rows(
    layer: Layer, dtype: torch.dtype, device: torch.device, *, backward: bool, repeats: int
) -> Iterator[dict[str, Any]]:
    """One row an op and backend that takes the shape: milliseconds, and their ratio to the fastest of `PEERS`."""
    t = tensors(layer, dtype, device)
    pairs = t["pairs"]
    ffn = {"activation": "silu", "gated": True, "up_bias": None, "down_bias": None}
    calls: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
        "grouped_gemm": (GROUPED_GEMM, (t["x"], t["up"], pairs), {"bias": None, "gather": True}),
        "combine": (COMBINE, (t["y"], pairs), {}),
        "expert_ffn": (EXPERT_FFN, (t["x"], pairs, t["up"], t["down"]), ffn),
    }
    if layer.tokens <= TOKENS and not backward:
        calls["expert_gemv"] = (EXPERT_GEMV, (t["x"], t["index"], t["weight"], t["up"], t["down"]), ffn)
    for name, (op, arguments, options) in calls.items():
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
        took: dict[str, float] = {}
        for backend in op.backends.values():
            if backend.why_not(*arguments, **options) is None:
                took[backend.name] = milliseconds(
                    _step(backend.function, arguments, options, leaves, backward), device, repeats
                )
        best = min(took[peer] for peer in PEERS if peer in took)
        for backend, ms in took.items():
            yield {"op": name, "backend": backend, "ms": ms, "ratio": ms / best}


def _step(run: Callable[..., Tensor], arguments: tuple[Any, ...], options: dict[str, Any], leaves: list[Tensor], backward: bool) -> Callable[[], object]:  # fmt: skip
    if not backward:
        return torch.no_grad()(lambda: run(*arguments, **options))

    def step() -> object:
        for leaf in leaves:
            leaf.requires_grad_()
        out = run(*arguments, **options)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return step


def milliseconds(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of `repeats`, after a warm-up."""
    step()
    took = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e3


def tune(layer: Layer, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Measure the candidates of every product that the layer needs and keep the best in the machine's table; a line each.

    Blocks that do not fit the device are passed over, since what fits is what Triton finds out when it compiles.
    """
    from triton.runtime.errors import OutOfResources

    from .expert_ffn.hidden import hidden_gradient
    from .grouped_gemm.gram import gram
    from .grouped_gemm.product import product

    t = tensors(layer, dtype, device)
    pairs, count = t["pairs"], len(t["pairs"].token)
    d, f, e = layer.width, layer.ffn, layer.experts
    pre = torch.cat([t["hidden"], t["hidden"]], 1)
    plain = ("identity", False, False, False)
    steps: dict[tuple[str, int, int], Callable[[], object]] = {
        ("gated", f, d): lambda: product(
            t["x"], t["up"], None, pairs.token, pairs.offsets, count, "silu", True, False, False
        ),
        ("product", d, f): lambda: product(t["hidden"], t["down"], None, None, pairs.offsets, count, *plain),
        ("product", d, 2 * f): lambda: product(pre, t["up"].transpose(1, 2), None, None, pairs.offsets, count, *plain),
        ("hidden", f, d): lambda: hidden_gradient(
            t["x"], t["down"], pre, pairs.weight, pairs.token, pairs.offsets, "silu", True
        ),
        ("gram", 2 * f, d): lambda: gram(pre, t["x"], pairs.token, pairs.offsets, False, True, False),
        ("gram", d, f): lambda: gram(t["x"], t["hidden"], pairs.token, pairs.offsets, True, False, False),
    }
    for (kernel, n, k), step in steps.items():
        shape = tuning.Shape.of(count, e, n, k)
        best: tuple[float, tuning.Blocks] | None = None
        for blocks in tuning.candidates(kernel, shape, dtype):
            try:
                with tuning.forced(kernel, blocks):
                    took = milliseconds(step, device, 10)
            except OutOfResources:
                continue
            if best is None or took < best[0]:
                best = took, blocks
        if best is not None:
            tuning.remember(kernel, shape, dtype, device, best[1], best[0])
            yield f"{kernel} {shape}: {best[0]:.3f} ms with {best[1]}"
