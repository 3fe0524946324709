"""What names alone say of linear maps and adapters, beside what the built model has: every family, every site, every kind of router."""

import pytest
import transformers

import moeforge
from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.adapter_layout import maps_of, shapes_of
from moeforge.checkpoint.linear_maps import linear_maps
from moeforge.errors import BadInput
from moeforge.mixture.config import RouterConfig
from moeforge.model.adapters import put
from moeforge.model.layout import stored_site
from moeforge.model.sites import SINGLE, find_sites
from moeforge.testing.adapters import ALWAYS, lora, lora_ffn
from moeforge.testing.inprocess import run
from moeforge.testing.models import FAMILIES, MIXERS, OTHERS, save_tiny, tiny, tiny_llava

SEEN = [*FAMILIES, *OTHERS, *MIXERS, "llava", "opt"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(family)`: the directory of its tiny model, written once."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def save(family):
        if family not in made:
            made[family] = root / family
            if family == "llava":
                tiny_llava()[0].save_pretrained(made[family])
            elif family == "opt":  # whose FFN lies in the layer itself
                sizes = {
                    "hidden_size": 32,
                    "word_embed_proj_dim": 32,
                    "ffn_dim": 44,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                }
                tiny(transformers.OPTConfig(vocab_size=97, **sizes))[0].save_pretrained(made[family])
            else:
                save_tiny(made[family], family)
        return made[family]

    return save


def read(path):
    with open_checkpoint(str(path)) as checkpoint:
        return linear_maps(checkpoint.config, checkpoint.tensors, checkpoint.ref), moeforge.load(checkpoint)


def by_structure(model):
    """(role, layer) -> (path on disk, inputs, outputs, bias, transposed), from the modules."""
    found = {}
    for layer in range(model.config.get_text_config().num_hidden_layers):
        for role in SINGLE:
            try:
                (site,) = find_sites(model, role, [layer])
            except BadInput:
                continue
            one = site.projections[role]
            found[role, layer] = (stored_site(model, site)[0], one.inputs, one.outputs, one.bias, one.transposed)
    return found


@pytest.mark.parametrize("family", SEEN)
def test_names_say_what_the_modules_are(family, saved):
    maps, model = read(saved(family))
    found = {key: (m.path, m.inputs, m.outputs, m.bias, m.transposed) for key, m in maps.items()}
    assert found == by_structure(model)
    roles = {role for role, _ in found}
    assert roles >= ({"in"} if family in MIXERS else {"o", "down"})
    layers = model.config.get_text_config().num_hidden_layers
    assert len(found) == len(roles) * layers, "each of them in every layer, the text model's"


ROUTERS = {
    "linear": RouterConfig(), "null": RouterConfig(null_experts=2), "bias": RouterConfig(logit_bias=True, bias=True),
    "noisy": RouterConfig(noise="noisy_topk"), "cosine": RouterConfig(kind="cosine"), "static": RouterConfig(kind="static"),
    "label": RouterConfig(kind="label", select="fixed", top_k=1), "random": RouterConfig(kind="random"),
}  # fmt: skip


def fits(path, entries):
    """What is planned from names, beside the parameters of the model with these mixtures."""
    maps, model = read(path)
    planned = shapes_of([entry.as_json() for entry in entries], maps, "x")
    assert planned == {name: shape for item in put(model, entries, "x") for name, shape in item.shapes().items()}
    return planned


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_router_is_planned_as_it_is_built(family, router, saved):
    planned = fits(saved(family), [lora_ffn(3, (0, 2), ROUTERS[router]), lora("o", 2, (1,), ROUTERS[router])])
    assert any(".router." in name for name in planned) is (router not in ("label", "random"))


@pytest.mark.parametrize("family", SEEN)
def test_every_site_is_planned_as_it_is_built(family, saved):
    maps, model = read(saved(family))
    roles = sorted({role for role, _ in maps})
    depth = model.config.get_text_config().num_hidden_layers
    entries = [
        lora(role, count, (depth - 1,), **options)
        for role, (count, options) in zip(roles, [(1, {}), (3, {}), (2, {"share_a": True}), (2, {"dora": True}), (1, {"dora": True}),
                                                  (1, {"share_a": True}), (4, {"rank": 1})], strict=False)
    ]  # fmt: skip
    assert len(fits(saved(family), entries)) >= 2 * len(roles)
    if ("down", 0) in maps:
        fits(saved(family), [lora_ffn(2, (0,), dora=True), lora_ffn(3, (1,), targets=["down"])])


def test_what_the_base_does_not_have(saved):
    maps, _ = read(saved("phi3"))
    assert set(maps_of(lora_ffn(2, (0,)).as_json(), 0, maps, "x")) == {"gate_up", "down"}
    for entry, message in (
        (lora("q", 2, (0,)), "x: site 'q' of layer 0: the base has down, gate_up, o, qkv there"),
        (lora("down", 2, (9,)), "x: site 'down' of layer 9: the base has nothing there"),
        (lora_ffn(2, (-1,)), "x: site 'ffn' of layer -1"),
    ):
        with pytest.raises(BadInput, match=message):
            shapes_of([entry.as_json()], maps, "x")
    twice = [lora("o", 2, (0, 1)).as_json(), lora("o", 3, (1,)).as_json()]
    with pytest.raises(BadInput, match="two entries for one site of layer 1"):
        shapes_of(twice, maps, "x")
    wrong = lora("o", 2, (0,)).as_json()
    wrong["experts"]["type"] = "ffn"
    with pytest.raises(BadInput, match="experts of type 'ffn' at site 'o'"):
        shapes_of([wrong], maps, "x")


def test_mixtures_have_no_dense_maps(saved, tmp_path):
    moe = run("upcycle", saved("llama"), tmp_path / "moe", experts=4, verify=False).path
    with open_checkpoint(str(moe)) as checkpoint, pytest.raises(BadInput, match="mixture of experts already"):
        linear_maps(checkpoint.config, checkpoint.tensors, "x")
    with pytest.raises(BadInput, match="no linear maps of layers found; names look like a"):
        linear_maps({}, {"a": next(iter(_infos(saved("llama")).values()))}, "x")


def _infos(path):
    with open_checkpoint(str(path)) as checkpoint:
        return dict(checkpoint.tensors)


def test_two_maps_of_one_role_are_named(saved):
    infos = _infos(saved("llama"))
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(BadInput, match="up_proj are both 'up' of layer 1"):
        linear_maps({}, {**infos, "model.layers.1.other.w3.weight": infos[name]}, "x")


def test_plain_lora_has_pefts_names(saved):
    maps, _ = read(saved("llama"))
    planned = shapes_of([lora("q", 1, (0,)).as_json()], maps, "x")
    assert planned == {
        "model.layers.0.self_attn.q_proj.lora_A.weight": (3, 64),
        "model.layers.0.self_attn.q_proj.lora_B.weight": (64, 3),
    }
    assert lora("q", 1, (0,)).router == ALWAYS
