"""Refusals of sources that are damaged, of another kind than they say, or that the Hub does not give whole."""

import errno
import importlib
import json
import os
import struct
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from huggingface_hub import errors
from safetensors.torch import save_file

from moeforge.checkpoint import TensorInfo, architectures, hub, hub_gguf, open_checkpoint, shards
from moeforge.checkpoint.folder import Folder
from moeforge.checkpoint.gguf import _unstack
from moeforge.checkpoint.gguf_config import build_config
from moeforge.checkpoint.gguf_header import GGUFTensor
from moeforge.checkpoint.gguf_names import Place, families
from moeforge.checkpoint.index import Weights
from moeforge.checkpoint.safetensors import SafetensorsFile, read_header
from moeforge.errors import BadInput, MachineLacks

UP = "model.layers.0.mlp.up_proj"
# httpx, or the successor that newer clients of the Hub speak through
httpx = importlib.import_module(type(huggingface_hub.get_session()).__module__.partition(".")[0])
GEN = torch.Generator().manual_seed(11)


def write(where, tensors, **config):
    where.mkdir(exist_ok=True)
    save_file(tensors, where / "model.safetensors")
    (where / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32", **config}))
    return where


def normal(*shape):
    return torch.randn(*shape, generator=GEN)


def fp8(*shape):
    return normal(*shape).to(torch.float8_e4m3fn)


def whole(*shape, dtype=torch.int32):
    return torch.randint(1, 100, shape, generator=GEN, dtype=dtype)


def described(state):
    text = state if isinstance(state, str) else json.dumps(state)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
BNB = {"quant_method": "bitsandbytes"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8}
STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"


def packed(bits):
    return {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {str(n): {"weights": {"num_bits": n}} for n in bits}}  # fmt: skip


PACKED = {
    f"{UP}.weight_packed": whole(6, 2),
    f"{UP}.weight_scale": normal(6, 2),
    f"{UP}.weight_shape": torch.tensor([6, 16]),
}
GROUPED = {f"{UP}.qweight": whole(2, 8), f"{UP}.qzeros": whole(2, 1), f"{UP}.scales": normal(2, 8)}
FOUR = {
    f"{UP}.weight": whole(128, 1, dtype=torch.uint8),
    f"{UP}.weight.absmax": normal(4),
    f"{UP}.weight.quant_map": normal(16),
}


@pytest.mark.parametrize(("settings", "tensors", "told"), [
    ("nf4", {UP: normal(4)}, r"config\.json has quantization_config = 'nf4', an object is expected"),
    (FP8, {f"{UP}.weight": fp8(4, 4)}, r"up_proj\.weight' is F8_E4M3 without its .*up_proj\.weight_scale_inv"),
    (FP8, {f"{UP}.weight": fp8(70, 80), f"{UP}.weight_scale_inv": normal(3, 2)},
     r"weight_scale_inv' is \[3, 2\], not one for each block of \[32, 32\] of '.*up_proj\.weight' \[70, 80\]"),
    (FP8, {f"{UP}.weight": fp8(4, 6), f"{UP}.weight_scale_inv": normal(2, 2, 3)},
     r"weight_scale_inv' is \[2, 2, 3\], which does not go with '.*up_proj\.weight' \[4, 6\]"),
    (BNB, {f"{UP}.weight": whole(4, 8, dtype=torch.int8), f"{UP}.SCB": normal(3)},
     r"up_proj\.SCB' is \[3\], not one for each row of '.*up_proj\.weight' \[4, 8\]"),
    (BNB, FOUR | {STATE: described("no json")}, r"bitsandbytes__nf4' is not a description of 4-bit weights: Expecting value"),
    (BNB, FOUR | {STATE: described({"shape": [4, 64], "blocksize": 0})}, r"4-bit weights: shape \[4, 64\] in blocks of 0"),
    (BNB, FOUR | {STATE: described({"shape": [5, 64], "blocksize": 64})},
     r"up_proj\.weight' does not hold \[5, 64\] in 4 bits with a scale for each 64"),
    (packed([3]), PACKED, r"pack-quantized with \['3'\] bits; one width of 4 or 8 is decoded here"),
    (packed([4, 8]), PACKED, r"pack-quantized with \['4', '8'\] bits"),
    (packed([4]), PACKED | {f"{UP}.weight_shape": torch.tensor([6, 24])},
     r"up_proj\.weight_packed, _scale and _shape do not fit each other"),
    (packed([4]), PACKED | {f"{UP}.weight_zero_point": whole(6, 2)}, r"up_proj\.weight_zero_point': zero points and reordered groups"),
    (packed([4]), PACKED | {f"{UP}.weight_g_idx": whole(16)}, r"up_proj\.weight_g_idx': zero points and reordered groups"),
    (GPTQ, GROUPED | {f"{UP}.qweight": normal(2, 8)}, r"up_proj\.qweight' is F32 \[2, 8\], expected an I32 matrix"),
    (GPTQ, GROUPED | {f"{UP}.qweight": whole(16)}, r"up_proj\.qweight' is I32 \[16\], expected an I32 matrix"),
    (GPTQ | {"group_size": 0}, GROUPED, "group_size is 0, expected a positive whole number or -1"),
    (GPTQ | {"group_size": "8"}, GROUPED, "group_size is '8', expected a positive whole number or -1"),
    (GPTQ, GROUPED | {f"{UP}.scales": normal(3, 8)}, r"up_proj\.scales is \[3, 8\], not one for each group of 8 of \[16, 8\]"),
])  # fmt: skip
def test_quantised_weights_whose_parts_do_not_fit(settings, tensors, told, tmp_path):
    with pytest.raises(BadInput, match=told) as caught:
        open_checkpoint(write(tmp_path / "src", tensors, quantization_config=settings), dequantize=True)
    assert str(tmp_path / "src") in str(caught.value) and "\n" not in str(caught.value)


def test_a_group_that_has_no_scale_is_found_when_it_is_read(tmp_path):
    groups = torch.arange(16, dtype=torch.int32) // 8
    groups[5] = 2
    source = write(tmp_path / "src", GROUPED | {f"{UP}.g_idx": groups}, quantization_config=GPTQ)
    with open_checkpoint(source, dequantize=True) as opened:
        with pytest.raises(
            BadInput, match=r"the stored parts of '.*up_proj\.weight' do not fit each other: index 2 is out"
        ):
            opened.read(f"{UP}.weight")
        with pytest.raises(BadInput, match=r"no tensor '.*up_proj\.qweight'"):  # it is hidden behind the weight
            opened.read(f"{UP}.qweight")


def test_an_adapter_on_a_base_of_whole_numbers(tmp_path):
    base = write(tmp_path / "base", {f"{UP}.weight": whole(8, 6, dtype=torch.int8)})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stem = f"base_model.model.{UP}"
    lora = {f"{stem}.lora_A.weight": normal(2, 6), f"{stem}.lora_B.weight": normal(8, 2)}
    save_file(lora, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        BadInput, match=r"the base's model\.layers\.0\.mlp\.up_proj\.weight is I8, a quantised type; dequantise"
    ):
        open_checkpoint(adapter)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "./config.json"])
