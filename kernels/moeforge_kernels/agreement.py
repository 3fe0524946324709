"""How far a backend is from the truth: the reference in float64, on the same (rounded) inputs; answers and gradients.

Used by the tests and by `tests/benchmarks/kernels/agreement.py`, and open to whoever adds a backend: `errors(...)` below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .activations import CANONICAL, canonical
from .combine import OP as COMBINE
from .dispatch import Op
from .expert_ffn import OP as EXPERT_FFN
from .expert_gemv import OP as EXPERT_GEMV
from .expert_gemv import TOKENS
from .grouped_gemm import OP as GROUPED_GEMM
from .lora_experts import EXPAND as LORA_EXPAND
from .lora_experts import OP as LORA_EXPERTS
from .lora_experts import SHRINK as LORA_SHRINK
from .lora_ffn import OP as LORA_FFN
from .pairs import Pairs, pairs_from_experts, pairs_from_slots

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""The largest error a backend may have, relative to the largest entry of the true tensor."""


@dataclass(frozen=True)
class Case:
    """Sizes and a pattern of routing; the sizes are odd on purpose.

    Attributes:
        pattern: slots (random experts, every fifth slot empty), one (all tokens to one expert, the others get nothing), each (every
            expert one token), none (no slot is filled), choice (experts choose tokens).
        view: x is a slice of wider rows, the weights are transposed views.
    """

    tokens: int
    experts: int
    slots: int
    width: int
    ffn: int
    pattern: str = "slots"
    view: bool = False


CASES = {
    "small": Case(13, 5, 2, 24, 40),
    "several tiles": Case(70, 3, 2, 72, 136),
    "one token": Case(1, 4, 2, 32, 16),
    "one expert of seven": Case(37, 7, 1, 16, 24, "one"),
    "a token an expert": Case(6, 6, 1, 40, 16, "each"),
    "nobody goes anywhere": Case(5, 3, 2, 16, 16, "none"),
    "no tokens": Case(0, 3, 2, 16, 16),
    "experts choose": Case(19, 4, 7, 48, 16, "choice"),
    "views": Case(14, 4, 2, 48, 24, view=True),
    "indivisible": Case(15, 4, 3, 33, 19),
}


def routing(case: Case, generator: torch.Generator) -> Pairs:
    """Pairs of that pattern with float64 weights in (0, 1)."""
    if case.pattern == "choice":
        scores = torch.rand(case.experts, case.tokens, generator=generator)
        index = scores.topk(case.slots, -1).indices
        index[:, -1] = case.tokens
        return pairs_from_experts(index, torch.rand(index.shape, generator=generator, dtype=torch.float64), case.tokens)
    if case.pattern == "slots":
        index = torch.rand(case.tokens, case.experts, generator=generator).topk(case.slots, -1).indices
        index.view(-1)[4::5] = case.experts
    else:
        last = {"one": 1, "none": case.experts}.get(case.pattern)
        index = torch.arange(case.tokens).unsqueeze(1) if last is None else torch.full((case.tokens, case.slots), last)
    return pairs_from_slots(index, torch.rand(index.shape, generator=generator, dtype=torch.float64), case.experts)


def _tensor(*shape: int, generator: torch.Generator, view: bool) -> Tensor:
    scale = shape[-1] ** -0.5 if len(shape) == 3 else 1.0
    if view and len(shape) == 3:
        return torch.randn(shape[0], shape[2], shape[1], generator=generator).mul(scale).transpose(1, 2)
    if view and len(shape) == 2:
        return torch.randn(shape[0], 2 * shape[1], generator=generator)[:, : shape[1]]
    return torch.randn(shape, generator=generator).mul(scale)


def _pairs_of(case: Case) -> int:
    return case.experts * case.slots if case.pattern == "choice" else case.tokens * case.slots


def _gemm(case: Case, make: Callable[..., Tensor], gather: bool, bias: bool) -> tuple[dict[str, Tensor], Call]:
    rows = case.tokens if gather else _pairs_of(case)
    tensors = {"x": make(rows, case.width), "weight": make(case.experts, case.ffn, case.width)}
    if bias:
        tensors["bias"] = make(case.experts, case.ffn)

    def call(run: Run, t: dict[str, Tensor], pairs: Pairs) -> Tensor:
        return run(t["x"], t["weight"], pairs, bias=t.get("bias"), gather=gather)

    return tensors, call


def _ffn(
    case: Case, make: Callable[..., Tensor], activation: str, gated: bool, bias: bool
) -> tuple[dict[str, Tensor], Call]:
    rows = (2 if gated else 1) * case.ffn
    tensors = {"x": make(case.tokens, case.width), "up": make(case.experts, rows, case.width)}
    tensors["down"] = make(case.experts, case.width, case.ffn)
    if bias:
        tensors |= {"up_bias": make(case.experts, rows), "down_bias": make(case.experts, case.width)}

    def call(run: Run, t: dict[str, Tensor], pairs: Pairs) -> Tensor:
        return run(t["x"], pairs, t["up"], t["down"], activation=activation, gated=gated,
                   up_bias=t.get("up_bias"), down_bias=t.get("down_bias"))  # fmt: skip

    return tensors, call


