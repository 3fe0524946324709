"""Calls of the compiled kernels: what they take, their memory, their arguments."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from . import build

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "tanh", "identity")
"""Canonical names, in the order of `enum Activation` in source/vectors.h."""
DTYPES = (torch.float32, torch.bfloat16)

_INTEGER, _POINTER = ctypes.c_int64, ctypes.c_void_p


class Call(ctypes.Structure):
    """`struct Call` of source/call.h, field by field."""

    _fields_ = (
        *((name, _INTEGER) for name in ("T", "P", "D", "F", "E", "activation", "gated", "threads")),
        ("x", _POINTER), ("x_row", _INTEGER),
        *((name, _POINTER) for name in ("token", "weight", "offsets")),
        ("up", _POINTER), ("up_expert", _INTEGER), ("up_row", _INTEGER),
        ("down", _POINTER), ("down_expert", _INTEGER), ("down_row", _INTEGER),
        *((name, _POINTER) for name in ("up_bias", "down_bias", "hidden", "pairs", "out", "grad")),
        ("grad_row", _INTEGER),
        *((f"grad_{name}", _POINTER) for name in ("x", "up", "down", "up_bias", "down_bias", "weight")),
    )  # fmt: skip


class LoraMap(ctypes.Structure):
    """`struct LoraMap` of source/lora.h."""

    _fields_ = (
        ("base", _POINTER), ("base_row", _INTEGER), ("low", _POINTER),
        ("b", _POINTER), ("b_expert", _INTEGER), ("b_row", _INTEGER),
        *((f"grad_{name}", _POINTER) for name in ("base", "low", "b")),
    )  # fmt: skip


class LoraCall(ctypes.Structure):
    """`struct LoraCall` of source/lora.h."""

    _fields_ = (
        *((name, _INTEGER) for name in ("T", "P", "F", "E", "r", "activation", "threads", "bf16_weights")),
        *((name, _POINTER) for name in ("token", "weight", "offsets", "scale", "rest")),
        ("gate", LoraMap), ("up", LoraMap),
        ("a_down", _POINTER), ("a_expert", _INTEGER), ("a_row", _INTEGER),
        ("mixed", _POINTER), ("low_down", _POINTER),
        ("grad", _POINTER), ("grad_row", _INTEGER),
        *((name, _POINTER) for name in ("grad_low_down", "grad_a", "grad_weight")),
    )  # fmt: skip


ENTRIES = {"forward": Call, "backward": Call, "lora_forward": LoraCall, "lora_backward": LoraCall}
"""What `run` may be asked for -> its arguments."""


@functools.cache
def functions() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        build.CannotBuild: there is none.
    """
    try:
        loaded = ctypes.CDLL(str(build.library()))
    except OSError as error:
        raise build.CannotBuild(f"the compiled kernels do not load: {error}") from error
    for name, call in ENTRIES.items():
        entry = getattr(loaded, f"moeforge_{name}")
        entry.argtypes, entry.restype = (ctypes.POINTER(call), _INTEGER), _INTEGER
    for size in (loaded.moeforge_call_bytes, loaded.moeforge_lora_call_bytes, loaded.moeforge_has_bf16):
        size.restype = _INTEGER
    loaded.moeforge_has_bf16()  # asks the system for the tiles, before anything uses them
    assert loaded.moeforge_call_bytes() == ctypes.sizeof(Call), "Call differs from source/call.h"
    assert loaded.moeforge_lora_call_bytes() == ctypes.sizeof(LoraCall), "LoraCall differs from source/lora.h"
    return loaded


@torch.compiler.assume_constant_result  # of a plain function: torch.compile looks through a cache and traces what is below
def lacks(bf16: bool) -> str | None:
    """Why this machine cannot run the kernels in float32 or bfloat16, or None. Compiles them when first asked."""
    return _lacks(bf16)


@functools.cache
def _lacks(bf16: bool) -> str | None:
    try:
        loaded = functions()
    except build.CannotBuild as error:
        return str(error)
    if bf16 and not loaded.moeforge_has_bf16():
        return "bfloat16 needs a processor, a compiler and a system that know AMX"
    return None


def run(name: str, call: Call | LoraCall, dtype: torch.dtype) -> None:
    """One of `ENTRIES`.

    Raises:
        MemoryError: there was no room for scratch.
    """
    if getattr(functions(), f"moeforge_{name}")(ctypes.byref(call), int(dtype == torch.bfloat16)):
        raise MemoryError(f"{name}: no memory for the scratch of {call.P} pairs in a network of width {call.F}")


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