def test_names_that_lead_out_of_a_directory(name, tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "src").mkdir()
    with pytest.raises(BadInput, match="is not the name of a file below the directory") as caught:
        Folder(tmp_path / "src").read(name)
    assert repr(name) in str(caught.value)


def broken(*_, **__):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_files_that_the_disk_does_not_give(tmp_path, monkeypatch):
    source = write(tmp_path / "src", {"w": normal(4, 3)})
    weights = source / "model.safetensors"
    held = SafetensorsFile(weights, read_header(weights, "src"), "src: model.safetensors")
    weights.rename(tmp_path / "moved")
    with pytest.raises(BadInput, match=r"^src: model\.safetensors: cannot be read: No such file or directory"):
        held.read("w")
    file = tmp_path / "moved"
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("moeforge.checkpoint.open"), "open", broken, raising=False)
        with pytest.raises(BadInput, match=r"moved: cannot be read: Input/output error"):
            open_checkpoint(file)
    with monkeypatch.context() as patch:
        patch.setattr(type(source), "read_bytes", broken)
        with pytest.raises(BadInput, match=r"src: config\.json cannot be read: Input/output error"):
            Folder(source).config()


def test_pickled_tensors_that_are_not_plain(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for odd, told in (
        (normal(3, 2).to(torch.complex64), "tensor 'w' is torch.complex64, torch.strided; only plain tensors are read"),
        (normal(3, 2).to_sparse(), "tensor 'w' is torch.float32, torch.sparse_coo; only plain tensors are read"),
    ):
        torch.save({"w": odd}, tmp_path / "pytorch_model.bin")
        with pytest.raises(BadInput, match=told):
            open_checkpoint(tmp_path, allow_pickle=True)
    torch.save({"w": normal(3, 2)}, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path, allow_pickle=True) as opened, pytest.raises(BadInput, match="no tensor 'ghost'"):
        opened.read("ghost")


def test_a_header_that_readers_would_refuse(monkeypatch):
    infos = [TensorInfo(f"w{i}", "F32", (2, 3)) for i in range(5)]
    monkeypatch.setattr(shards, "MAX_HEADER_BYTES", 200)
    with pytest.raises(
        BadInput, match=r"model\.safetensors would need a header of \d+ bytes for 5 tensors; use smaller shards"
    ):
        shards.plan_shards(infos)
    assert len(shards.plan_shards(infos, max_shard_bytes=24)) == 5


def test_families_that_cannot_be_used(monkeypatch):
    with pytest.raises(BadInput, match="model_type = 'x_moe' with 2 mixtures: this is already a mixture of experts"):
        architectures.architecture({"model_type": "x_moe", "mixtures": [{}, {}]})
    with pytest.raises(
        BadInput,
        match=r"architectures = \['BertForChess'\]: the heads of bert that moeforge knows are .*BertForMaskedLM",
    ):
        architectures.find("bert").of_class({"architectures": ["BertForChess"]})
    layer = {"extra": "model.layers.{}.extra.weight"}
    point = SimpleNamespace(name="odd_llama", dist=None, load=lambda: {"like": "llama", "layer_tensors": layer})
    monkeypatch.delenv("MOEFORGE_PLUGINS", raising=False)
    monkeypatch.setattr(architectures.metadata, "entry_points", lambda **_: [point])
    with pytest.raises(BadInput, match="description of model_type = 'odd_llama' gives no shape for the role 'extra'"):
        architectures.find("odd_llama")


FAMILY = next(each for each in families() if each.arch == "llama" and each.model_type == "llama")
GGUF_KEYS = {
    "block_count": 2, "context_length": 64, "embedding_length": 16, "feed_forward_length": 24, "attention.head_count": 4,
    "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize(("keys", "told"), [
    ({"feed_forward_length": np.array([24, 32])}, r"llama\.feed_forward_length differs from layer to layer, which llama cannot express"),
    ({"attention.head_count": 0}, r"llama\.attention\.head_count must be at least 1"),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, r"yarn rope scaling without rope\.scaling\.original_context_length"),
])  # fmt: skip
def test_gguf_settings_that_config_json_cannot_say(keys, told):
    named = {"token_embd.weight": GGUFTensor("token_embd.weight", Kind.F32, (40, 16), 0, 40 * 16 * 4)}

    def build(keys):
        metadata = {f"llama.{key}": value for key, value in keys.items()}
        return build_config(FAMILY, metadata, named, None, "F32", "m.gguf")

    assert build(GGUF_KEYS | {"feed_forward_length": np.array([24, 24])})["intermediate_size"] == 24
    with pytest.raises(BadInput, match=f"^m.gguf: {told}"):
        build(GGUF_KEYS | keys)


