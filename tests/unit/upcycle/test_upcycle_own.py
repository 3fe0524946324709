"""The layout of our own runtime: every family, exactly, through the classes that transformers' Auto classes give for it."""

import inspect
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.models.dinov2.modeling_dinov2 import Dinov2SwiGLUFFN

from moeforge.checkpoint import architectures, expert_names, open_checkpoint
from moeforge.errors import BadInput
from moeforge.model import runtime
from moeforge.model.proof import prove
from moeforge.testing import inprocess
from moeforge.testing.models import FAMILIES, HEADS, OTHERS, tiny_dense
from moeforge_kernels.activations import CANONICAL
from moeforge_upcycle import own

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 8, "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 32}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
GATED_VISION = ["dinov2 gated"] if "weights_in" not in inspect.getsource(Dinov2SwiGLUFFN) else []
"""Before some release between 5.17 and 5.24 transformers kept its gate and up fused in memory, where experts have them apart."""
VARIANTS = {
    **{family: (family, {}) for family in (*FAMILIES, *OTHERS)},
    "smollm3 without rope in some layers": ("smollm3", {"no_rope_layer_interval": 2}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gemma2 with a window": ("gemma2", {"sliding_window": 8}),
    "phi3 partly rotated": ("phi3", {"rope_parameters": PARTIAL}),
    "phi3 longrope": ("phi3", {"rope_parameters": LONGROPE}),
    "phi with norms of heads": ("phi", {"qk_layernorm": True}),
    "gpt_neox in sequence": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "falcon in sequence": ("falcon", {"parallel_attn": False, "multi_query": False, "alibi": True}),
    "falcon without biases": ("falcon", {"bias": False}),
    "falcon 40B": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt2 of the default width": ("gpt2", {"n_inner": None}),
    "bert body": ("bert", {"head": "BertModel"}),
    "bert classifier": ("bert", {"head": "BertForSequenceClassification", "num_labels": 3}),
    "roberta body": ("roberta", {"head": "RobertaModel"}),
    "vit body": ("vit", {"head": "ViTModel"}),
    "dinov2 body": ("dinov2", {"head": "Dinov2Model"}),
    **{name: ("dinov2", {"use_swiglu_ffn": True}) for name in GATED_VISION},
}
WAYS = {
    "copy": ("copy", {}),
    "split": ("split", {"granularity": 2, "experts": 6, "top_k": 4, "partition": "random"}),
    "split by a factor": ("split", {"granularity": 4, "experts": 8, "top_k": 4, "scale": "routed-factor"}),
    "shared": ("shared", {"rank": "norm", "granularity": 2, "shared": 2}),
    "half": ("shared", {"fill": "half"}),
    "some layers": ("copy", {"layers": "0,2"}),
    "no renormalisation": ("copy", {"norm_topk": False, "router_init": "zero"}),
}
EVERYWHERE = ("copy", "split")
"""Ways that are tried on every variant; the others on a gated family, a plain one with biases, a transposed and a fused one."""
OFTEN = ("gemma2", "llama with biases", "gpt2", "bert", "phi3", *GATED_VISION)
CASES = [(variant, way) for variant in VARIANTS for way in WAYS if way in EVERYWHERE or variant in OFTEN]


def inputs(model):
    """What a tiny model is given: ids, for encoders with padding, or pixels."""
    random = torch.Generator().manual_seed(5)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=random)}
    found = {"input_ids": torch.randint(3, 199, (2, 40), generator=random)}
    if model.config.model_type in ("bert", "roberta"):
        mask = torch.ones(2, 40, dtype=torch.long)
        mask[1, 25:] = 0
        found["attention_mask"] = mask
    return found


def answers(model, given):
    """Logits, or hidden states, of what is no padding."""
    with torch.no_grad():
        out = model.eval()(**given)[0]
    assert torch.isfinite(out).all()
    real = given.get("attention_mask")
    return out if real is None or out.ndim < 3 else out[real.bool()]


@pytest.fixture(scope="module")
def stock():
    """stock(directory) -> (what is given, answers of the dense class); computed once for each."""
    kept: dict = {}

    def compute(directory):
        if directory not in kept:
            (name,) = json.loads((directory / "config.json").read_text())["architectures"]
            model = getattr(transformers, name).from_pretrained(directory)
            given = inputs(model)
            kept[directory] = given, answers(model, given)
        return kept[directory]

    return compute


