"""What the Triton backends share: what they take, the activations, and how they hide from torch.compile.

Imported only by modules called triton.py (and by what they import), so that nothing else needs Triton.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# (a kernel's body is another language: literals are constexpr, launch options are keywords)

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Read by Triton when a kernel is defined, so it is fixed for a process."""

EMULATED = tl.constexpr(INTERPRETED)
INVERSE_SQRT2 = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
"""Constants stand to the right of a block: to its left the interpreter takes the product for another constant."""


@triton.jit
def multiply(a, b, acc):
    """acc + a @ b with float32 sums. ieee: float32 inputs are not rounded to tf32. The interpreter multiplies bfloat16's bits as if
    they were integers, so it gets float32."""
    if EMULATED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, KIND: tl.constexpr):
    """Float32 rounded to the nearest of another type, which the interpreter does not do for bfloat16: it cuts the bits off."""
    if EMULATED and tl.bfloat16 == KIND:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(KIND)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """moeforge_kernels.activations, in float32."""
    if ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "gelu":
        return 0.5 * x * (1 + tl.erf(x * INVERSE_SQRT2))
    elif ACT == "gelu_tanh":
        return x * tl.sigmoid((x + 0.044715 * x * x * x) * SQRT_8_OVER_PI)
    elif ACT == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    elif ACT == "relu":
        return tl.maximum(x, 0.0)
    elif ACT == "relu2":
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif ACT == "sigmoid":
        return tl.sigmoid(x)
    elif ACT == "tanh":
        return 2 * tl.sigmoid(2 * x) - 1
    else:
        tl.static_assert(ACT == "identity")
        return x


@triton.jit
def slope(x, ACT: tl.constexpr):
    """The derivative of `activate`; 0 at 0 for relu, as in torch."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        return s * (1 + x * (1 - s))
    elif ACT == "gelu":
        return 0.5 * (1 + tl.erf(x * INVERSE_SQRT2)) + x * INVERSE_SQRT_2PI * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        s = tl.sigmoid((x + 0.044715 * x * x * x) * SQRT_8_OVER_PI)
        return s + x * s * (1 - s) * SQRT_8_OVER_PI * (1 + 3 * 0.044715 * x * x)
    elif ACT == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        return s * (1 + 1.702 * x * (1 - s))
    elif ACT == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif ACT == "relu2":
        return 2 * tl.maximum(x, 0.0)
    elif ACT == "sigmoid":
        s = tl.sigmoid(x)
        return s * (1 - s)
    elif ACT == "tanh":
        s = tl.sigmoid(2 * x)
        return 4 * s * (1 - s)
    else:
        return x * 0 + 1


def opaque(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function that launches kernels, as one node to torch.compile and as itself elsewhere.

    Args:
        fake: the same signature; empty tensors of the answer's shapes and types.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        operator = torch.library.custom_op(f"moeforge::triton_{function.__name__}", function, mutates_args=())
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return operator(*args) if torch.compiler.is_compiling() else function(*args)

        return call

    return wrap
