"""Quantised sources decoded: against bitsandbytes itself, and for the other methods against codes packed here bit by bit."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moeforge.checkpoint import open_checkpoint
from moeforge.errors import BadInput

NAME = "model.layers.0.mlp.up_proj"


def save(where, tensors, settings, dtype="float32", **config):
    tensors = {name: torch.as_tensor(value).contiguous() for name, value in tensors.items()}
    tensors["model.norm.weight"] = torch.tensor([2.0, 3.0, 5.0, 7.0])
    where.mkdir(exist_ok=True)
    save_file(tensors, where / "model.safetensors")
    body = {"model_type": "llama", "dtype": dtype, "quantization_config": settings, **config}
    (where / "config.json").write_text(json.dumps({key: value for key, value in body.items() if value is not None}))
    return where


def decoded(where, name=NAME + ".weight"):
    with pytest.raises(BadInput, match="dequantize"):
        open_checkpoint(where)
    with open_checkpoint(where, dequantize=True) as source:
        assert "quantization_config" not in source.config
        assert sorted(source.tensors) == sorted([name, "model.norm.weight"])
        values = source.read(name)
        assert values.shape == source.tensors[name].shape
        assert values.flags.c_contiguous
        np.testing.assert_array_equal(source.read(name, slice(1, 4)), values[1:4])
        stored = json.loads((where / "config.json").read_text())["quantization_config"]
        assert source.provenance()["dequantized"] == stored["quant_method"]
        assert source.extent(name) is None
        place = source.extent("model.norm.weight")
        assert place is not None
        assert np.fromfile(place.path, np.float32, place.nbytes // 4, offset=place.offset).tolist() == [
            2.0,
            3.0,
            5.0,
            7.0,
        ]
    return values


@pytest.mark.parametrize(("kind", "nested"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_bitsandbytes_4bit(kind, nested, tmp_path):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(37, 130, generator=torch.Generator().manual_seed(0))
    codes, state = quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    tensors = {f"{NAME}.weight": codes} | {
        f"{NAME}.weight.{key}": value for key, value in state.as_dict(packed=True).items()
    }
    got = decoded(save(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}))
    np.testing.assert_allclose(got, dequantize_4bit(codes, state).numpy(), rtol=1e-6, atol=1e-7)
    assert 0.01 < np.abs(got - weight.numpy()).max() < 1, "an approximation of the weights, not something else"


def test_bitsandbytes_int8(tmp_path):
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    weight = torch.randn(9, 50, generator=torch.Generator().manual_seed(1)).half()
    codes, scale, _ = int8_vectorwise_quant(weight)
    tensors = {
        f"{NAME}.weight": codes,
        f"{NAME}.SCB": scale,
        f"{NAME}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    got = decoded(save(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}))
    np.testing.assert_allclose(got, int8_vectorwise_dequant(codes, scale).numpy(), rtol=1e-6)
    tensors[f"{NAME}.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    tiled = open_checkpoint(save(tmp_path, tensors, {"quant_method": "bitsandbytes"}), dequantize=True)
    with tiled, pytest.raises(BadInput, match="weight_format"):
        tiled.read(f"{NAME}.weight")


def test_our_own_compression_with_experts(tmp_path):
    """What `compress` writes for experts: a moeforge config around the stock one, experts in one tensor."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(2))
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    stats = state.as_dict(packed=True)
    tensors = {f"{NAME}.weight": codes} | {f"{NAME}.weight.{key}": value for key, value in stats.items()}
    where = save(tmp_path, tensors, None, base_config={"model_type": "mixtral", "dtype": "float32"})
    body = json.loads((where / "config.json").read_text()) | {"moeforge_compression": {"method": "nf4", "version": 1}}
    (where / "config.json").write_text(json.dumps(body))
    with open_checkpoint(where, dequantize=True) as source:
        assert source.config["model_type"] == "mixtral"
        got = source.read(f"{NAME}.weight")
    np.testing.assert_allclose(got, dequantize_4bit(codes, state).reshape(3, 8, 64).numpy(), rtol=1e-6, atol=1e-7)


def test_fp8_blocks(tmp_path):
    rng = np.random.default_rng(3)
    codes = rng.normal(size=(70, 40)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, (3, 2)).astype(np.float32)
    tensors = {
        f"{NAME}.weight": torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn),
        f"{NAME}.weight_scale_inv": scale,
    }
    got = decoded(save(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [32, 32]}))
    for i in range(70):
        for j in range(40):
            assert got[i, j] == np.float32(codes[i, j]) * scale[i // 32, j // 32]


@pytest.mark.parametrize("shape", [(), (1,), (12,), (12, 1)])
def test_fp8_scales_of_other_shapes(shape, tmp_path):
    rng = np.random.default_rng(4)
    codes = rng.normal(size=(12, 6)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, shape).astype(np.float32)
    tensors = {f"{NAME}.weight": torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn), f"{NAME}.weight_scale": scale,
               f"{NAME}.input_scale": np.float32(3)}  # fmt: skip
    got = decoded(save(tmp_path, tensors, {"quant_method": "compressed-tensors", "format": "float-quantized"}))
    rows = scale.reshape(-1, 1) if scale.size > 1 else scale.reshape(1, 1)
    np.testing.assert_array_equal(got, codes.astype(np.float32) * rows)


