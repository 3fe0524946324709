"""8-bit integers with one scale a row: LLM.int8()'s weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from moeforge.checkpoint.roles import role_of
from moeforge.checkpoint.tensor import TensorInfo

from ..codec import Parts, float_tensor
from ..loads import Loads

if TYPE_CHECKING:
    import torch
    from torch import nn


class Int8(Loads):
    name = "int8"
    summary = "8-bit integers through bitsandbytes: one float32 scale a row"
    reference = "LLM.int8() (arXiv 2208.07339)"
    api_version = 1
    headers = frozenset({"format"})

    @dataclass(frozen=True)
    class Options:
        pass

    def parts(self, info: TensorInfo, options: Options) -> dict[str, TensorInfo]:
        stem = _stem(info.name)
        return {
            # experts lie flat: a stock class that ignores the config's type then stops at their shape, instead of taking the
            # codes for weights
            "codes": TensorInfo(info.name, "I8", (info.size, 1) if role_of(info) == "experts" else info.shape),
            "scale": TensorInfo(f"{stem}.SCB", "F32", info.shape[:-1]),
            "format": TensorInfo(f"{stem}.weight_format", "U8", ()),
        }

    def encode(self, array: np.ndarray, info: TensorInfo, options: Options) -> Sequence[np.ndarray]:
        import torch
        from bitsandbytes.functional import int8_vectorwise_quant

        # bitsandbytes quantises from float16. Its largest value bounds what it takes; scaling a row by a power of two is
        # exact and brings any row into reach, subnormal ones included.
        rows = float_tensor(array, info).reshape(-1, info.shape[-1]).float()
        peak = rows.abs().amax(dim=1, keepdim=True)
        power = torch.exp2(torch.floor(torch.log2(torch.where(peak > 0, peak, 1.0))))
        codes, scale, _ = int8_vectorwise_quant((rows / power).half())
        scale = scale * power.flatten()
        stored = self.parts(info, options)
        return [
            codes.reshape(stored["codes"].shape).numpy(),
            scale.reshape(stored["scale"].shape).numpy(),
            np.zeros((), np.uint8),
        ]

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        scale = parts["scale"].unsqueeze(-1) / 127.0
        return (parts["codes"].reshape(*scale.shape[:-1], -1) * scale).to(dtype)

    def split(self, parts: Parts) -> list[Parts]:
        codes = parts["codes"].reshape(len(parts["scale"]), -1, 1)
        return [{"codes": code, "scale": scale} for code, scale in zip(codes, parts["scale"], strict=True)]

    def linear(self, parts: Parts, like: nn.Linear, dtype: torch.dtype) -> nn.Module:
        from bitsandbytes.nn.modules import Int8Params, Linear8bitLt

        # it would say on every call that activations are quantised from float16, which is what the method is
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        made = Linear8bitLt(like.in_features, like.out_features, like.bias is not None, has_fp16_weights=False,
                            threshold=6.0, device="meta")  # fmt: skip
        codes, scale = parts["codes"], parts["scale"]
        # the keywords belong to its __new__, which type checkers do not see
        made.weight = cast(Any, Int8Params)(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale)
        made.bias = like.bias
        return made

    def stock_trap(self, info: TensorInfo, options: Options) -> str:
        return ""

    def quantization_config(self, options: Options, dtype: str, skip: list[str]) -> dict[str, Any]:
        return {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": 6.0,
                "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": skip}  # fmt: skip


def _stem(name: str) -> str:
    return name.removesuffix(".weight")
