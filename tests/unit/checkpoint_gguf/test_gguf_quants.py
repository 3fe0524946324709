"""Blocks to numbers, against the `gguf` package's own decoder on random bits of every format."""

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Kind

from moeforge.checkpoint import gguf_quants

CODED = [kind for kind in Kind if gguf_quants.supported(kind) and kind not in gguf_quants.PLAIN]


def random_blocks(kind: Kind, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Blocks of random bits, without those that decode to infinity or NaN."""
    block, size = GGML_QUANT_SIZES[kind]
    rng, want, found = np.random.default_rng(seed), rows * columns // block, []
    while sum(map(len, found)) < want:
        blocks = rng.integers(0, 256, (want, size), dtype=np.uint8)
        with np.errstate(all="ignore"):
            values = quants.dequantize(blocks.reshape(want, size), kind)
        found.append(blocks[np.isfinite(values).all(1) & (np.abs(values) < 1e30).all(1)])
    return np.concatenate(found)[:want].reshape(rows, -1)


def test_the_promised_formats_are_there():
    names = {kind.name for kind in CODED}
    assert {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"} <= names


@pytest.mark.parametrize("kind", CODED, ids=lambda kind: kind.name)
def test_same_bits_as_the_gguf_package(kind, monkeypatch):
    columns = 3 * GGML_QUANT_SIZES[kind][0]
    raw = random_blocks(kind, 11, columns)
    expected = quants.dequantize(raw, kind)
    assert np.ptp(expected) > 0
    for chunk in (1 << 17, GGML_QUANT_SIZES[kind][0] * 4):  # one chunk, and many with a short last one
        monkeypatch.setattr(gguf_quants, "_CHUNK", chunk)
        got = gguf_quants.dequantize(raw, kind, np.dtype(np.float32))
        assert got.shape == (11, columns)
        np.testing.assert_array_equal(got, expected)
    with np.errstate(over="ignore"):
        for dtype in (np.float16, ml_dtypes.bfloat16):
            np.testing.assert_array_equal(gguf_quants.dequantize(raw, kind, np.dtype(dtype)), expected.astype(dtype))
