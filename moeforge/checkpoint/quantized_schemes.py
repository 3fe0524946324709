"""How quantised weights are stored by the tools that make them, and how each is decoded: exactly, in float32.

| method | stored for a matrix [O, I] | decoded |
| --- | --- | --- |
| fp8, fbgemm_fp8 | float8 codes, `_scale_inv` or `_scale` by block, row or tensor | code * scale |
| compressed-tensors | float8, int8 or packed int4/int8 codes, scales by group, row or tensor | code * scale |
| bitsandbytes nf4, fp4 | two codes a byte, `absmax` by block (perhaps 8-bit itself), a table of 16 | table[code] * absmax |
| bitsandbytes int8 | int8 codes, `SCB` by row | code * SCB / 127 |
| gptq | `qweight` [I/p, O], `qzeros`, `scales`, `g_idx`, p codes an int32 | (code - zero) * scale |
| awq (gemm) | `qweight` [I, O/8] with nibbles in the order 0 2 4 6 1 3 5 7, `qzeros`, `scales` | (code - zero) * scale |
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ..errors import BadInput
from .base import Checkpoint
from .coded import DTYPES, Coded, Scheme
from .tensor import TensorInfo

_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_NESTED = ("nested_absmax", "nested_quant_map")

Parts = Mapping[str, np.ndarray]


def fp8(checkpoint: Checkpoint, settings: Mapping[str, Any], dtype: str) -> list[Coded]:
    """float8 codes with a scale for each block of `weight_block_size`, each row, or the whole tensor."""
    block = settings.get("weight_block_size")
    found = []
    for info in checkpoint.tensors.values():
        if info.dtype not in _FLOAT8:
            continue
        scale = next(
            (info.name + end for end in ("_scale_inv", "_scale") if info.name + end in checkpoint.tensors), None
        )
        if scale is None:
            raise BadInput(f"{checkpoint.ref}: {info.name!r} is {info.dtype} without its {info.name}_scale_inv")
        found.append(_scaled(checkpoint, info, scale, block, dtype))
    return found


def compressed_tensors(checkpoint: Checkpoint, settings: Mapping[str, Any], dtype: str) -> list[Coded]:
    """The formats float-quantized, int-quantized, naive-quantized and pack-quantized, symmetric."""
    known = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision")
    listed = settings.get("config_groups") or {}
    groups = [group for group in listed.values() if isinstance(group, dict)] if isinstance(listed, dict) else []
    formats = {str(each["format"]) for each in (settings, *groups) if each.get("format") is not None}
    if not formats <= set(known):
        raise BadInput(
            f"{checkpoint.ref}: compressed-tensors format {', '.join(sorted(formats - set(known)))} is not decoded here"
        )
    found = []
    for info in checkpoint.tensors.values():
        stem = info.name.removesuffix("_packed").removesuffix(".weight")
        if info.name.endswith(".weight_packed"):
            found.append(_packed(checkpoint, stem, groups, dtype))
        elif (
            info.dtype in (*_FLOAT8, "I8")
            and info.name.endswith(".weight")
            and f"{info.name}_scale" in checkpoint.tensors
        ):
            _refuse_parts(checkpoint, stem, ("weight_zero_point", "weight_g_idx"))
            found.append(_scaled(checkpoint, info, f"{info.name}_scale", None, dtype))
    return found


def bitsandbytes(checkpoint: Checkpoint, settings: Mapping[str, Any], dtype: str) -> list[Coded]:
    """nf4, fp4 and int8, in the layout that transformers saves."""
    found = []
    for info in checkpoint.tensors.values():
        name, _, kind = info.name.partition(".quant_state.bitsandbytes__")
        if kind:
            found.append(_four_bit(checkpoint, name, info.name, dtype))
        elif info.dtype == "I8":
            stem = info.name.removesuffix(".weight")
            scale = checkpoint.tensors.get(f"{stem}.SCB")
            if scale is None:
                raise BadInput(f"{checkpoint.ref}: {info.name!r} is I8 without its {stem}.SCB")
            shape = (*scale.shape, info.size // max(1, scale.size))
            # our own experts lie flat, see moeforge_compress.methods.int8
            if info.shape not in (shape, (info.size, 1)) or info.size != math.prod(shape) or not scale.size:
                raise BadInput(
                    f"{checkpoint.ref}: {scale.name!r} is {list(scale.shape)}, not one for each row of {info.name!r} {list(info.shape)}"
                )
            parts = _present(checkpoint, {"codes": info.name, "scale": scale.name, "format": f"{stem}.weight_format"})
            by_row = {"codes": info.shape[0] // shape[0], "scale": 1}
            found.append(Coded(TensorInfo(info.name, dtype, shape), parts, _row_int8, 1, by_row))
    return found


def gptq(checkpoint: Checkpoint, settings: Mapping[str, Any], dtype: str) -> list[Coded]:
    """Integer codes with scale and zero point for each group of inputs."""
    bits = _bits(checkpoint, settings)
    # the first format stores zero - 1
    shift = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    return [
        _grouped(
            checkpoint,
            stem,
            (32 // bits * rows, columns),
            dtype,
            partial(_decode_gptq, bits=bits, shift=shift),
            settings,
        )
        for stem, (rows, columns) in _qweights(checkpoint)
    ]


def awq(checkpoint: Checkpoint, settings: Mapping[str, Any], dtype: str) -> list[Coded]:
    """4-bit codes in the gemm layout."""
    version = str(settings.get("version", "gemm")).lower()
    if version != "gemm" or _bits(checkpoint, settings) != 4:
        raise BadInput(
            f"{checkpoint.ref}: awq version {version!r} with {settings.get('bits')} bits; only 4-bit gemm is decoded here"
        )
    return [
        _grouped(checkpoint, stem, (rows, 8 * columns), dtype, _decode_awq, settings)
        for stem, (rows, columns) in _qweights(checkpoint)
    ]


SCHEMES: dict[str, Scheme] = {
    "fp8": fp8, "fbgemm_fp8": fp8, "compressed-tensors": compressed_tensors, "bitsandbytes": bitsandbytes,
    "nf4": bitsandbytes, "int8": bitsandbytes, "gptq": gptq, "awq": awq,
}  # fmt: skip
"""quant_method -> scheme; nf4 and int8 are moeforge's own methods, stored like bitsandbytes'."""


def _scaled(checkpoint: Checkpoint, info: TensorInfo, scale: str, block: Any, dtype: str) -> Coded:
    shape, given = info.shape[-2:], checkpoint.tensors[scale].shape
    if math.prod(given) > 1 and len(given) == 1:
        given = (*given, 1)
    if math.prod(given) > 1 and len(given) != len(info.shape):
        raise BadInput(
            f"{checkpoint.ref}: {scale!r} is {list(given)}, which does not go with {info.name!r} {list(info.shape)}"
        )
    if block is None:  # by row, or by group: whole divisors
        block = [-(-n // max(1, m)) for n, m in zip(shape, given[-2:], strict=False)]
    sizes = block if isinstance(block, list) and all(type(n) is int and n > 0 for n in block) else []
    fits = len(sizes) == len(shape) and given == (
        *info.shape[:-2],
        *(-(-n // b) for n, b in zip(shape, sizes, strict=True)),
    )
    if math.prod(given) > 1 and not fits:
        raise BadInput(
            f"{checkpoint.ref}: {scale!r} is {list(given)}, not one for each block of {block} of {info.name!r} {list(info.shape)}"
        )
    stem = info.name.removesuffix(".weight")
    parts = _present(checkpoint, {"codes": info.name, "scale": scale, "input": f"{stem}.input_scale", "act": f"{stem}.activation_scale",
                                  "static": f"{stem}.input_zero_point"})  # fmt: skip
    step, stored = 1, {"codes": 1}
    if math.prod(given) > 1:  # more than one scale: of a block of rows, or of a matrix in a stack
        step = block[0] if len(info.shape) == 2 else 1
        stored = {"codes": step, "scale": 1}
    decode = partial(_decode_scaled, given=given, block=block)
    return Coded(TensorInfo(info.name, dtype, info.shape), parts, decode, step, stored)


def _decode_scaled(parts: Parts, given: tuple[int, ...], block: list[int]) -> np.ndarray:
    codes, scale = parts["codes"].astype(np.float32), parts["scale"].astype(np.float32)
    if scale.size == 1:
        return codes * scale.reshape(())
    scale = scale.reshape(-1, *given[1:])
    for axis in (-2, -1):
        scale = np.repeat(scale, block[axis], axis)
    return codes * scale[..., : codes.shape[-2], : codes.shape[-1]]


def _packed(checkpoint: Checkpoint, stem: str, groups: list[Any], dtype: str) -> Coded:
    widths = {str(group["weights"].get("num_bits")) for group in groups if isinstance(group.get("weights"), dict)}
    if widths not in ({"4"}, {"8"}):
        raise BadInput(
            f"{checkpoint.ref}: pack-quantized with {sorted(widths)} bits; one width of 4 or 8 is decoded here"
        )
    bits = int(widths.pop())
    _refuse_parts(checkpoint, stem, ("weight_zero_point", "weight_g_idx"))
    parts = {"codes": f"{stem}.weight_packed", "scale": f"{stem}.weight_scale", "shape": f"{stem}.weight_shape"}
    _need(checkpoint, parts)
    told = (
        checkpoint.read(parts["shape"]).reshape(-1).tolist() if checkpoint.tensors[parts["shape"]].size == 2 else (0, 0)
    )
    rows, columns = (int(n) for n in told)
    codes, scale = (checkpoint.tensors[parts[role]].shape for role in ("codes", "scale"))
    whole = len(scale) == 2 and scale[0] == rows and scale[1] > 0 and columns > 0 and columns % scale[1] == 0
    if not whole or codes != (rows, -(-columns * bits // 32)) or checkpoint.tensors[parts["codes"]].dtype != "I32":
        raise BadInput(f"{checkpoint.ref}: {stem}.weight_packed, _scale and _shape do not fit each other")
    decode = partial(_decode_packed, bits=bits, columns=columns)
    by_row = {"codes": 1, "scale": 1}
    return Coded(TensorInfo(f"{stem}.weight", dtype, (rows, columns)), parts, decode, 1, by_row)


def _decode_packed(parts: Parts, bits: int, columns: int) -> np.ndarray:
    codes = _unpack(parts["codes"], bits)[:, :columns].astype(np.float32) - np.float32(1 << (bits - 1))
    scale = parts["scale"].astype(np.float32)
    return codes * np.repeat(scale, columns // scale.shape[1], 1)


def _four_bit(checkpoint: Checkpoint, name: str, state_name: str, dtype: str) -> Coded:
    try:
        state = json.loads(checkpoint.read(state_name).tobytes())  # trailing spaces are padding
        shape, block = tuple(int(n) for n in state["shape"]), int(state["blocksize"])
        nested = None
        if "nested_blocksize" in state:
            nested = {"blocksize": int(state["nested_blocksize"]), "offset": float(state["nested_offset"])}
        if not shape or min(shape) < 0 or min(block, nested["blocksize"] if nested else 1) < 1:
            raise ValueError(f"shape {list(shape)} in blocks of {block}")
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{checkpoint.ref}: {state_name!r} is not a description of 4-bit weights: {error}") from error
    keys = {"codes": name, "absmax": f"{name}.absmax", "quant_map": f"{name}.quant_map", "state": state_name}
    keys |= {key: f"{name}.{key}" for key in _NESTED if nested}
    _need(checkpoint, keys)
    info = TensorInfo(name, DTYPES.get(str(state.get("dtype")), dtype), shape)
    expected = {"codes": -(-info.size // 2), "absmax": -(-info.size // block), "quant_map": 16}
    if nested:
        expected |= {"nested_absmax": -(-expected["absmax"] // nested["blocksize"]), "nested_quant_map": 256}
    if any(checkpoint.tensors[keys[role]].size != size for role, size in expected.items()):
        raise BadInput(
            f"{checkpoint.ref}: {name!r} does not hold {list(shape)} in 4 bits with a scale for each {block}"
        )
    width = math.prod(shape[1:])
    decode = partial(_decode_four_bit, size=info.size, width=max(1, width), block=block, nested=nested)
    each = {"codes": 2, "absmax": block} | ({"nested_absmax": block * nested["blocksize"]} if nested else {})
    if not width or any(math.prod(checkpoint.tensors[keys[role]].shape[1:]) != 1 for role in each):
        return Coded(info, keys, decode)
    # the fewest rows that end where a byte, a scale and (nested) a scale of scales end
    unit = math.lcm(*each.values())
    step = unit // math.gcd(unit, width)
    return Coded(info, keys, decode, step, {role: step * width // weights for role, weights in each.items()})


def _decode_four_bit(parts: Parts, size: int, width: int, block: int, nested: Mapping[str, Any] | None) -> np.ndarray:
    packed = parts["codes"].reshape(-1)
    codes = np.empty(2 * packed.size, np.uint8)
    codes[0::2], codes[1::2] = packed >> 4, packed & 15  # the first weight lies in the high half
    scale = parts["absmax"].reshape(-1)
    if nested is not None:
        outer = np.repeat(parts["nested_absmax"].reshape(-1), nested["blocksize"])[: scale.size]
        scale = parts["nested_quant_map"].reshape(-1)[scale] * outer + np.float32(nested["offset"])
    count = min(size, codes.size)
    count -= count % width  # the last code of an odd number is padding
    values = parts["quant_map"].reshape(-1).astype(np.float32)[codes[:count]]
    return values * np.repeat(scale.astype(np.float32), block)[:count]


def _row_int8(parts: Parts) -> np.ndarray:
    if parts.get("format", np.zeros(1)).any():
        raise BadInput("int8 weights in a hardware's own tile order (weight_format is not 0) are not decoded here")
    scale = parts["scale"].astype(np.float32)[..., None] / np.float32(127)
    return parts["codes"].reshape(*scale.shape[:-1], -1) * scale


def _bits(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> int:
    bits = settings.get("bits", 4)
    if bits not in (2, 4, 8):
        raise BadInput(
            f"{checkpoint.ref}: {settings.get('quant_method')} with bits = {bits!r}; 2, 4 and 8 are decoded here"
        )
    return bits


def _qweights(checkpoint: Checkpoint) -> list[tuple[str, tuple[int, int]]]:
    found = []
    for info in checkpoint.tensors.values():
        if info.name.endswith(".qweight"):
            if len(info.shape) != 2 or info.dtype != "I32":
                raise BadInput(
                    f"{checkpoint.ref}: {info.name!r} is {info.dtype} {list(info.shape)}, expected an I32 matrix"
                )
            found.append((info.name.removesuffix(".qweight"), info.shape))
    return found


def _grouped(
    checkpoint: Checkpoint, stem: str, shape: tuple[int, int], dtype: str, decode, settings: Mapping[str, Any]
) -> Coded:
    """`shape` is [I, O]; the weight is shown as [O, I]."""
    parts = {"codes": f"{stem}.qweight", "zeros": f"{stem}.qzeros", "scales": f"{stem}.scales"}
    _need(checkpoint, parts)
    groups = checkpoint.tensors[parts["scales"]].shape
    size = settings.get("group_size", -1)
    size = shape[0] if size in (-1, None) else size
    if type(size) is not int or size < 1:
        raise BadInput(f"{checkpoint.ref}: group_size is {size!r}, expected a positive whole number or -1")
    if groups != (-(-shape[0] // size), shape[1]):
        raise BadInput(
            f"{checkpoint.ref}: {stem}.scales is {list(groups)}, not one for each group of {size} of {list(shape)}"
        )
    parts |= _present(checkpoint, {"groups": f"{stem}.g_idx"})
    return Coded(TensorInfo(f"{stem}.weight", dtype, shape[::-1]), parts, partial(decode, size=size))


def _decode_gptq(parts: Parts, bits: int, shift: int, size: int) -> np.ndarray:
    codes = _unpack(parts["codes"].T, bits).T
    zeros = _unpack(parts["zeros"], bits).astype(np.int32) + shift
    return _affine(codes, zeros, parts, size)


def _decode_awq(parts: Parts, size: int) -> np.ndarray:
    codes, zeros = (_unpack(parts[key], 4).reshape(len(parts[key]), -1, 8) for key in ("codes", "zeros"))
    place = np.argsort(_AWQ_ORDER)
    codes, zeros = (values[..., place].reshape(len(values), -1) for values in (codes, zeros))
    return _affine(codes, zeros.astype(np.int32), parts, size)


def _affine(codes: np.ndarray, zeros: np.ndarray, parts: Parts, size: int) -> np.ndarray:
    group = parts["groups"] if "groups" in parts else np.arange(len(codes)) // size
    scale = parts["scales"].astype(np.float32)
    return ((codes.astype(np.int32) - zeros[group]).astype(np.float32) * scale[group]).T


def _unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, columns * 32 / bits] from int32 [rows, columns]; the first code lies in the lowest bits."""
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((unsigned[..., None] >> shifts) & np.uint32((1 << bits) - 1)).astype(np.uint8).reshape(len(words), -1)


def _present(checkpoint: Checkpoint, parts: dict[str, str]) -> dict[str, str]:
    return {role: name for role, name in parts.items() if name in checkpoint.tensors}


def _need(checkpoint: Checkpoint, parts: Mapping[str, str]) -> None:
    missing = next((name for name in parts.values() if name not in checkpoint.tensors), None)
    if missing is not None:
        raise BadInput(
            f"{checkpoint.ref}: tensor {missing!r} is missing, without which {next(iter(parts.values()))!r} cannot be decoded"
        )


def _refuse_parts(checkpoint: Checkpoint, stem: str, names: tuple[str, ...]) -> None:
    found = next((f"{stem}.{name}" for name in names if f"{stem}.{name}" in checkpoint.tensors), None)
    if found is not None:
        raise BadInput(
            f"{checkpoint.ref}: {found!r}: zero points and reordered groups of compressed-tensors are not decoded here"
        )