def mixed(directory):
    """The model that transformers' Auto class makes of a checkpoint of ours; it refuses missing and unexpected tensors itself."""
    runtime.register()
    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    head = next(head for head in runtime.HEADS if head.__name__ == name)
    return getattr(transformers, head.auto).from_pretrained(directory, dtype=torch.float32)


def error(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(("variant", "way"), CASES)
def test_same_function(variant, way, dense, upcycle, stock):
    family, overrides = VARIANTS[variant]
    method, options = WAYS[way]
    src = dense(family, **overrides)
    done = upcycle(src, method, target="moeforge", **options)
    given, wanted = stock(src)
    found = answers(mixed(done.path), given)
    assert error(found, wanted) <= 1e-5
    assert bool((found.argmax(-1) == wanted.argmax(-1)).all())
    assert done.manifest["verdicts"]["exact"] is True


@pytest.mark.parametrize("variant", OFTEN)
@pytest.mark.parametrize("method", ["noise", "drop", "carve"])
def test_methods_that_change_the_function_do_and_say_so(variant, method, dense, upcycle, stock):
    family, overrides = VARIANTS[variant]
    src = dense(family, **overrides)
    options = {"carve": {"partition": "random", "router": "stage", "experts": 4}}.get(method, {})
    done = upcycle(src, method, target="moeforge", **options)
    given, wanted = stock(src)
    assert 1e-4 < error(answers(mixed(done.path), given), wanted) < 10
    assert done.manifest["verdicts"]["exact"] is False


@pytest.mark.parametrize("variant", ["gemma2", "gpt2", "bert"])
def test_experts_of_several_checkpoints(variant, dense, upcycle):
    src, other = dense(variant), dense(variant, seed=1)
    done = upcycle(src, "btx", experts=2, expert=(str(other),), trunk="base", target="moeforge")
    made = load_file(done.path / "model.safetensors")
    for parent, directory in enumerate((src, other)):
        held = load_file(directory / "model.safetensors")
        for name, value in made.items():
            dense_name, expert = expert_names.dense_name(name)
            if expert == parent:
                assert np.array_equal(value, held[dense_name]), name
    assert answers(mixed(done.path), inputs(mixed(done.path))).isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_source_tensor_is_there_once_and_names_lead_back(variant, dense, upcycle):
    """Outside the experts bytes and names are the source's; each expert's tensors are those that their names say."""
    family, overrides = VARIANTS[variant]
    src = dense(family, **overrides)
    made, held = (load_file(path / "model.safetensors") for path in (upcycle(src, target="moeforge").path, src))
    if variant == "dinov2 gated":  # its gate and up are fused on disk, and apart in memory and in the experts
        for layer in range(3):
            where = f"dinov2.encoder.layer.{layer}.mlp."
            for leaf in ("weight", "bias"):
                parts = np.split(held.pop(f"{where}weights_in.{leaf}"), 2)
                held |= dict(zip((f"{where}gate_proj.{leaf}", f"{where}up_proj.{leaf}"), parts, strict=True))
    seen = []
    for name, value in made.items():
        dense_name, expert = expert_names.dense_name(name)
        if name.endswith("router.weight"):
            continue
        assert np.array_equal(value, held[dense_name]), name
        seen += [dense_name] if expert in (None, 0) else []
    assert sorted(seen) == sorted(held)
    layers = json.loads((src / "config.json").read_text()).get("num_hidden_layers", 3)
    assert sum(name.endswith("router.weight") for name in made) == layers


@pytest.mark.parametrize("variant", VARIANTS)
def test_roots_and_names_are_those_that_the_runtime_finds_by_structure(variant, dense):
    from moeforge.model.layout import stored_site
    from moeforge.model.sites import find_sites

    family_name, overrides = VARIANTS[variant]
    src = dense(family_name, **overrides)
    config = json.loads((src / "config.json").read_text())
    (name,) = config["architectures"]
    model = getattr(transformers, name).from_pretrained(src)
    from moeforge.checkpoint import open_checkpoint
    from moeforge_upcycle.dense import examine

    with open_checkpoint(str(src)) as source:
        family, settings, parent = examine(source)
        target = own.target(family, parent)
        written = own.config(family, config, settings, {"experts": 2, "width": 4, "shared_width": 0, "top_k": 1, "norm_topk": True,
                             "routed_factor": 1, "router_std": 0.02, "dtype": "float32"}, parent.matrices, [0])  # fmt: skip
    for layer, site in enumerate(find_sites(model)):
        root, paths = stored_site(model, site)
        assert target.at(layer, target.router) == f"{root}.router.weight"
        ours = {slot.name.format(expert=0) for slot in target.experts}
        bias = {".bias"} if site.bias else set()
        assert {target.at(layer, n) for n in ours} == {f"{root}.experts.0.{path}{leaf}" for path in paths.values()
                                                       for leaf in {".weight", *bias}}  # fmt: skip
        assert any(
            part.transposed for (role, at), part in parent.parts.items() if role in ("up", "down") and at == layer
        ) is any(p.transposed for p in site.projections.values())
        experts = written["mixtures"][0]["experts"]
        assert CANONICAL[experts["activation"]] == site.activation
        assert (experts["gated"], experts["bias"]) == (site.gated, site.bias)
        assert settings["intermediate_size"] == site.ffn_width
    assert written["architectures"] == [runtime.head_of(type(model)).__name__]


@pytest.mark.parametrize(
    "variant", ["gemma2", "gpt2", "falcon in sequence", "bert", "bert body", "roberta", "vit", *GATED_VISION]
)
def test_the_written_files_are_proven_layer_by_layer(variant, dense, upcycle):
    family, overrides = VARIANTS[variant]
    verdicts = upcycle(dense(family, **overrides), verify=True, layers="0,2").manifest["verdicts"]
    assert verdicts["proof"].startswith("same function: relative error")
    measured = verdicts["measured"]
    assert measured["exact"] and measured["relative_error"] <= 1e-5
    assert [layer["sparse"] for layer in measured["layers"]] == [True, False, True]
    assert all(layer["local_error"] <= 1e-5 for layer in measured["layers"])
    assert measured["compared"] == ("hidden states" if "body" in variant else "logits")


def test_an_encoder_that_changes_is_measured(dense, upcycle):
    verdicts = upcycle(dense("bert"), "drop", verify=True).manifest["verdicts"]
    assert verdicts["proof"].startswith("changed as announced")
    assert not verdicts["measured"]["exact"]
    assert verdicts["measured"]["relative_error"] > 1e-4


def test_it_writes_what_the_dense_model_writes(dense, upcycle, stock):
    src = dense("gpt2")
    given, _ = stock(src)
    models = (transformers.AutoModelForCausalLM.from_pretrained(src), mixed(upcycle(src).path))
    for beams in (1, 3):
        first, second = (
            m.generate(given["input_ids"], max_new_tokens=12, do_sample=False, num_beams=beams) for m in models
        )
        assert torch.equal(first, second)


def test_activations_are_those_of_the_kernels():
    assert set(CANONICAL) == own.ACTIVATIONS


@pytest.mark.parametrize(("family", "head"), [(f, head) for f in HEADS for head in architectures.find(f).heads])
def test_every_head_has_a_class_of_ours_or_is_refused_by_name(family, head, tmp_path):
    config = tiny_dense(family, 0, head)[1].to_dict() | {"architectures": [head]}
    described = architectures.find(family).of_class(config)
    if head in own.UNSERVED:
        with pytest.raises(BadInput, match=head):
            own.architecture(described)
    else:
        wanted = runtime.head_of(getattr(transformers, head)).__name__
        assert own.architecture(described) == wanted


@pytest.fixture
def damaged_copy(dense, tmp_path):
    """damaged_copy(family, change, **config): a copy after `change(tensors) -> tensors`, config keys replaced (None: removed)."""

    def make(family, change=lambda tensors: tensors, head=None, **config):
        directory = tmp_path / "copy"
        shutil.copytree(dense(family, **({"head": head} if head else {})), directory)
        save_file(change(load_file(directory / "model.safetensors")), directory / "model.safetensors", {"format": "pt"})
        old = json.loads((directory / "config.json").read_text())
        found = {key: value for key, value in (old | config).items() if value is not None}
        (directory / "config.json").write_text(json.dumps(found))
        return directory

    return make


def test_old_spellings_of_a_checkpoint(damaged_copy, dense, upcycle, stock):
    """BERT's first files: gamma and beta, no prefix, a buffer of positions, another head's tensors beside its own."""

    def old(tensors):
        found = {name.removeprefix("bert."): value for name, value in tensors.items()}
        found = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
                 for name, value in found.items()}  # fmt: skip
        extra = {"embeddings.position_ids": np.arange(256)[None], "cls.seq_relationship.weight": np.ones((2, 64), np.float32),
                 "pooler.dense.bias": np.ones(64, np.float32)}  # fmt: skip
        return found | extra

    src = damaged_copy("bert", old)
    done = upcycle(src)
    assert any("of another head left out" in warning for warning in done.manifest["warnings"])
    names = set(load_file(done.path / "model.safetensors"))
    assert "bert.encoder.layer.0.output.LayerNorm.weight" in names
    assert not any("gamma" in name or "seq_relationship" in name or "position_ids" in name for name in names)
    given, wanted = stock(dense("bert"))
    assert error(answers(mixed(done.path), given), wanted) <= 1e-5