def _gemv(
    case: Case, make: Callable[..., Tensor], activation: str, gated: bool, bias: bool
) -> tuple[dict[str, Tensor], Call]:
    tensors, _ = _ffn(case, make, activation, gated, bias)

    def call(run: Run, t: dict[str, Tensor], pairs: Pairs) -> Any:
        if pairs.slots is None:
            return "experts choose tokens: there is no table of slots"
        if pairs.tokens > TOKENS:
            return f"it is for at most {TOKENS} tokens"
        index, weight = (value.view(pairs.tokens, pairs.slots) for value in pairs.token_order())
        return run(t["x"], index, weight, t["up"], t["down"], activation=activation, gated=gated,
                   up_bias=t.get("up_bias"), down_bias=t.get("down_bias"))  # fmt: skip

    return tensors, call


def _combine(case: Case, make: Callable[..., Tensor]) -> tuple[dict[str, Tensor], Call]:
    return {"y": make(_pairs_of(case), case.width)}, lambda run, t, pairs: run(t["y"], pairs)


def _scales(like: Tensor, experts: int) -> Tensor:
    return torch.linspace(0.5, 2, experts, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _lora(case: Case, make: Callable[..., Tensor], share_a: bool) -> tuple[dict[str, Tensor], Call]:
    rank = case.slots + 4
    tensors = {"x": make(case.tokens, case.width), "lora_a": make(1 if share_a else case.experts, rank, case.width)}
    tensors["lora_b"] = make(case.experts, case.ffn, rank)

    def call(run: Run, t: dict[str, Tensor], pairs: Pairs) -> Tensor:
        return run(t["x"], pairs, t["lora_a"], t["lora_b"], _scales(t["x"], case.experts))

    return tensors, call


def _shrink(case: Case, make: Callable[..., Tensor]) -> tuple[dict[str, Tensor], Call]:
    tensors = {"x": make(case.tokens, case.width), "lora_a": make(case.experts, case.slots + 4, case.width)}
    return tensors, lambda run, t, pairs: run(t["x"], pairs, t["lora_a"])


def _expand(case: Case, make: Callable[..., Tensor]) -> tuple[dict[str, Tensor], Call]:
    rank = case.slots + 4
    tensors = {"low": make(_pairs_of(case), rank), "lora_b": make(case.experts, case.ffn, rank)}
    return tensors, lambda run, t, pairs: run(t["low"], pairs, t["lora_b"], _scales(t["low"], case.experts))


def _lora_ffn(case: Case, make: Callable[..., Tensor], gated: bool, rest: bool) -> tuple[dict[str, Tensor], Call]:
    rank, pairs = case.slots + 4, _pairs_of(case)
    tensors = {
        "up": make(case.tokens, case.ffn),
        "low_up": make(pairs, rank),
        "b_up": make(case.experts, case.ffn, rank),
    }
    if gated:
        tensors |= {
            "gate": make(case.tokens, case.ffn),
            "low_gate": make(pairs, rank),
            "b_gate": make(case.experts, case.ffn, rank),
        }
    tensors["a_down"] = make(case.experts, rank, case.ffn)

    def call(run: Run, t: dict[str, Tensor], pairs: Pairs) -> Any:
        made = run(t.get("gate"), t["up"], t.get("low_gate"), t["low_up"], pairs, t.get("b_gate"), t["b_up"], t["a_down"],
                   _scales(t["up"], case.experts), activation="silu", rest=rest)  # fmt: skip
        return torch.cat([part.flatten() for part in made]) if isinstance(made, tuple) else made

    return tensors, call


Run = Callable[..., Any]
Call = Callable[[Run, dict[str, Tensor], Pairs], Any]
Variant = tuple[Op, Callable[[Case, Callable[..., Tensor]], tuple[dict[str, Tensor], Call]]]

VARIANTS: dict[str, Variant] = {
    "grouped_gemm": (GROUPED_GEMM, lambda case, make: _gemm(case, make, True, False)),
    "grouped_gemm, rows of pairs, bias": (GROUPED_GEMM, lambda case, make: _gemm(case, make, False, True)),
    "combine": (COMBINE, _combine),
    "expert_ffn": (EXPERT_FFN, lambda case, make: _ffn(case, make, "silu", True, False)),
    "expert_ffn, gelu, bias": (EXPERT_FFN, lambda case, make: _ffn(case, make, "gelu", True, True)),
    "expert_ffn, plain relu2, bias": (EXPERT_FFN, lambda case, make: _ffn(case, make, "relu2", False, True)),
    "lora_experts": (LORA_EXPERTS, lambda case, make: _lora(case, make, False)),
    "lora_experts, one A": (LORA_EXPERTS, lambda case, make: _lora(case, make, True)),
    "lora_shrink": (LORA_SHRINK, _shrink),
    "lora_expand": (LORA_EXPAND, _expand),
    "lora_ffn": (LORA_FFN, lambda case, make: _lora_ffn(case, make, True, True)),
    "lora_ffn, plain, no rest": (LORA_FFN, lambda case, make: _lora_ffn(case, make, False, False)),
    "expert_gemv": (EXPERT_GEMV, lambda case, make: _gemv(case, make, "silu", True, False)),
    "expert_gemv, plain gelu, bias": (EXPERT_GEMV, lambda case, make: _gemv(case, make, "gelu_new", False, True)),
}
"""Name -> op, and what makes its tensors and calls it."""

for _name in sorted({canonical(name) for name in CANONICAL}):
    VARIANTS[f"activation {_name}"] = (EXPERT_FFN, functools.partial(_ffn, activation=_name, gated=True, bias=False))


ROWS = ("x", "y", "low", "low_gate", "low_up")
"""Tensors that may have a row for every pair: those of empty ones are not to be read."""
WEIGHTED = {"y", "up", "lora_b"}
"""Who takes one of these uses the pairs' weights."""


def errors(
    variant: str, backend: str, dtype: torch.dtype, case: str, *, device: str = "cpu", seed: int = 0
) -> dict[str, float] | str:
    """Tensor ("out", or the one a gradient belongs to) -> max |found - true| / max |true|; a NaN counts as infinite.

    The rows that an op is not to look at hold NaN, in the inputs and in the incoming gradient's dtype alike.

    Returns:
        A sentence where the backend says that it cannot run this.
    """
    op, build = VARIANTS[variant]
    sizes = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    pairs = routing(sizes, generator)
    tensors, call = build(sizes, lambda *shape: _tensor(*shape, generator=generator, view=sizes.view))
    given = {name: _like(tensor, dtype, device) for name, tensor in tensors.items()}
    weight = pairs.weight.to(torch.promote_types(dtype, torch.float32))
    real = int(pairs.offsets[-1])
    for name, tensor in given.items():
        if len(tensor) == len(pairs.token) and name in ROWS and len(tensor) != pairs.tokens:
            tensor[real:] = torch.nan
    here = _moved(pairs._replace(weight=weight), device)
    chosen = op.backends[backend]
    if (reason := call(lambda *a, **k: chosen.why_not(*a, **k), given, here)) is not None:
        return str(reason)
    seeds = torch.randn(call(op.backends["reference"].function, given, here).shape, generator=generator)
    found = _run(chosen.function, call, given, here, seeds.to(dtype).to(device))
    wide = {name: tensor.double().cpu() for name, tensor in given.items()}
    true = _run(
        op.backends["reference"].function, call, wide, pairs._replace(weight=weight.double()), seeds.to(dtype).double()
    )
    return {name: _distance(found[name].cpu(), true[name], name, real, given) for name in true}


def _like(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """The same strides in another type: `to` would make a view contiguous."""
    if tensor.is_contiguous():
        return tensor.to(device, dtype)
    if tensor.dim() == 3:
        return tensor.transpose(1, 2).to(device, dtype).transpose(1, 2)
    wide = torch.zeros(tensor.shape[0], 2 * tensor.shape[1], dtype=dtype, device=device)
    wide[:, : tensor.shape[1]] = tensor.to(device, dtype)
    return wide[:, : tensor.shape[1]]


def _moved(pairs: Pairs, device: str) -> Pairs:
    return pairs._replace(
        token=pairs.token.to(device), expert=pairs.expert.to(device), weight=pairs.weight.to(device),
        offsets=pairs.offsets.to(device), by_token=pairs.by_token.to(device),
    )  # fmt: skip


def _run(run: Run, call: Call, tensors: dict[str, Tensor], pairs: Pairs, seeds: Tensor) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    weight = pairs.weight.detach().requires_grad_()
    out = call(run, leaves, pairs._replace(weight=weight))
    if not out.requires_grad:
        return {"out": out}
    wanted = leaves | ({"weight of pairs": weight} if leaves.keys() & WEIGHTED else {})
    grads = torch.autograd.grad(out, list(wanted.values()), seeds)
    return {"out": out.detach()} | dict(zip(wanted, grads, strict=True))


def _distance(found: Tensor, true: Tensor, name: str, real: int, given: dict[str, Any]) -> float:
    if found.shape != true.shape:
        return float("inf")
    if name in ROWS and given[name].shape[0] > real and torch.isnan(given[name]).any():
        found, true = found[:real], true[:real]  # nobody asks for a gradient of rows that are not looked at
    if not true.numel():
        return 0.0
    scale = float(true.abs().max()) or 1.0
    error = float((found.double() - true).abs().max()) / scale
    return error if error == error else float("inf")