def test_gguf_tensors_of_another_shape_than_their_place():
    plain = {"heads": None, "optional": False, "vector": False, "f32": False, "never_zero": False}
    experts = Place(("e0", "e1", "e2"), stacked=True, **plain)
    for shape in ((2, 8, 6), (8, 6)):
        tensor = GGUFTensor("blk.0.ffn_up_exps.weight", Kind.F32, shape, 0, 384)
        with pytest.raises(BadInput, match=r"ffn_up_exps\.weight' has shape \(.*8, 6\), expected 3 stacked experts"):
            _unstack(tensor, experts, "m.gguf")
    for kind, shape in ((Kind.F32, (2, 8, 6)), (Kind.Q8_0, (64,))):
        tensor = GGUFTensor("output_norm.weight", kind, shape, 0, 384)
        with pytest.raises(
            BadInput, match=rf"output_norm\.weight' is {kind.name} \(.*\), expected a matrix or a plain vector"
        ):
            _unstack(tensor, Place(("norm",), stacked=False, **plain), "m.gguf")


def answer(status):
    return httpx.Response(status, request=httpx.Request("GET", "http://hub/org/m"))


@pytest.mark.parametrize(("error", "kind", "told"), [
    (errors.GatedRepoError("hf_secret", response=answer(403)), BadInput, "the repository is gated; accept its terms"),
    (errors.RemoteEntryNotFoundError("hf_secret", response=answer(404)), BadInput, "lacks a file that it should have"),
    (errors.HFValidationError("hf_secret"), BadInput, "not a valid Hub id; write org/name"),
    (errors.HfHubHTTPError("hf_secret", response=answer(418)), BadInput, r"the Hub refused \(HTTP 418\)"),
    (OSError(errno.ENOSPC, "hf_secret"), MachineLacks, "the disk of the Hub's cache is full"),
    (ConnectionResetError("hf_secret"), MachineLacks, r"the Hub cannot be reached \(ConnectionResetError\)"),
])  # fmt: skip
def test_what_the_hubs_client_raises(error, kind, told):
    with pytest.raises(kind, match=f"^org/m: .*{told}") as caught, hub.hub_errors("org/m"):
        raise error
    assert type(caught.value) is kind and "hf_secret" not in str(caught.value) and caught.value.__cause__ is error