def pack(codes: np.ndarray, bits: int, order=None) -> np.ndarray:
    """[n, m] -> int32 [n, m * bits / 32], one code at a time; the first lies lowest."""
    each = 32 // bits
    order = order or range(each)
    words = np.zeros((codes.shape[0], codes.shape[1] // each), np.uint32)
    for i in range(words.shape[0]):
        for j in range(words.shape[1]):
            for k, source in enumerate(order):
                words[i, j] |= np.uint32(int(codes[i, j * each + source]) << (bits * k))
    return words.view(np.int32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(bits, act_order, version, tmp_path):
    rng = np.random.default_rng(5)
    inputs, outputs, size = 64, 48, 32
    codes = rng.integers(0, 1 << bits, (inputs, outputs))
    zeros = rng.integers(0, (1 << bits) - 1, (2, outputs))
    scales = rng.uniform(0.01, 0.1, (2, outputs)).astype(np.float16)
    groups = rng.permutation(np.arange(inputs) // size) if act_order else np.arange(inputs) // size
    tensors = {f"{NAME}.qweight": pack(codes.T, bits).T.copy(), f"{NAME}.qzeros": pack(zeros, bits), f"{NAME}.scales": scales,
               f"{NAME}.g_idx": groups.astype(np.int32)}  # fmt: skip
    got = decoded(
        save(
            tmp_path, tensors, {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": version}
        )
    )
    assert got.shape == (outputs, inputs)
    for i in range(inputs):
        for o in range(outputs):
            zero = zeros[groups[i], o] + (version == "gptq")
            assert got[o, i] == np.float32(codes[i, o] - zero) * np.float32(scales[groups[i], o])


def test_awq(tmp_path):
    rng = np.random.default_rng(6)
    inputs, outputs, size = 64, 16, 32
    codes, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (2, outputs))
    scales = rng.uniform(0.01, 0.1, (2, outputs)).astype(np.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        f"{NAME}.qweight": pack(codes, 4, order),
        f"{NAME}.qzeros": pack(zeros, 4, order),
        f"{NAME}.scales": scales,
    }
    got = decoded(save(tmp_path, tensors, {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}))
    for i in range(inputs):
        for o in range(outputs):
            assert got[o, i] == np.float32(codes[i, o] - zeros[i // size, o]) * np.float32(scales[i // size, o])


def test_pack_quantized(tmp_path):
    rng = np.random.default_rng(7)
    codes = rng.integers(-8, 8, (10, 64))
    scales = rng.uniform(0.01, 0.1, (10, 2)).astype(np.float32)
    tensors = {f"{NAME}.weight_packed": pack(codes + 8, 4), f"{NAME}.weight_scale": scales,
               f"{NAME}.weight_shape": np.array([10, 64], np.int64)}  # fmt: skip
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {"weights": {"num_bits": 4}}},
    }
    got = decoded(save(tmp_path, tensors, settings))
    np.testing.assert_array_equal(got, codes.astype(np.float32) * np.repeat(scales, 32, 1))


def test_dtype_follows_the_config(tmp_path):
    codes = torch.randint(-127, 128, (4, 8), dtype=torch.int8)
    tensors = {f"{NAME}.weight": codes, f"{NAME}.SCB": torch.rand(4) + 1}
    with open_checkpoint(
        save(tmp_path, tensors, {"quant_method": "bitsandbytes"}, dtype="bfloat16"), dequantize=True
    ) as source:
        assert source.read(f"{NAME}.weight").dtype == ml_dtypes.bfloat16


REFUSED = [
    ({"quant_method": "mxfp4"}, {}, "mxfp4"),
    ({"quant_method": "aqlm"}, {}, "aqlm"),
    ({"quant_method": "gptq", "bits": 3}, {}, "bits = 3"),
    ({"quant_method": "awq", "version": "gemv"}, {}, "gemv"),
    ({"quant_method": "fp8"}, {}, "no tensor is stored"),
    ({"quant_method": "bitsandbytes"}, {f"{NAME}.weight": torch.zeros(2, 2, dtype=torch.int8)}, "SCB"),
    ({"quant_method": "gptq", "bits": 4}, {f"{NAME}.qweight": torch.zeros(2, 8, dtype=torch.int32)}, "missing"),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, {}, "nvfp4"),
]


@pytest.mark.parametrize(("settings", "tensors", "word"), REFUSED)
def test_refused_by_name(settings, tensors, word, tmp_path):
    where = save(tmp_path, dict(tensors), settings)
    with pytest.raises(BadInput, match=word) as caught:
        open_checkpoint(where, dequantize=True)
    assert "\n" not in str(caught.value)


def test_our_own_compression_is_refused_by_name_unless_its_stored_form_is_wanted(tmp_path):
    tensors = {f"{NAME}.weight": torch.randint(-127, 128, (4, 8), dtype=torch.int8), f"{NAME}.SCB": torch.rand(4) + 1}
    mark = {"moeforge_compression": {"method": "int8", "version": 1}}
    for settings in ({"quant_method": "bitsandbytes", "load_in_8bit": True}, None):
        where = save(tmp_path, tensors, settings, **mark)
        with pytest.raises(BadInput, match=r"quantised \(.*\); pass --dequantize"):
            open_checkpoint(where)
        for words in ({"dequantize": None}, {"compressed": True}):
            with open_checkpoint(where, **words) as stored:
                assert f"{NAME}.SCB" in stored.tensors
        with open_checkpoint(where, compressed=True, dequantize=True) as plain:
            assert f"{NAME}.SCB" not in plain.tensors
    plan = {"config": {"model_type": "llama", **mark}, "tensors": {f"{NAME}.SCB": ["F32", [4]]}}
    with pytest.raises(BadInput, match="int8"):
        open_checkpoint("-", plan=plan)


def test_upcycle_of_a_compressed_source_says_so(tmp_path):
    from moeforge.testing.command import run
    from moeforge.testing.models import save_tiny

    save_tiny(tmp_path / "dense", "llama")
    run("compress", tmp_path / "dense", "--method", "int8", "--no-eval", "-o", tmp_path / "small", check=True)
    refused = run("upcycle", tmp_path / "small", "--experts", 2, "--top-k", 1, "--dry-run")
    assert refused.code == 3 and "--dequantize" in refused.err and "would be lost" not in refused.err


def stored_bitsandbytes(nested):
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(1003, 128, generator=torch.Generator().manual_seed(8))
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
    stats = {f"{NAME}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {f"{NAME}.weight": codes, **stats}, {"quant_method": "bitsandbytes", "load_in_4bit": True}


def stored_int8():
    codes = torch.randint(-127, 128, (1003, 96), dtype=torch.int8, generator=torch.Generator().manual_seed(9))
    return {f"{NAME}.weight": codes, f"{NAME}.SCB": torch.rand(1003) + 1}, {"quant_method": "bitsandbytes"}


def stored_fp8():
    rng = np.random.default_rng(10)
    codes = torch.from_numpy(rng.normal(size=(1003, 96)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    scale = rng.uniform(0.5, 2, (63, 3)).astype(np.float32)
    tensors = {f"{NAME}.weight": codes.view(torch.float8_e4m3fn), f"{NAME}.weight_scale_inv": scale}
    return tensors, {"quant_method": "fp8", "weight_block_size": [16, 32]}


def stored_packed():
    rng = np.random.default_rng(11)
    words = rng.integers(-(2**31), 2**31, (1003, 12), dtype=np.int64).astype(np.int32)
    tensors = {f"{NAME}.weight_packed": words, f"{NAME}.weight_scale": rng.uniform(0.01, 0.1, (1003, 3)).astype(np.float32),
               f"{NAME}.weight_shape": np.array([1003, 96], np.int64)}  # fmt: skip
    groups = {"g": {"weights": {"num_bits": 4}}}
    return tensors, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def stored_gptq():
    rng = np.random.default_rng(12)
    words = [rng.integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32) for shape in ((12, 1000), (3, 125))]
    tensors = {f"{NAME}.qweight": words[0], f"{NAME}.qzeros": words[1],
               f"{NAME}.scales": rng.uniform(0.01, 0.1, (3, 1000)).astype(np.float16)}  # fmt: skip
    return tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32}


STORED = {
    "nf4": lambda: stored_bitsandbytes(False), "nested nf4": lambda: stored_bitsandbytes(True), "int8": stored_int8,
    "fp8": stored_fp8, "packed": stored_packed, "gptq": stored_gptq,
}  # fmt: skip


@pytest.mark.parametrize("kind", STORED)
def test_row_groups_decode_their_own_rows_and_hold_what_they_say(kind, tmp_path):
    """Any rows are those of the whole, bit for bit; walking through a matrix reads its parts about once."""
    import tracemalloc

    tensors, settings = STORED[kind]()
    name = f"{NAME}.weight"
    with open_checkpoint(save(tmp_path, tensors, settings), dequantize=True) as source:
        whole = source.read(name)
        inner, taken = source.inner.read, []
        source.inner.read = lambda *words: taken.append(inner(*words)) or taken[-1]
        groups = [slice(at, min(at + 101, len(whole))) for at in range(0, len(whole), 101)]
        np.testing.assert_array_equal(np.concatenate([source.read(name, rows) for rows in groups]), whole)
        once = sum(source.inner.tensors[part].nbytes for part in source.coded[name].parts.values())
        assert sum(part.nbytes for part in taken) < 2.5 * once, "every group of rows read the whole matrix"
        for rows in (slice(7, 7), slice(63, 65), slice(-5, None), slice(1, 4)):
            np.testing.assert_array_equal(source.read(name, rows), whole[rows])
        assert np.unique(whole).size > 100
        for rows in (None, slice(200, 400)):
            source.read(name, slice(-1, None))  # nothing is kept after the last row
            taken.clear()
            tracemalloc.start()
            nbytes = source.read(name, rows).nbytes
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak <= source.read_memory(name, nbytes) < 8 * peak