def test_gpt2_files_with_and_without_the_prefix(damaged_copy, dense, upcycle, stock):
    def first(tensors):
        masks = {f"h.{layer}.attn.bias": np.ones((1, 1, 8, 8), np.float32) for layer in range(3)}
        return {name.removeprefix("transformer."): value for name, value in tensors.items()} | masks

    done = upcycle(damaged_copy("gpt2", first))
    given, wanted = stock(dense("gpt2"))
    assert error(answers(mixed(done.path), given), wanted) <= 1e-5
    assert "transformer.h.0.ln_1.weight" in load_file(done.path / "model.safetensors")


def test_two_spellings_of_one_tensor_are_refused(damaged_copy):
    src = damaged_copy("gpt2", lambda t: t | {"wte.weight": t["transformer.wte.weight"]})
    with pytest.raises(BadInput, match="are one tensor of a gpt2 model"):
        inprocess.plan("upcycle", src)


def test_the_dense_config_is_kept_untouched(dense, upcycle):
    src = dense("gemma2")
    config = json.loads((upcycle(src).path / "config.json").read_text())
    assert config["base_config"] == json.loads((src / "config.json").read_text())
    assert set(config) == {"model_type", "architectures", "base_config", "mixtures", "dtype"}


def test_scales_that_reach_inside_a_plain_activation_are_not_called_exact(dense, upcycle, stock):
    src = dense("gpt2")
    done = upcycle(src, "split", granularity=2, experts=4, top_k=2, scale="split")
    assert "scales inside the activation" in done.manifest["verdicts"]["why_inexact"]
    given, wanted = stock(src)
    assert error(answers(mixed(done.path), given), wanted) > 1e-4


