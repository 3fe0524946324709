"""Damaged GGUF files: one line of BadInput each, never a traceback, never a read outside the file."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.gguf import GGUFCheckpoint
from moeforge.checkpoint.gguf_header import read_header
from moeforge.errors import BadInput, MoeforgeError
from moeforge.testing.models import tiny_dense


@pytest.fixture
def whole(tmp_path, make_gguf) -> tuple[Path, bytes]:
    """A whole file with a tokenizer, and its bytes."""
    path = tmp_path / "m.gguf"
    tokens = {"model": "gpt2", "pre": "smollm", "tokens": ["a", "b", "ab", "<e>"], "token_type": [1, 1, 1, 3], "merges": ["a b"],
              "eos_token_id": 3, "add_bos_token": False}  # fmt: skip
    model, _ = tiny_dense("llama", num_hidden_layers=1)
    make_gguf(path, model, **{f"tokenizer.ggml.{key}": value for key, value in tokens.items()})
    return path, path.read_bytes()


def use(path: Path) -> None:
    """Everything that a conversion would do with a source."""
    with GGUFCheckpoint(path) as source:
        for name in source.tensors:
            source.read(name)
        source.companions()
        source.provenance()


def end_of_header(data: bytes) -> int:
    return data.index(b"output_norm.weight") + 200


def test_the_whole_file_is_read(whole):
    use(whole[0])
    header = read_header(whole[0])
    assert header.metadata["tokenizer.ggml.tokens"] == ["a", "b", "ab", "<e>"]
    assert header.metadata["tokenizer.ggml.token_type"].tolist() == [1, 1, 1, 3]


def test_every_cut_is_refused(whole):
    path, data = whole
    limit = end_of_header(data)
    for length in [0, 3, 4, 7, 8, 23, *range(24, limit, 61), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(BadInput) as caught:
            use(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_flipped_bytes_never_crash(whole):
    path, data = whole
    rng = np.random.default_rng(0)
    limit, refused = end_of_header(data), []
    for _ in range(400):
        broken = bytearray(data)
        for at in rng.integers(0, limit, rng.integers(1, 4)):
            broken[at] = rng.integers(0, 256)
        path.write_bytes(broken)
        try:
            use(path)
        except MoeforgeError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert not any("\n" in line for line in refused)


HEAD = struct.Struct("<4sIQQ")
DAMAGE = {
    "not a GGUF": b"GGUX" + bytes(20),
    "version 0x1,": HEAD.pack(b"GGUF", 1, 0, 0),
    "big-endian": struct.pack(">4sIQQ", b"GGUF", 3, 0, 0),
    "ends within its header": HEAD.pack(b"GGUF", 3, 0, 1 << 60),
    "runs beyond": HEAD.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q", 1 << 62),
    "stands twice": HEAD.pack(b"GGUF", 3, 0, 2) + 2 * (struct.pack("<Q", 1) + b"k" + struct.pack("<II", 4, 7)),
    "unknown metadata type": HEAD.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 99),
    "nested array": HEAD.pack(b"GGUF", 3, 0, 1)
    + struct.pack("<Q", 1)
    + b"k"
    + struct.pack("<IIQ", 9, 9, 1)
    + bytes(64),
    "utf-8": HEAD.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q", 1) + b"\xff" + struct.pack("<II", 4, 7),
}


def _tensor(name: bytes, shape, kind: int, offset: int) -> bytes:
    body = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape))
    return body + b"".join(struct.pack("<Q", n) for n in shape) + struct.pack("<IQ", kind, offset)


TENSORS = {
    "unknown type 999": [_tensor(b"t", (8,), 999, 0)],
    "ends at byte": [_tensor(b"t", (8,), 0, 1 << 40)],
    "overlaps": [_tensor(b"t", (32,), 0, 0), _tensor(b"u", (32,), 0, 64)],
    "stands twice": [_tensor(b"t", (8,), 0, 0), _tensor(b"t", (8,), 0, 32)],
    "dimensions": [_tensor(b"t", (), 0, 0)],
    "whole Q4_1 blocks": [_tensor(b"t", (40, 4), 3, 0)],
    "shape": [_tensor(b"t", (8, 0), 0, 0)],
}


@pytest.mark.parametrize("word", DAMAGE)
def test_bad_headers(word, tmp_path):
    (tmp_path / "m.gguf").write_bytes(DAMAGE[word])
    with pytest.raises(BadInput, match=word):
        read_header(tmp_path / "m.gguf")


@pytest.mark.parametrize("word", TENSORS)
def test_bad_tensor_tables(word, tmp_path):
    table = TENSORS[word]
    (tmp_path / "m.gguf").write_bytes(HEAD.pack(b"GGUF", 3, len(table), 0) + b"".join(table) + bytes(1000))
    with pytest.raises(BadInput, match=word):
        read_header(tmp_path / "m.gguf")


def test_a_file_that_shrinks_while_open(whole):
    path, data = whole
    with GGUFCheckpoint(path) as source:
        path.write_bytes(data[: len(data) // 2])
        last = list(source.tensors)[-1]
        with pytest.raises(BadInput, match="it was cut"):
            source.read(last)


def test_formats_that_cannot_be_decoded(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.int32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(BadInput, match="I32"):
        open_checkpoint(tmp_path / "m.gguf")
    with pytest.raises(BadInput, match="cannot be read"):
        GGUFCheckpoint(tmp_path / "missing.gguf")
