"""What compress writes: the bytes that bitsandbytes and transformers write themselves, for every matrix, experts included."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import moeforge
from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.roles import is_matrix, role_of
from moeforge.checkpoint.tensor import TensorInfo
from moeforge.errors import BadInput, GateRefused, UsageProblem
from moeforge.model.load import assemble
from moeforge.testing.models import SIZES, tiny, tiny_dense, tiny_tokenizer
from moeforge_compress import accounting
from moeforge_compress.methods.int8 import Int8
from moeforge_compress.methods.nf4 import NF4
from moeforge_compress.runtime import CodedLinear, ExpertStack

MIXTURES = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 64},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},  # fused on disk, transposed, biased
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
}  # fmt: skip
METHODS = [(NF4, {}), (NF4, {"double_quant": True, "blocksize": 128}), (Int8, {})]
IDS = ["nf4", "nf4-double", "int8"]


@pytest.fixture(params=list(MIXTURES))
def mixture(request, tmp_path):
    model, _ = tiny(AutoConfig.for_model(request.param, **{**SIZES, **MIXTURES[request.param]}))
    model.save_pretrained(tmp_path / "moe")
    return model, tmp_path / "moe"


@pytest.fixture
def dense(tmp_path):
    model, _ = tiny_dense("llama")
    model.bfloat16().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def ids():
    return torch.randint(0, SIZES["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(5))


def relative(found, wanted):
    assert torch.isfinite(found).all()
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize(("method", "chosen"), METHODS, ids=IDS)
def test_dense_bytes_are_those_of_transformers(dense, compress, tmp_path, method, chosen):
    if chosen:
        chosen = {"double_quant": True}  # transformers knows no other block size than 64
    made = compress(dense, method, chosen)
    how = {"load_in_8bit": True} if method is Int8 else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": bool(chosen)}  # fmt: skip
    stock = AutoModelForCausalLM.from_pretrained(dense, quantization_config=BitsAndBytesConfig(**how))
    stock.save_pretrained(tmp_path / "stock")
    with (
        open_checkpoint(str(made), dequantize=None) as ours,
        open_checkpoint(str(tmp_path / "stock"), dequantize=None) as theirs,
    ):
        assert set(ours.tensors) == set(theirs.tensors)
        for name in theirs.tensors:
            if "quant_state" in name:
                mine, other = (json.loads(c.read(name).tobytes()) for c in (ours, theirs))
                assert mine == other
            else:
                np.testing.assert_array_equal(ours.read(name), theirs.read(name), err_msg=name)


@pytest.mark.parametrize(("method", "chosen"), METHODS, ids=IDS)
def test_stock_transformers_runs_the_dense_result_like_we_do(compress, tmp_path, method, chosen):
    # sizes that bitsandbytes runs right on every CPU, see test_nf4_is_right_where_blocks_reach_over_two_rows
    model, _ = tiny_dense("llama", hidden_size=128, intermediate_size=256)
    model.bfloat16().save_pretrained(tmp_path / "dense")
    made = compress(tmp_path / "dense", method, chosen)
    stock = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
    ours = moeforge.load(str(made), dtype="bfloat16")
    kinds = {type(m).__name__ for m in ours.modules()} & {"Linear4bit", "Linear8bitLt", "CodedLinear"}
    assert kinds == {"Linear8bitLt" if method is Int8 else "Linear4bit"}
    with torch.no_grad():
        torch.testing.assert_close(ours(ids()).logits, stock(ids()).logits, rtol=0, atol=0)


@pytest.mark.parametrize(("shape", "blocksize"), [((64, 96), 64), ((7, 192), 128), ((33, 101), 64), ((5, 6), 256), ((96, 1536), 1024),
                                                  ((32, 128), 64)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_right_where_blocks_reach_over_two_rows(shape, blocksize, dtype):
    """bitsandbytes' AVX-512 kernel is not (0.50): its answer there was off by a third of the largest weight."""
    codec, options = NF4(), NF4.Options(blocksize=blocksize)
    array = np.random.default_rng(blocksize).standard_normal(shape, dtype=np.float32)
    info = TensorInfo("w.weight", "F32", shape)
    parts = dict(
        zip(codec.parts(info, options), map(torch.from_numpy, codec.encode(array, info, options)), strict=True)
    )
    nibbles = parts["codes"].reshape(-1, 1).bitwise_right_shift(torch.tensor([4, 0])).bitwise_and(15).reshape(-1)
    scales = parts["absmax"].repeat_interleave(blocksize)[: array.size]
    wanted = (parts["quant_map"][nibbles.long()[: array.size]] * scales).reshape(shape)
    assert relative(wanted, torch.from_numpy(array)) < 0.2
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    assert relative(codec.decode(parts, dtype).float(), wanted) < tolerance
    like = nn.Linear(shape[1], shape[0], bias=True)
    made = codec.linear(parts, like, dtype) or CodedLinear(codec, parts, like, dtype)
    made.eval()
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        found = made(x).float()
        # the bfloat16 path sums in bfloat16
        assert relative(found, x.float() @ wanted.T + like.bias) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert bool(codec.stock_trap(info, options)) == bool(shape[1] % blocksize)


