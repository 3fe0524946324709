"""What the verbs refuse while they plan: the option, the tensor or the file in the way is named, and nothing is written."""

import importlib.util
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from moeforge.checkpoint import TensorInfo, open_checkpoint
from moeforge.errors import BadInput, MachineLacks, UsageProblem
from moeforge.options import build
from moeforge.pipeline.artifact import Artifact
from moeforge.pipeline.context import Context
from moeforge.pipeline.progress import Progress
from moeforge.testing import inprocess
from moeforge.testing.models import SIZES, save_tiny, tiny, tiny_tokenizer
from moeforge_compress.runtime import check
from moeforge_export.gguf_vocab import vocabulary
from moeforge_run.eval import Eval
from moeforge_tune.options import Options as TuneOptions
from moeforge_upcycle.methods import btx, noise, shared

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def model(tmp_path):
    """model(config={...}, tensors=edit, kind=...): the directory of a small model with a tokenizer, changed."""

    def make(config=None, tensors=None, kind="llama", **sizes):
        where = save_tiny(tmp_path / "model", kind, num_hidden_layers=2, **sizes)
        tiny_tokenizer().save_pretrained(where)
        settings = json.loads((where / "config.json").read_text())
        (where / "config.json").write_text(json.dumps(settings | (config or {})))
        if tensors is not None:
            held = load_file(where / "model.safetensors")
            save_file(tensors(held), where / "model.safetensors", {"format": "pt"})
        return where

    return make


def integers(held):
    return held | {Q: np.random.default_rng(3).integers(-99, 99, held[Q].shape).astype(np.int32)}


@pytest.mark.parametrize(("changes", "told"), [
    ({"config": {"architectures": ["LlamaForSequenceClassification"]}}, r"architectures = \['LlamaForSequenceClassification'\]: not a causal"),
    ({"tensors": integers}, f"{re.escape(Q)} is I32: only floating-point weights can be trained"),
])  # fmt: skip
def test_tune_refuses_what_cannot_learn(model, changes, told):
    with pytest.raises(BadInput, match=told):
        inprocess.plan("tune", model(**changes), data=("builtin:prose",))


def test_tune_refuses_what_compress_wrote(model, tmp_path):
    small = inprocess.run("compress", model(), tmp_path / "small", "int8", eval=False).path
    with pytest.raises(BadInput, match=r"small: config.json has \w+: quantised weights cannot be trained; tune first"):
        inprocess.plan("tune", small, data=("builtin:prose",))


def test_tune_refuses_rows_longer_than_the_model(model):
    with pytest.raises(UsageProblem, match="--sequence-length 257: max_position_embeddings is 256; use at most that"):
        inprocess.plan("tune", model(), data=("builtin:prose",), sequence_length=257)


def test_tune_says_that_an_optimizer_is_not_installed(model, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest)
    )
    with pytest.raises(MachineLacks, match=r"adamw-8bit needs bitsandbytes.*or use --optimizer adamw"):
        inprocess.plan("tune", model(), data=("builtin:prose",), optimizer="adamw-8bit")


@pytest.mark.parametrize(("options", "told"), [
    ({"data": ()}, "tune needs text: --data PATH"),
    ({"data": ("x",), "steps": 5, "minutes": 0.5}, "--steps and --minutes are two budgets; give one"),
    ({"data": ("x",), "tokens": 9, "minutes": 0.5}, "--tokens and --minutes are two budgets; give one"),
])  # fmt: skip
def test_tune_options_that_contradict(options, told):
    with pytest.raises(UsageProblem, match=re.escape(told)):
        TuneOptions(**options)


def test_eval_refuses_a_tokenizer_of_a_larger_vocabulary(model, tmp_path):
    where, text = model(vocab_size=40), tmp_path / "text.txt"
    text.write_text("letters far up in the vocabulary: xyz")
    context = Context("eval", Progress("eval", quiet=True), tmp_path)
    source, options = Artifact("checkpoint", str(where), where), build(Eval.Options, {"data": (str(text),)})
    with pytest.raises(BadInput, match=r"model: the tokenizer gives id \d+, the model has 40; is this its tokenizer\?"):
        Eval().answer([source], options, context)