def test_other_errors_of_the_machine_are_not_the_hubs():
    error = OSError(errno.EIO, "disk")
    with pytest.raises(OSError) as caught, hub.hub_errors("org/m"):
        raise error
    assert caught.value is error


def test_a_repository_without_a_commit(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha=None, siblings=[]))
    with pytest.raises(BadInput, match=r"^org/m: the Hub names no commit for it"):
        open_checkpoint("org/m")


def test_an_answer_of_unknown_size(monkeypatch):
    asked = []

    def reply(request):
        asked.append(request.headers["Range"])
        return httpx.Response(206, content=iter([b"abcdef"]))

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: httpx.Client(transport=httpx.MockTransport(reply)))
    with pytest.raises(BadInput, match=r"^org/m: x: the Hub does not say how large it is"):
        hub.read_range("org/m", "x", "main", 2, 4, "org/m: x")
    assert asked == ["bytes=2-5"]


@pytest.fixture
def offline(monkeypatch):
    """Nothing of any repository is in the cache."""
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)


def test_a_repository_that_is_not_whole(offline, monkeypatch, tmp_path):
    weights = Weights("model.safetensors")
    with pytest.raises(
        BadInput, match=r"^org/m: config\.json is missing from the repository; its upload is incomplete"
    ):
        hub.HubCheckpoint("org/m", "org/m", "c0ffee", {"model.safetensors"}, weights, None)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(hub.HubCheckpoint, "_local", lambda _, file: tmp_path / file)
    sent = struct.pack("<Q", 5000) + b"{"
    monkeypatch.setattr(hub, "read_range", lambda *_: (sent, 90_000))
    with pytest.raises(BadInput, match=r"model\.safetensors: the Hub sent 9 of the header's 5008 bytes; try again"):
        hub.HubCheckpoint("org/m", "org/m", "c0ffee", {"config.json", "model.safetensors"}, weights, None)


def test_a_gguf_that_comes_in_part(offline, monkeypatch, tmp_path):
    def opened():
        return hub_gguf.HubGGUF("org/m/a.gguf", "org/m", "c0ffee", "a.gguf", None)

    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("rope_freqs.weight", np.random.default_rng(5).normal(size=8).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = (tmp_path / "a.gguf").read_bytes()
    limit = 30

    def read_range(name, file, commit, start, count, where):
        return data[start : min(limit, start + count)], len(data)

    monkeypatch.setattr(hub_gguf, "read_range", read_range)
    with pytest.raises(BadInput, match=rf"^org/m/a\.gguf: the Hub sent 30 of {len(data)} bytes and no more; try again"):
        opened()
    with monkeypatch.context() as patch:
        patch.setattr(hub_gguf, "MAX_HEADER_BYTES", 20)
        with pytest.raises(BadInput, match=r"^org/m/a\.gguf: its header is longer than 20 bytes: damaged"):
            opened()
    limit = len(data) - 8
    # the tensor is padded to 32 bytes: 8 numbers fill it
    with pytest.raises(BadInput, match=r"tensor 'rope_freqs\.weight': the Hub sent 24 of 32 bytes; try again"):
        opened()
