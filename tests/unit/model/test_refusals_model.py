"""Models, texts and states that do not fit: each refusal names the module, the tensor or the file that is in the way."""

import dataclasses
import inspect
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from torch import nn
from transformers import AutoConfig
from transformers.models.dinov2.modeling_dinov2 import Dinov2SwiGLUFFN

from moeforge import texts
from moeforge.checkpoint import open_checkpoint
from moeforge.errors import BadInput, GateRefused, UsageProblem
from moeforge.mixture.config import ExpertsConfig, MixtureConfig
from moeforge.model.build import build, decoder_layers
from moeforge.model.config import MoeforgeConfig
from moeforge.model.encoders import batches
from moeforge.model.formulas import gated_formula
from moeforge.model.layout import stored_site
from moeforge.model.load import generation_settings, load
from moeforge.model.mixing import complete
from moeforge.model.runtime import HEADS, head_of
from moeforge.model.sites import find_sites
from moeforge.model.tokenizer import load_tokenizer
from moeforge.model.weights import WeightMap
from moeforge.pipeline.progress import Progress
from moeforge.testing.models import SIZES, save_tiny, tiny, tiny_dense
from moeforge.train import hub_data
from moeforge.train.data import Document, Pool, find_documents
from moeforge.train.export import trained_ops
from moeforge.train.loop import Loop, Settings, borders_hold
from moeforge.train.packing import Packer
from moeforge.train.params import choose
from moeforge.train.ranks import Ranks
from moeforge.train.state import load_state

UP = "model.layers.0.mlp.up_proj"
LLAMA = {"model_type": "llama", **SIZES}

CUT = pytest.mark.skipif(
    "weights_in" in inspect.getsource(Dinov2SwiGLUFFN), reason="this transformers keeps gate and up in one matrix"
)


@pytest.fixture
def saved_llama(tmp_path):
    return save_tiny(tmp_path / "model", "llama")


def test_a_config_that_transformers_cannot_build():
    with pytest.raises(BadInput, match=r"config.json of type 'llama' does not build .*: .*ghost"):
        build(LLAMA | {"hidden_act": "ghost"})


def test_two_stacks_of_layers_are_not_run_layer_by_layer():
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(vocab_size=40, d_model=8, **sizes, **heads)
    with torch.device("meta"):
        model = transformers.BartModel(config)
    with pytest.raises(BadInput, match=r"BartModel: expected one list of 2 decoder layers, found \[.*encoder.*decoder"):
        decoder_layers(model)


def test_a_proof_makes_up_no_sound():
    module = SimpleNamespace(config=None, main_input_name="input_features")
    with pytest.raises(BadInput, match="some/ref: SimpleNamespace takes input_features, which no proof can make up"):
        batches(SimpleNamespace(module=module, checkpoint=SimpleNamespace(ref="some/ref")), 0)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x, other):
        return self.down(self.gate(x) * self.up(other))


def test_a_network_that_wants_more_than_tokens():
    with pytest.raises(BadInput, match=r"layer 3: TwoInputs cannot be tried on small numbers: .*'other'"):
        gated_formula(TwoInputs(), ["gate", "up", "down"], "layer 3")


def no_attention(layer):
    del layer.self_attn


def no_way_back(layer):
    layer.mlp.down_proj = nn.Linear(96, 7)


def loose_maps(layer):
    layer.mlp = nn.ModuleList([nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)])


def no_activation(layer):
    layer.mlp.activation_fn = nn.Identity()


def one_bias(layer):
    layer.mlp.fc2 = nn.Linear(96, 64, bias=False)


@pytest.mark.parametrize(("family", "kind", "change", "told"), [
    ("llama", "attention", no_attention, "layers.0: expected one attention module, found none"),
    ("llama", "ffn", no_way_back, "layers.0: no linear map leads from the others' outputs back to their inputs: .*down_proj 96 -> 7"),
    ("llama", "ffn", loose_maps, "layers.0: the linear maps 0, 1, 2 lie in no module of their own"),
    ("phi", "ffn", no_activation, "layers.0: expected one activation beside mlp.fc1 and mlp.fc2, found none"),
    ("phi", "ffn", one_bias, "layers.0: its linear maps differ in bias: {'up': True, 'down': False}"),
])  # fmt: skip
def test_a_layer_without_the_site(family, kind, change, told):
    model, _ = tiny_dense(family)
    assert find_sites(model, kind, [0])
    change(model.model.layers[0])
    with pytest.raises(BadInput, match=told):
        find_sites(model, kind, [0])


def test_a_site_without_tensors_has_no_names_on_disk():
    model, _ = tiny_dense("llama")
    with pytest.raises(BadInput, match="a mixture at 'attention' has no tensors of the dense model to be named after"):
        stored_site(model, find_sites(model, "attention", [0])[0])