def test_an_activation_without_kernels_is_refused(damaged_copy):
    src = damaged_copy("gpt2", activation_function="laplace")
    with pytest.raises(BadInput, match="no kernel for experts knows this activation"):
        inprocess.plan("upcycle", src)


def test_saving_it_again_writes_the_same_names(dense, upcycle, tmp_path):
    for variant in ("gpt2", "bert", "vit", "phi3"):
        done = upcycle(dense(variant), "shared", rank="norm", target="moeforge")
        mixed(done.path).save_pretrained(tmp_path / variant)
        again, first = (load_file(path / "model.safetensors") for path in (tmp_path / variant, done.path))
        assert set(again) == set(first)
        assert all(np.array_equal(again[name], first[name]) for name in first)


def test_a_proof_runs_on_the_reference_whatever_this_machine_would_take(dense, upcycle, monkeypatch):
    """A fast kernel rounds otherwise than the dense model's own products, and real models magnify that a hundredfold."""
    source = dense("gemma2")
    written = upcycle(source).path
    monkeypatch.setenv("MOEFORGE_KERNELS", "nowhere")
    with pytest.raises(ValueError, match="no backend 'nowhere'"), torch.no_grad():
        mixed(written)(torch.randint(0, 90, (1, 5)))
    with open_checkpoint(str(source)) as first:
        assert prove(first, written).exact
