"""Calls of the compiled kernels: what they take, their memory, their arguments."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ..dispatch import transformed
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


class LoraFew(ctypes.Structure):
    """`struct LoraFew` of source/lora_few.h."""

    _fields_ = (
        *((name, _INTEGER) for name in ("T", "P", "D", "O", "E", "r", "threads")),
        *((name, _POINTER) for name in ("token", "weight", "offsets", "scale")),
        ("x", _POINTER), ("x_row", _INTEGER),
        ("a", _POINTER), ("a_expert", _INTEGER), ("a_row", _INTEGER),
        ("b", _POINTER), ("b_expert", _INTEGER), ("b_row", _INTEGER),
        ("low", _POINTER), ("out", _POINTER),
    )  # fmt: skip


class LoraNetwork(ctypes.Structure):
    """`struct LoraNetwork` of source/lora_few.h."""

    _fields_ = (
        *((name, _INTEGER) for name in ("rest", "D", "O")), ("x", _POINTER), ("x_row", _INTEGER),
        *((f"{name}{part}", kind) for name in ("a_gate", "a_up", "b_down")
          for part, kind in (("", _POINTER), ("_expert", _INTEGER), ("_row", _INTEGER))),
        ("delta", _POINTER), ("between", LoraCall),
    )  # fmt: skip


class Route(ctypes.Structure):
    """`struct Route` of source/route.h."""

    _fields_ = (
        *((name, _INTEGER) for name in ("T", "E", "k", "sigmoid", "select_first", "renormalise")),
        ("factor", ctypes.c_double),
        *((name, _POINTER) for name in ("logits", "bias", "real", "token", "expert", "weight", "offsets", "by_token")),
    )  # fmt: skip

    @property
    def P(self) -> int:
        """Pairs."""
        return self.T * self.k


ENTRIES = {"forward": Call, "backward": Call, "lora_forward": LoraCall, "lora_backward": LoraCall, "lora_few": LoraFew,
           "lora_network": LoraNetwork, "route": Route}  # fmt: skip
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
    sizes = {"call": Call, "lora_call": LoraCall, "lora_few": LoraFew, "lora_network": LoraNetwork, "route": Route}
    facts = (*(f"{name}_bytes" for name in sizes), "has_bf16_vectors", "has_bf16_tiles")
    for fact in facts:
        getattr(loaded, f"moeforge_{fact}").restype = _INTEGER
    loaded.moeforge_has_bf16_tiles()  # asks the system for the tiles, before anything uses them
    for name, call in sizes.items():
        assert getattr(loaded, f"moeforge_{name}_bytes")() == ctypes.sizeof(call), (
            f"{call.__name__} differs from source"
        )
    return loaded


@torch.compiler.assume_constant_result  # of a plain function: torch.compile looks through a cache and traces what is below
def lacks(bf16: bool, tiles: bool = True) -> str | None:
    """Why this machine cannot run the kernels in float32 or bfloat16, or None. Compiles them when first asked.

    Args:
        tiles: whether they are those that multiply tiles, not only load and store elements.
    """
    return _lacks(bf16, tiles)


def lacks_way_there(weight: Tensor | None = None, **tensors: Tensor | None) -> str | None:
    """Why the kernels that have no way back cannot run on tensors, by name, in one sentence; None is a tensor that is not there.

    Args:
        weight: of the pairs; its type does not matter.
    """
    if torch.compiler.is_compiling():
        return "torch.compile sees nothing of it"
    if transformed():
        return "torch.func and forward-mode differentiation see nothing of it"
    like: torch.dtype | None = None
    asked: list[str] = []
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != "cpu" or type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"{name} is {'' if type(tensor) is Tensor else f'a {type(tensor).__name__} '}on {tensor.device.type}"
        like = like or tensor.dtype
        if tensor.dtype not in DTYPES or tensor.dtype != like:
            return f"it reads float32 or bfloat16, all alike; {name} is {tensor.dtype}, the first {like}"
        if tensor.requires_grad:
            asked.append(name)
    if torch.is_grad_enabled() and (asked or (weight is not None and weight.requires_grad)):
        return f"it has no way back, and {', '.join(asked) or 'weight'} asked for a gradient"
    if weight is not None and (weight.device.type != "cpu" or type(weight) not in (Tensor, torch.nn.Parameter)):
        return f"weight is a {type(weight).__name__} on {weight.device.type}"
    return lacks(like == torch.bfloat16, tiles=False)


@functools.cache
def _lacks(bf16: bool, tiles: bool) -> str | None:
    try:
        loaded = functions()
    except build.CannotBuild as error:
        return str(error)
    if bf16 and tiles and not loaded.moeforge_has_bf16_tiles():
        return "bfloat16 needs a processor, a compiler and a system that know AMX"
    if bf16 and not loaded.moeforge_has_bf16_vectors():
        return "bfloat16 needs a processor and a compiler that know AVX-512 BF16"
    return None


def run(name: str, call: Call | LoraCall | LoraFew | LoraNetwork | Route, dtype: torch.dtype) -> None:
    """One of `ENTRIES`.

    Raises:
        MemoryError: there was no room for scratch.
    """
    if getattr(functions(), f"moeforge_{name}")(ctypes.byref(call), int(dtype == torch.bfloat16)):
        sizes = call.between if isinstance(call, LoraNetwork) else call
        width = f" in a network of width {sizes.F}" if isinstance(sizes, Call | LoraCall) else ""
        raise MemoryError(f"{name}: no memory for the scratch of {sizes.P} pairs{width}")


def rows(tensor: Tensor) -> Tensor:
    """The same numbers as the kernels read them: rows (and experts) may lie apart, their elements may not."""
    tensor = tensor.detach()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """For a kernel to write to, whatever torch's default type and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