def test_compress_finds_nothing_to_compress(model):
    where = model(tensors=lambda held: {name: value for name, value in held.items() if value.ndim == 1})
    with pytest.raises(BadInput, match="no linear layer or expert to compress among 5 tensors"):
        inprocess.plan("compress", where)


def test_compress_refuses_one_parameter_of_two_kinds(tmp_path):
    config = AutoConfig.for_model("mixtral", **SIZES | {"num_hidden_layers": 1, "num_local_experts": 3})
    tiny(config)[0].save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as source:
        experts = {name for name in source.tensors if ".experts." in name}
        check(source, experts)
        with pytest.raises(BadInput, match=r"experts\.\w+ would be made of compressed and uncompressed tensors"):
            check(source, experts - {max(experts)})


def test_export_refuses_a_matrix_of_integers(model):
    with pytest.raises(BadInput, match=rf"tensor '{re.escape(Q)}' is I32 \[64, 64\], expected floats \[64, 64\]"):
        inprocess.plan("export", model(tensors=integers), to="gguf")


@pytest.mark.parametrize(("edit", "told"), [
    (lambda body: body["model"].update(type="WordPiece"), "tokenizer.json holds a WordPiece model; GGUF export writes BPE"),
    (lambda body: body["model"]["vocab"].update(far=199), "token 'far' is number 199, the embedding has 199 rows"),
    (lambda body: body.update(pre_tokenizer={"type": "Whitespace"}), "cuts text by a rule that is not one of llama.cpp's"),
])  # fmt: skip
def test_export_refuses_tokenizers_that_gguf_has_not(model, edit, told):
    where = model()
    body = json.loads((where / "tokenizer.json").read_text())
    edit(body)
    (where / "tokenizer.json").write_text(json.dumps(body))
    with open_checkpoint(where) as source, pytest.raises(BadInput, match=re.escape(told)):
        vocabulary(source)


def test_upcycle_wants_prompts_for_every_router_row(model, tmp_path):
    prompts = tmp_path / "prompts.toml"
    prompts.write_text("".join(f'[[expert]]\npositive = ["text of expert {i}"]\n' for i in range(3)))
    with pytest.raises(UsageProblem, match=r"prompts.toml is for 3 experts, the router has 4 rows"):
        inprocess.plan("upcycle", model(), experts=4, top_k=2, router_init="prompts", prompts=prompts)


@pytest.mark.parametrize(("make", "told"), [
    (lambda: noise.Options(sigma=math.nan), "--sigma nan: must be a finite number"),
    (lambda: noise.Options(sigma=math.inf), "--sigma inf: must be a finite number"),
    (lambda: btx.Options(("x",), trunk="task-vector", trunk_scale=-math.inf), "--trunk-scale -inf: must be a finite number"),
    (lambda: shared.Shared().shape(96, SimpleNamespace(experts=10, top_k=5), shared.Options(granularity=5, fill="half")),
     "--granularity 5 does not divide the FFN's 96 neurons"),
])  # fmt: skip
def test_upcycle_options_without_meaning(make, told):
    with pytest.raises(UsageProblem, match=re.escape(told)):
        make()


def test_btx_refuses_tensors_that_do_not_match():
    random = np.random.default_rng(5)
    join = btx.BTX().merge("attention_q", TensorInfo("q.weight", "F32", (4, 6)), btx.Options(("x",)))
    one, other = random.normal(size=(2, 4, 6)).astype(np.float32)
    assert np.allclose(join(one, other), (one + other) / 2, atol=1e-6)
    with pytest.raises(BadInput, match=re.escape("q.weight: shapes [4, 6] and [4, 5] cannot be merged")):
        join(one, other[:, :5])


@pytest.mark.parametrize("body", ["{", "{}", '{"model": {"vocab": [3]}}'])
def test_btx_refuses_a_tokenizer_that_cannot_be_read(model, tmp_path, body):
    where = model()
    other = save_tiny(tmp_path / "other", "llama", seed=1, num_hidden_layers=2)
    (where / "tokenizer.json").write_text(body)
    with pytest.raises(BadInput, match=r"model: tokenizer.json cannot be read: (JSONDecode|Key|Type)Error"):
        inprocess.plan("upcycle", where, "btx", expert=(str(other),))