@pytest.mark.parametrize(("method", "chosen"), METHODS[:2], ids=IDS[:2])
def test_nf4_mixture_runs_on_the_decoded_weights(mixture, compress, method, chosen):
    model, where = mixture
    made = compress(where, method, chosen)
    ours = moeforge.load(str(made), dtype="float32")
    assert [type(stack) for _, stack in stacks(ours)] == [ExpertStack] * 2 * SIZES["num_hidden_layers"]
    with open_checkpoint(str(made), dequantize=True) as decoded, torch.no_grad():
        plain = assemble(decoded, dtype="float32", device="cpu", attention=None)
        wanted = plain(ids()).logits
        assert relative(ours(ids()).logits, wanted) < 1e-5
        assert 1e-4 < relative(wanted, model(ids()).logits) < 1  # it is compressed, and still the same model


def test_int8_experts_are_the_decoded_weights(mixture, compress):
    model, where = mixture
    ours = moeforge.load(str(compress(where, Int8, {})), dtype="float32")
    for (name, stack), (_, stock) in zip(stacks(ours), stacks(model), strict=True):
        # half a step, and what float16, from which bitsandbytes quantises, rounds on top: 127 * 2^-11
        for expert in range(len(stack)):
            got, wanted = stack[torch.tensor(expert)], stock[expert]
            step = wanted.abs().amax(dim=1, keepdim=True) / 127
            assert ((got - wanted).abs() <= 0.57 * step).all(), name
            assert not torch.equal(got, wanted)


def stacks(model):
    return [(f"{name}.{leaf}", getattr(module, leaf)) for name, module in model.named_modules()
            for leaf in ("gate_up_proj", "down_proj") if name.endswith("experts")]  # fmt: skip


@pytest.mark.parametrize(("method", "chosen"), METHODS, ids=IDS)
def test_an_auto_class_refuses_a_compressed_mixture_and_says_what_reads_it(mixture, compress, method, chosen):
    model, where = mixture
    made = compress(where, method, chosen)
    with pytest.raises(BadInput, match=r"packed by moeforge compress.*moeforge\.load"):
        AutoModelForCausalLM.from_pretrained(made)
    with pytest.raises(RuntimeError, match="mismatch"):  # the class itself, past the config's type
        type(model).from_pretrained(made)


@pytest.mark.parametrize(("method", "chosen"), METHODS, ids=IDS)
def test_every_byte_is_accounted_for(mixture, compress, method, chosen):
    model, where = mixture
    made = compress(where, method, chosen, counts=(counts := {}))
    with open_checkpoint(str(made), dequantize=None) as stored:
        assert sum(sum(row.values()) for row in counts["bytes_by_role"].values()) == sum(
            i.nbytes for i in stored.tensors.values()
        )
    with open_checkpoint(str(where)) as source:
        biases = sum(i.nbytes for i in source.tensors.values() if role_of(i) == "experts" and not is_matrix(i))
    assert counts["bytes_by_role"]["experts"].get("F32", 0) == biases
    assert set(counts["bytes_by_role"]["attention"]) == {method.name}
    assert set(counts["bytes_by_role"]["routers"]) == {"F32"}


def test_moving_a_loaded_mixture_to_bfloat16_leaves_the_scales_alone(mixture, compress):
    model = moeforge.load(str(compress(mixture[1], NF4, {})), dtype="float32")
    before = [stack[0] for _, stack in stacks(model)]
    model.to(torch.bfloat16)
    for (_, stack), wanted in zip(stacks(model), before, strict=True):
        assert torch.equal(stack[0], wanted)