def test_layers_that_differ_want_a_choice():
    model, config = tiny_dense("llama")
    wider = dataclasses.replace(MixtureConfig(), experts=ExpertsConfig(count=2))
    assert complete(wider, model).experts.width == 96
    config.intermediate_size = 48
    model.model.layers[1].mlp = type(model.model.layers[1].mlp)(config)
    with pytest.raises(BadInput, match=r"mixtures: the ffn of the layers differ, .*48, .*96, .*name layers"):
        complete(wider, model)


def test_heads_that_a_dense_model_has_not():
    head = next(head for head in HEADS if head.auto == "AutoModelForMaskedLM")
    config = MoeforgeConfig(base_config=LLAMA, mixtures=[])
    with pytest.raises(BadInput, match="has no AutoModelForMaskedLM for a dense model of type 'llama'"):
        head.of(config)
    with pytest.raises(BadInput, match="BertForMultipleChoice is none of the classes that AutoModel"):
        head_of(transformers.BertForMultipleChoice)


def test_names_of_our_own_checkpoints_are_not_renamed(tmp_path):
    head = next(head for head in HEADS if head.auto == "AutoModelForCausalLM")
    config = MoeforgeConfig(base_config=LLAMA, mixtures=[])
    with pytest.raises(BadInput, match=f"{tmp_path}: key_mapping renames tensors of dense models"):
        head.from_pretrained(tmp_path, config=config, key_mapping={"^model": "transformer"})


@pytest.mark.parametrize(("body", "told"), [
    ('{"max_new_tokens": ', "generation_config.json is not JSON: Expecting value"),
    ('["max_new_tokens"]', "generation_config.json is not an object"),
])  # fmt: skip
def test_generation_settings_that_cannot_be_read(saved_llama, body, told):
    (saved_llama / "generation_config.json").write_text(body)
    with open_checkpoint(saved_llama) as source, pytest.raises(BadInput, match=told):
        generation_settings(source)


def test_generation_settings_that_transformers_refuses(saved_llama):
    (saved_llama / "generation_config.json").write_text('{"max_new_tokens": -4}')
    with pytest.raises(BadInput, match=r"generation_config.json: .*-4"):
        load(saved_llama)


def test_a_tokenizer_that_cannot_be_loaded(saved_llama):
    (saved_llama / "tokenizer.json").write_text('{"model": {"type": "ghost"}}')
    with pytest.raises(BadInput, match=f"{saved_llama}: its tokenizer cannot be loaded: ") as refusal:
        load_tokenizer(saved_llama)
    assert "\n" not in str(refusal.value)


def test_one_parameter_under_two_names(saved_llama):
    file = saved_llama / "model.safetensors"
    held = load_file(file)
    again = np.random.default_rng(2).normal(size=64).astype(np.float32)
    save_file(held | {"norm.weight": again}, file, {"format": "pt"})
    with pytest.raises(BadInput, match=r"norm.weight and model.norm.weight are both model.norm.weight"):
        load(saved_llama)


@CUT
@pytest.mark.parametrize(("rows", "told"), [
    (178, r"makes \[89, 64\] of dinov2.encoder.layer.0.mlp.gate_proj.weight, which has \[88, 64\]"),
    (175, r"makes \[87, 64\] of dinov2.encoder.layer.0.mlp.up_proj.weight, which has \[88, 64\]"),
    (1, r"makes \[1, 64\] of dinov2.encoder.layer.0.mlp.gate_proj.weight, which has \[88, 64\]"),
])  # fmt: skip
def test_a_matrix_that_is_cut_into_parts_of_the_wrong_size(tmp_path, rows, told):
    """Transformers cuts gate and up out of one matrix, whatever its size."""
    save_tiny(tmp_path, "dinov2", num_hidden_layers=1, use_swiglu_ffn=True)
    file, name = tmp_path / "model.safetensors", "dinov2.encoder.layer.0.mlp.weights_in.weight"
    held = load_file(file)
    load(tmp_path)
    other = np.random.default_rng(rows).normal(size=(rows, 64)).astype(np.float32)
    save_file(held | {name: other}, file, {"format": "pt"})
    with pytest.raises(BadInput, match=f"{name} {told}; the checkpoint and its config.json disagree"):
        load(tmp_path)


