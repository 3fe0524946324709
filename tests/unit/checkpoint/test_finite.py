"""Infinite weights and NaN end a conversion while they are read, whichever way they are read."""

import ml_dtypes
import numpy as np
import pytest

from moeforge.checkpoint import Input, TensorInfo, TensorOp, open_checkpoint
from moeforge.checkpoint import feed as feed_module
from moeforge.checkpoint.directory import DirectoryCheckpoint
from moeforge.checkpoint.finite import check_finite
from moeforge.checkpoint.tensor import NUMPY_DTYPES, SAFETENSORS_DTYPES
from moeforge.checkpoint.writer import plan_shards, write_checkpoint
from moeforge.errors import BadInput

FLOATS = ["F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"]


def random_bits(dtype, shape, seed):
    """Every bit pattern may come up: subnormals, both zeros, infinities, NaN of every payload."""
    return np.random.default_rng(seed).integers(0, 256, (*shape, NUMPY_DTYPES[dtype].itemsize), np.uint8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_it_agrees_with_isfinite_on_every_pattern(dtype):
    kind = NUMPY_DTYPES[dtype]
    bits = random_bits(dtype, (20_000,), 1)
    bits[:2000, -1] |= 0x7F  # for the wide types, which hardly ever come up otherwise
    bits[1000:2000, -2:] |= 0xF0
    values = bits.reshape(-1).view(kind)
    finite = np.isfinite(values.astype(np.float64))
    assert finite.any() and not finite.all()
    for value, good in zip(values[:3000], finite[:3000], strict=True):
        data, info = np.array([1, value, -2], kind).view(np.uint8).data, TensorInfo("w", dtype, (3,))
        if good:
            check_finite(data, info, "file")
        else:
            with pytest.raises(BadInput, match=r"file: tensor 'w' .* at \[1\]"):
                check_finite(data, info, "file")
    check_finite(values[finite].view(np.uint8).data, TensorInfo("w", dtype, (int(finite.sum()),)), "file")


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_numbers_pass(dtype):
    kind = NUMPY_DTYPES[dtype]
    top = float(ml_dtypes.finfo(kind).max)
    data = np.array([top, -top, 0, -0.0], kind)
    check_finite(data.view(np.uint8).data, TensorInfo("w", dtype, (4,)), "file")


def test_whole_numbers_of_any_bits_pass():
    for dtype in ("I8", "U8", "I16", "I32", "U64", "BOOL"):
        bits = np.full((6, NUMPY_DTYPES[dtype].itemsize), 0xFF, np.uint8)
        check_finite(bits.reshape(-1).data, TensorInfo("w", dtype, (6,)), "file")
    check_finite(memoryview(b""), TensorInfo("w", "F32", (0, 3)), "file")


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("way", ["copied", "rows copied", "decoded", "computed", "rows computed"])
def test_every_way_of_reading_refuses_and_names_the_place(dtype, way, bad, tmp_path, monkeypatch):
    monkeypatch.setattr(feed_module, "PIECE", 64)
    monkeypatch.setattr(feed_module, "_ROWS_BYTES", 100)
    kind = NUMPY_DTYPES[dtype]
    values = np.random.default_rng(5).normal(size=(40, 7)).astype(kind)
    values[23, 4] = bad
    sound, broken, out = (tmp_path / name for name in ("sound", "broken", "out"))
    written = np.where(np.isfinite(values.astype(np.float64)), values, kind.type(1))
    for where in (sound, broken, out):
        where.mkdir()
        if where is not out:
            save(where, {"a.weight": written, "w": values if where is broken else written})
    rows = slice(9, 30) if "rows" in way else None
    if way == "decoded":
        monkeypatch.setattr(DirectoryCheckpoint, "extent", lambda *_: None)
    for where in (sound, broken):
        with open_checkpoint(where) as opened:
            shape = (21, 7) if rows else (40, 7)
            compute = (lambda w: w * 1) if "computed" in way else None
            ops = [TensorOp((TensorInfo("w", dtype, shape),), (Input(opened, "w", rows),), compute)]
            if where is sound:
                write_checkpoint(ops, out)
                continue
            with pytest.raises(BadInput) as refused:
                write_checkpoint(ops, tmp_path / "out")
    said = str(refused.value)
    assert f"tensor 'w' {dtype} [40, 7]" in said and "at [23, 4]" in said and str(broken) in said, said


def save(where, tensors):
    """A directory of one file; bfloat16 is written by its bytes."""
    infos = [TensorInfo(name, SAFETENSORS_DTYPES[array.dtype], array.shape) for name, array in tensors.items()]
    (shard,) = plan_shards(infos)
    (where / shard.name).write_bytes(shard.header + b"".join(tensors[info.name].tobytes() for info in shard.tensors))
    (where / "config.json").write_text('{"model_type": "test"}')