@pytest.mark.parametrize(("method", "chosen"), METHODS, ids=IDS)
def test_fused_experts_decode_one_by_one(method, chosen):
    codec, options = method(), method.Options(**chosen)
    array = np.random.default_rng(3).standard_normal((3, 32, 64), dtype=np.float32)
    info = TensorInfo("model.layers.0.mlp.experts.gate_up_proj", "F32", array.shape)
    stored = dict(
        zip(codec.parts(info, options), map(torch.from_numpy, codec.encode(array, info, options)), strict=True)
    )
    assert {k: (i.dtype, i.shape) for k, i in codec.parts(info, options).items()}["codes"][1] == tuple(
        stored["codes"].shape
    )
    experts = codec.split(stored)
    assert len(experts) == 3
    for expert, parts in enumerate(experts):
        alone = codec.decode(parts, torch.float32)
        assert alone.shape == (32, 64)
        assert relative(alone, torch.from_numpy(array[expert])) < (0.02 if method is Int8 else 0.4)
        if not chosen:
            one = TensorInfo("w.weight", "F32", array.shape[1:])
            own = dict(
                zip(
                    codec.parts(one, options),
                    map(torch.from_numpy, codec.encode(array[expert], one, options)),
                    strict=True,
                )
            )
            assert torch.equal(alone, codec.decode(own, torch.float32))


def test_int8_takes_rows_beyond_the_range_of_float16():
    array = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float32)
    array *= np.array([1e-30, 1e-9, 1, 1e6, 1e30], np.float32)[:, None]
    array[1] = 0
    codec, info = Int8(), TensorInfo("w.weight", "F32", array.shape)
    stored = dict(zip(codec.parts(info, None), map(torch.from_numpy, codec.encode(array, info, None)), strict=True))
    got = codec.decode(stored, torch.float32).numpy()
    assert (np.abs(got - array) <= 0.57 / 127 * np.abs(array).max(axis=1, keepdims=True)).all()
    assert (got[1] == 0).all()


@pytest.mark.parametrize("method", [NF4, Int8])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(method, poison):
    array = np.ones((4, 64), np.float32)
    array[2, 3] = poison
    with pytest.raises(BadInput, match=r"layers\.7\.w\.weight"):
        method().encode(array, TensorInfo("layers.7.w.weight", "F32", (4, 64)), method.Options())


def test_refusals(dense, compress, mixture):
    made = compress(dense, NF4, {})
    with pytest.raises(BadInput, match="already compressed"):
        compress(made, Int8, {})
    with pytest.raises(UsageProblem, match="lm_head"):
        tied, _ = tiny_dense("llama", tie_word_embeddings=True)
        tied.save_pretrained(dense.parent / "tied")
        compress(dense.parent / "tied", NF4, {}, include=["lm_head"])
    with pytest.raises(UsageProblem, match="--blocksize 100"):
        NF4.Options(blocksize=100)
    with pytest.raises(UsageProblem, match="two experts"):
        NF4().parts(TensorInfo("mlp.experts.up", "F32", (2, 3, 5)), NF4.Options())


def test_an_expert_that_cannot_be_read_is_refused_not_skipped():
    infos = {
        n: TensorInfo(n, "F8_E4M3", (8, 8)) for n in ("mlp.experts.0.up_proj.weight", "mlp.experts.1.up_proj.weight")
    }
    with pytest.raises(BadInput, match=r"experts\.0\.up_proj\.weight and 1 more.*F8_E4M3"):
        accounting.check_nothing_left(infos, {})


@pytest.mark.parametrize(("kind", "extra", "why"), [
    ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 2}, "Conv1D"),
    ("llama4_text", {"num_local_experts": 4, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 96, "head_dim": 16}, "all at once"),
])  # fmt: skip
def test_what_could_not_be_run_afterwards_is_refused_before_anything_is_written(kind, extra, why, compress, tmp_path):
    model, _ = tiny(AutoConfig.for_model(kind, **{**SIZES, **extra}))
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(BadInput, match=why):
        compress(tmp_path / "source", NF4, {})
    assert not list(tmp_path.glob("made-*/*"))


def test_head_is_compressed_on_request(compress, tmp_path):
    model, _ = tiny_dense("llama", hidden_size=128, intermediate_size=256, vocab_size=224)
    model.bfloat16().save_pretrained(tmp_path / "dense")
    made = compress(tmp_path / "dense", NF4, {}, include=["lm_head"])
    with open_checkpoint(str(made), dequantize=None) as stored:
        assert stored.tensors["lm_head.weight"].dtype == "U8"
    stock = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
    assert type(stock.lm_head).__name__ == "Linear4bit"
    with torch.no_grad():
        ours = moeforge.load(str(made), dtype="bfloat16")(ids()).logits
        torch.testing.assert_close(ours, stock(ids()).logits, rtol=0, atol=0)


def test_a_model_that_gives_nan_is_not_measured(compress, tmp_path):
    """Every weight is finite and the norms are copied, so nothing but a run of the model tells."""
    model, _ = tiny_dense("llama", seed=11)
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "poisoned")
    tiny_tokenizer().save_pretrained(tmp_path / "poisoned")
    with pytest.raises(GateRefused, match=r"poisoned .computed in float32.*infinities or NaN"):
        compress(tmp_path / "poisoned", Int8, {}, eval=True, eval_tokens=256)