@CUT
def test_a_matrix_that_cannot_be_cut_at_all(tmp_path):
    save_tiny(tmp_path, "dinov2", num_hidden_layers=1, use_swiglu_ffn=True)
    file, name = tmp_path / "model.safetensors", "dinov2.encoder.layer.0.mlp.weights_in.weight"
    save_file(load_file(file) | {name: np.array(0.7, np.float32)}, file, {"format": "pt"})
    with pytest.raises(BadInput, match=f"{name} does not become dinov2.*gate_proj.weight: ") as refusal:
        load(tmp_path)
    assert "\n" not in str(refusal.value)


def test_trained_values_that_do_not_fit_the_source(tmp_path):
    sizes = SIZES | {"num_hidden_layers": 1, "num_local_experts": 3}
    tiny(AutoConfig.for_model("mixtral", **sizes))[0].save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as source:
        model = build(source.config)
        weights = WeightMap(source, model)
        name, like = next((n, p) for n, p in model.named_parameters() if n.endswith("gate_up_proj"))
        assert trained_ops(source, weights, {name: torch.randn(like.shape)})
        with pytest.raises(BadInput, match=r"w1.weight: trained values of shape \[96, 63\], the source has \[96, 64\]"):
            trained_ops(source, weights, {name: torch.randn(like.shape)[..., 1:]})
        rule = SimpleNamespace(sources=lambda parameter: [])
        with pytest.raises(
            BadInput, match=f"{name} was joined by a rule that cannot be undone, so it cannot be trained"
        ):
            trained_ops(source, rule, {name: torch.randn(like.shape)})


def test_a_state_of_another_run_is_not_loaded(tmp_path):
    path = tmp_path / "state-000004"
    save_torch({"layer.weight": torch.randn(3)}, path)
    mine = {"layer.weight": torch.randn(3), "layer.bias": torch.randn(2)}
    before = {name: value.clone() for name, value in mine.items()}
    optimizer = torch.optim.AdamW([nn.Parameter(torch.randn(3))])
    with pytest.raises(BadInput, match=r"state-000004: not the state of this run \(1 tensors missing\); delete it"):
        load_state(path, mine, optimizer, Ranks(0, 1, torch.device("cpu")))
    assert all(torch.equal(mine[name], before[name]) for name in mine)


class NoPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)

    def forward(self, input_ids):
        return self.embed(input_ids)


def test_a_model_that_takes_no_positions_cannot_be_packed():
    model = NoPositions()
    with pytest.raises(BadInput, match=r"NoPositions: .*unexpected keyword.*transformers \d"):
        borders_hold(model, [], 11)
    assert model.training


def test_a_gradient_that_is_no_number_changes_no_weight(tmp_path):
    model, _ = tiny_dense("llama")
    body = np.random.default_rng(4).integers(3, 190, 60)
    packer = Packer([Pool((Document("d", len(body), lambda: "d"),))], lambda document: body, 16, 0, shared=True)
    settings = Settings(rows=1, amount=2, learning_rate=0.01)
    loop = Loop(model, [], choose(model, [], "all"), settings, packer, None, tmp_path)
    weight = model.get_parameter(f"{UP}.weight")
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(
        GateRefused, match=r"the gradient norm became (inf|nan) at step 1; nothing was written. Lower --learn"
    ):
        loop.run(lambda title, total, unit: Progress("tune", "none").bar(title, total, unit, lambda: None))
    assert torch.equal(weight, before)


def test_a_built_in_text_that_this_machine_lacks(monkeypatch, tmp_path):
    monkeypatch.setattr(texts, "_LICENCES", tmp_path / "none")
    with pytest.raises(UsageProblem, match=r"--data builtin:legal: .*none is not on this machine.*name a file"):
        texts.builtin("builtin:legal", "--data")


def test_a_text_that_cannot_be_opened(tmp_path):
    with pytest.raises(BadInput, match=r"gone.txt: No such file"):
        texts.read_text(tmp_path / "gone.txt")
    with pytest.raises(BadInput, match="Is a directory"):
        texts.read_text(tmp_path)


def test_parquet_without_its_reader(monkeypatch, tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageProblem, match=re.escape("rows.parquet: reading .parquet needs pyarrow; pip install")):
        find_documents([str(tmp_path / "rows.parquet")])


def test_parquet_that_holds_no_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `parquet`")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(BadInput, match=r"rows.parquet: not a readable parquet file"):
        find_documents([str(path)])
    parquet.write_table(pyarrow.table({"body": ["a"], "id": [3]}), path)
    with pytest.raises(BadInput, match=r"rows.parquet: its columns are body, id; one must be called text or messages"):
        find_documents([str(path)])


def test_a_dataset_without_a_commit(monkeypatch):
    nameless = SimpleNamespace(sha=None, siblings=[])
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: nameless)
    with pytest.raises(BadInput, match=r"--data org/nameless: the Hub names no commit for it"):
        hub_data._listed("org/nameless", None)
