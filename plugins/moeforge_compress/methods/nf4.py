"""4-bit NormalFloat: 16 levels at the quantiles of a normal distribution, one float32 scale for each block of weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moeforge.checkpoint.tensor import TensorInfo
from moeforge.errors import UsageProblem
from moeforge.options import opt

from ..codec import Parts, float_tensor
from ..loads import Loads

if TYPE_CHECKING:
    import torch
    from torch import nn

_BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
_PACKED = "quant_state.bitsandbytes__nf4"
"""bitsandbytes' name of the part whose role is `state`: JSON in bytes."""
_NESTED_BLOCK = 256
_TORCH_NAMES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class NF4(Loads):
    name = "nf4"
    summary = "4-bit NormalFloat through bitsandbytes: 4.5 bits a weight with block 64, 4.13 with double quantisation"
    reference = "QLoRA (arXiv 2305.14314)"
    api_version = 1
    headers = frozenset({"state"})

    @dataclass(frozen=True)
    class Options:
        blocksize: int = opt("weights that share one scale: 64, 128, 256, ... 4096", default=64)
        double_quant: bool = opt("store the scales in 8 bits too, as QLoRA does", default=False)

        def __post_init__(self) -> None:
            if self.blocksize not in _BLOCK_SIZES:
                raise UsageProblem(
                    f"--blocksize {self.blocksize}: bitsandbytes takes {', '.join(map(str, _BLOCK_SIZES))}"
                )

    def parts(self, info: TensorInfo, options: Options) -> dict[str, TensorInfo]:
        if len(info.shape) == 3 and math.prod(info.shape[1:]) % options.blocksize:
            raise UsageProblem(
                f"--blocksize {options.blocksize}: an expert of {info.name} has {math.prod(info.shape[1:])} weights, "
                "and blocks may not reach over two experts; choose a block size that divides it"
            )
        blocks = math.ceil(info.size / options.blocksize)
        sizes: dict[str, tuple[str, tuple[int, ...]]] = {"codes": ("U8", ((info.size + 1) // 2, 1))}
        if options.double_quant:
            sizes["absmax"] = ("U8", (blocks,))
            sizes["nested_absmax"] = ("F32", (math.ceil(blocks / _NESTED_BLOCK),))
            sizes["nested_quant_map"] = ("F32", (256,))
        else:
            sizes["absmax"] = ("F32", (blocks,))
        sizes["quant_map"] = ("F32", (16,))
        sizes["state"] = ("U8", (self._state_length(info, options),))
        return {key: TensorInfo(_stored_name(info.name, key), dtype, shape) for key, (dtype, shape) in sizes.items()}

    def _state_length(self, info: TensorInfo, options: Options) -> int:
        """Bytes of the JSON that describes a matrix. The mean of the scales stands in it as text of varying length, so
        room is kept for the longest float and the rest is filled with spaces, which JSON ignores."""
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": options.blocksize,
                                 "dtype": _TORCH_NAMES[info.dtype], "shape": list(info.shape)}  # fmt: skip
        if options.double_quant:
            state |= {
                "nested_blocksize": _NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": -2.2250738585072014e-308,
            }
        return len(json.dumps(state))

    def encode(self, array: np.ndarray, info: TensorInfo, options: Options) -> Sequence[np.ndarray]:
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(float_tensor(array, info), blocksize=options.blocksize, quant_type="nf4",
                                     compress_statistics=options.double_quant)  # fmt: skip
        found = {"codes": codes, **state.as_dict(packed=True)}
        out = []
        for key, part in self.parts(info, options).items():
            value = found[_PACKED if key == "state" else key].numpy()
            if key == "state":
                value = np.frombuffer(value.tobytes().ljust(part.shape[0]), dtype=np.uint8)
            out.append(value)
        return out

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState.from_dict(_statistics(parts), device=parts["codes"].device)
        state.dtype = dtype  # as Linear4bit does: no detour through the type it was quantised from
        # One row a block, the last one filled up: on a CPU with AVX-512, bitsandbytes (0.50) takes the wrong scales for
        # blocks that reach over two rows.
        header = _read_state(parts)
        shape, block = header["shape"], header["blocksize"]
        blocks, codes = math.ceil(math.prod(shape) / block), parts["codes"].reshape(-1)
        state.shape = torch.Size((blocks, block))
        values = dequantize_4bit(torch.nn.functional.pad(codes, (0, blocks * block // 2 - codes.numel())), state)
        return values.reshape(-1)[: math.prod(shape)].reshape(shape)

    def split(self, parts: Parts) -> list[Parts]:
        import torch
        from bitsandbytes.functional import dequantize_blockwise

        state = _read_state(parts)
        experts, *shape = state["shape"]
        absmax = parts["absmax"]
        if "nested_absmax" in parts:
            absmax = dequantize_blockwise(absmax, absmax=parts["nested_absmax"], code=parts["nested_quant_map"],
                                          blocksize=state["nested_blocksize"]) + state["nested_offset"]  # fmt: skip
        header = json.dumps(
            {"quant_type": "nf4", "blocksize": state["blocksize"], "dtype": state["dtype"], "shape": shape}
        )
        shared = {"quant_map": parts["quant_map"], "state": torch.tensor(list(header.encode()), dtype=torch.uint8)}
        codes, scales = parts["codes"].reshape(experts, -1, 1), absmax.reshape(experts, -1)
        return [{"codes": codes[e], "absmax": scales[e], **shared} for e in range(experts)]

    def linear(self, parts: Parts, like: nn.Linear, dtype: torch.dtype) -> nn.Module | None:
        import torch
        from bitsandbytes.nn.modules import Linear4bit, Params4bit

        codes, on_cpu = parts["codes"], parts["codes"].device.type == "cpu"
        if on_cpu and like.in_features % _read_state(parts)["blocksize"]:
            return None  # see decode
        made = Linear4bit(like.in_features, like.out_features, like.bias is not None, compute_dtype=dtype, quant_type="nf4",
                          compress_statistics="nested_absmax" in parts, device="meta")  # fmt: skip
        if on_cpu and (dtype != torch.bfloat16 or like.out_features % 32):
            # its path for CPUs with AVX512-BF16 computes in bfloat16 whatever was asked, and fails on other sizes
            made.support_avx512bf16_for_cpu = False
        made.weight = Params4bit.from_prequantized(codes, _statistics(parts), device=str(codes.device), module=made)
        made.bias = like.bias
        return made

    def stock_trap(self, info: TensorInfo, options: Options) -> str:
        if info.shape[-1] % options.blocksize == 0:
            return ""
        return (
            f"on CPUs with AVX-512, bitsandbytes takes the wrong scales where a block of {options.blocksize} reaches over two "
            f"rows, as in {info.name} {list(info.shape)}"
        )

    def quantization_config(self, options: Options, dtype: str, skip: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": options.double_quant, "bnb_4bit_compute_dtype": _TORCH_NAMES[dtype],
            "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": skip,
        }  # fmt: skip


def _read_state(parts: Parts) -> dict[str, Any]:
    return json.loads(parts["state"].numpy().tobytes())


def _statistics(parts: Parts) -> Parts:
    """Everything but the codes, under bitsandbytes' names."""
    return {_PACKED if key == "state" else key: value for key, value in parts.items() if key != "codes"}


def _stored_name(name: str, key: str) -> str:
    return name if key == "codes" else f"{name}.{_PACKED if key == 'state' else key}"
