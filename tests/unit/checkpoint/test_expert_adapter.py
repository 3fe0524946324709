"""An adapter of LoRA experts is read as the whole checkpoint that it makes of its base, from any kind of base, or refused in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moeforge
from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.adapter_layout import CONFIG, PREFIX, WEIGHTS
from moeforge.checkpoint.expert_adapter import ExpertAdapter
from moeforge.errors import BadInput
from moeforge.mixture.config import RouterConfig
from moeforge.mixture.statistics import Statistics
from moeforge.model.adapters import values_of
from moeforge.model.load import assemble
from moeforge.model.streaming import StreamedModel
from moeforge.testing.adapters import lora, lora_ffn, save_adapter
from moeforge.testing.inprocess import run
from moeforge.testing.models import save_tiny, tiny_llava

BASES = {
    "llama": [lora_ffn(3, (0, 2)), lora("q", 1, (0, 1, 2)), lora("o", 2, (1,), RouterConfig(null_experts=1), share_a=True)],
    "phi3": [lora_ffn(2, (1,), RouterConfig(select="topp", renormalise=False)), lora("qkv", 3, (0, 1))],
    "gpt2": [lora_ffn(3, (0, 1)), lora("qkv", 2, (0,), dora=True), lora("o", 1, (2,))],
    "gpt_neox": [lora_ffn(2, (2,), dora=True), lora("qkv", 2, (1,), RouterConfig(kind="cosine"))],
    "bert": [lora_ffn(2, (0,)), lora("v", 2, (0, 1))],
    "mamba": [lora("in", 3, (0, 2)), lora("in", 1, (1,))],
    "falcon_mamba": [lora("in", 2, (0, 1, 2), RouterConfig(kind="static", top_k=1))],
    "llava": [lora_ffn(3, (0, 1, 2), RouterConfig(top_k=1)), lora("k", 2, (1,))],
}  # fmt: skip
"""Type of the base -> entries that suit it."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """`base(family)`: the directory of its tiny model, written once."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def save(family):
        if family not in made:
            made[family] = root / family
            if family == "llava":
                tiny_llava()[0].save_pretrained(made[family])
            else:
                save_tiny(made[family], family)
        return made[family]

    return save


def inputs_of(family):
    """Two sequences, the second one padded on the left; LLaVA's first tokens are an image."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 190, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    if family != "llava":
        return {"input_ids": ids, "attention_mask": mask}
    ids[:, 2:6] = 198
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}


def logits(model, family, **more):
    with torch.no_grad():
        return model(**inputs_of(family), **more).logits


def assert_same(one, other, family):
    """Every parameter bit for bit; logits up to rounding, as where a tensor lies in memory decides how some processors add it up."""
    found, wanted = dict(one.named_parameters()), dict(other.named_parameters())
    assert found.keys() == wanted.keys()
    assert [name for name, value in found.items() if not torch.equal(value, wanted[name])] == []
    gap = (logits(one, family) - logits(other, family)).norm() / logits(other, family).norm()
    assert gap <= 1e-5


def bytes_in(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("family", BASES)
def test_it_is_one_checkpoint_however_it_is_read(family, base, tmp_path):
    out = save_adapter(tmp_path / "out", base(family), BASES[family])
    with open_checkpoint(str(out)) as whole:
        assert isinstance(whole, ExpertAdapter) and whole.config["model_type"] == "moeforge"
        assert all(whole.read(name).shape == info.shape for name, info in whole.tensors.items())
        loaded = moeforge.load(whole, dtype="float32")
        beside = logits(loaded, family)
        # the way of any other checkpoint of that type, whose reader knows no adapter
        again = assemble(whole, dtype="float32", device="cpu", attention=None)
        assert_same(again, loaded, family)
    dense = logits(moeforge.load(str(base(family)), dtype="float32"), family)
    assert (beside - dense).norm() > 1e-3 * dense.norm(), "the experts take part"
    still = save_adapter(tmp_path / "still", base(family), BASES[family], scatter=0)
    found = logits(moeforge.load(str(still), dtype="float32"), family)
    assert (found - dense).norm() <= 1e-5 * dense.norm(), (
        "B = 0 and base_weight = one: the base, whatever the gates sum to"
    )


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_streamed_layer_by_layer_it_is_the_same(family, base, tmp_path):
    out = save_adapter(tmp_path / "out", base(family), BASES[family])
    ids = inputs_of(family)["input_ids"]
    with open_checkpoint(str(out)) as whole:
        streamed = StreamedModel(whole)
        (state,) = streamed.run([ids])
        found = streamed.logits(state)
    with torch.no_grad():
        wanted = moeforge.load(str(out), dtype="float32")(input_ids=ids).logits
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("family", BASES)
def test_a_step_of_training_is_saved_and_read_again(family, base, tmp_path):
    out = save_adapter(tmp_path / "out", base(family), BASES[family])
    before = bytes_in(base(family))
    model = moeforge.load(str(out), dtype="float32").train()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(values_of(model)) == len(load_file(out / WEIGHTS))
    inputs = inputs_of(family)
    loss = torch.nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), inputs["input_ids"].flatten())
    loss.backward()
    unreached = [name for name, p in learning.items() if p.grad is None or not p.grad.any()]
    assert not [name for name in unreached if not name.endswith("router.weight")], (
        "top-1, renormalised, has no gradient"
    )
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    torch.optim.AdamW(learning.values(), lr=0.01).step()
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(out / CONFIG, again)
    save_file({PREFIX + name: value.contiguous() for name, value in values_of(model).items()}, again / WEIGHTS)
    assert_same(moeforge.load(str(again), dtype="float32"), model.eval(), family)
    with pytest.raises(AssertionError):
        assert_same(moeforge.load(str(out), dtype="float32"), model, family)
    assert bytes_in(base(family)) == before


def test_images_and_text_route_and_padding_does_not_count(base, tmp_path):
    out = save_adapter(tmp_path / "out", base("llava"), BASES["llava"])
    model = moeforge.load(str(out), dtype="float32")
    labels = (inputs_of("llava")["input_ids"] == 198).long()
    with model.mixture_context.record() as seen:
        found = logits(model, "llava", mixture_labels=labels)
    statistics = Statistics(labels=2)
    statistics.add(seen, labels.flatten())
    mask = inputs_of("llava")["attention_mask"].bool()
    assert len(seen) == 4
    for routing in seen.values():
        assert torch.equal(routing.real, mask.flatten())
    for name, layer in statistics.as_json().items():
        assert layer["tokens"] == 16 and layer["uncovered"] == 0, "two of eighteen are padding"
        assert all(sum(load) == pytest.approx(1) for load in layer["by_label"]), f"{name}: text and image"
    # what stands in the padding changes nothing
    inputs = inputs_of("llava")
    inputs["input_ids"][1, :2] = 7
    with torch.no_grad():
        again = model(**inputs).logits
    assert (again - found)[mask].abs().max() <= 1e-5 * found.abs().max()


def test_beside_a_base_in_4_bits(base, tmp_path):
    """The adapter of the plain base fits the packed one, which stays packed: B = 0 changes nothing, every tensor of the adapter learns."""
    pytest.importorskip("bitsandbytes")
    packed = run("compress", base("llama"), tmp_path / "nf4", "nf4", eval=False).path
    before = bytes_in(packed)
    entries = [lora_ffn(3, (0, 2)), lora("q", 1, (0, 1, 2)), lora("o", 2, (1,))]
    dense = logits(moeforge.load(str(packed), dtype="float32"), "llama")
    plain = logits(moeforge.load(str(base("llama")), dtype="float32"), "llama")
    assert (plain - dense).norm() > 1e-3 * plain.norm(), "4 bits are not the plain weights"
    still = save_adapter(tmp_path / "still", packed, entries, scatter=0)
    found = logits(moeforge.load(str(still), dtype="float32"), "llama")
    assert (found - dense).norm() <= 1e-5 * dense.norm()
    model = moeforge.load(str(save_adapter(tmp_path / "out", packed, entries)), dtype="float32").train()
    inputs = inputs_of("llama")
    torch.nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), inputs["input_ids"].flatten()).backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert len(learning) == 2 * (6 + 1) + 3 * 2 + 3 and all(p.grad is not None and p.grad.any() for p in learning)
    torch.optim.AdamW(learning, lr=0.01).step()
    assert bytes_in(packed) == before
    moved = json.loads((still / CONFIG).read_text()) | {"base_model_name_or_path": str(base("llama"))}
    (still / CONFIG).write_text(json.dumps(moved))
    found = logits(moeforge.load(str(still), dtype="float32"), "llama")
    assert (found - plain).norm() <= 1e-5 * plain.norm(), "and beside the plain base it is the plain base"


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats(dtype, base, tmp_path):
    out = save_adapter(tmp_path / "out", base("llama"), BASES["llama"], dtype=dtype)
    wide = save_adapter(tmp_path / "wide", base("llama"), BASES["llama"])
    found, wanted = (logits(moeforge.load(str(path), dtype="float32"), "llama") for path in (out, wide))
    assert (found - wanted).norm() <= {np.float16: 1e-2, np.float64: 1e-7}[dtype] * wanted.norm()


def test_a_base_beside_the_adapter_is_found_from_anywhere(base, tmp_path, monkeypatch):
    shutil.copytree(base("llama"), tmp_path / "home" / "base")
    out = save_adapter(tmp_path / "home" / "out", base("llama"), BASES["llama"], base_model_name_or_path="../base")
    monkeypatch.chdir(tmp_path)
    with open_checkpoint(str(out)) as whole:
        settings = whole.settings_at(tmp_path / "elsewhere")
        assert settings["base_model_name_or_path"] == str(out / "../base").replace("/out/..", "")
        assert whole.settings_at(out) == whole.settings
        assert whole.base.tensors.keys() == whole.tensors.keys() - whole.own


def test_the_digest_is_that_of_adapter_and_base(base, tmp_path):
    made = {
        name: save_adapter(tmp_path / name, base("llama"), BASES["llama"], seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    }
    shutil.copytree(made["a"], tmp_path / "d")
    (tmp_path / "d" / CONFIG).write_text((made["a"] / CONFIG).read_text().replace('"alpha": 6.0', '"alpha": 7.0'))
    seen = {}
    for path in (*made.values(), tmp_path / "d"):
        with open_checkpoint(str(path)) as whole:
            seen[path.name] = whole.provenance()
            assert seen[path.name]["base"]["digest"].startswith("sha256:")
    assert len({found["digest"] for found in seen.values()}) == 4


class TestRefusals:
    @pytest.fixture
    def out(self, base, tmp_path):
        return save_adapter(tmp_path / "out", base("llama"), BASES["llama"])

    def refused(self, out, *, load=False):
        with pytest.raises(BadInput) as caught:
            moeforge.load(str(out)) if load else open_checkpoint(str(out)).close()
        assert str(caught.value).isprintable()
        return str(caught.value)

    def change(self, out, place="", **values):
        body = json.loads((out / CONFIG).read_text())
        inner = body
        for key in filter(None, place.split(".")):
            inner = inner[int(key) if key.isdecimal() else key]
        inner.update(values)
        (out / CONFIG).write_text(json.dumps(body))

    def test_other_bases(self, out, base, tmp_path):
        self.change(out, base_model_name_or_path=str(base("phi3")))
        assert "made for a base of type 'llama'" in self.refused(out) and "phi3" in self.refused(out)
        for name, more, message in (
            ("wide", {"intermediate_size": 128}, "the base"),
            ("shallow", {"num_hidden_layers": 2}, "site 'ffn' of layer 2: the base has nothing there"),
            ("words", {"vocab_size": 211}, "the shapes of"),
        ):
            self.change(out, base_model_name_or_path=str(save_tiny(tmp_path / name, "llama", **more)))
            assert message in self.refused(out)

    def test_other_tensors(self, out):
        tensors = load_file(out / WEIGHTS)
        name = f"{PREFIX}model.layers.0.mlp.experts.1.up_proj.lora_B.weight"

        def held(changed):
            save_file(changed, out / WEIGHTS)
            return self.refused(out)

        assert f"{name} is missing; the adapter is incomplete" in held({n: v for n, v in tensors.items() if n != name})
        assert f"{name}s, which its mixtures do not name" in held({**tensors, f"{name}s": torch.ones(2)})
        assert f"{name} is [96, 2], the base" in held({**tensors, name: tensors[name][:, :2].contiguous()})
        assert f"{name} is I32: an adapter's weights are floating-point numbers" in held(
            {**tensors, name: tensors[name].int()}
        )
        assert "holds 1 tensors; the adapter is incomplete" in held({name: tensors[name]})

    def test_damaged_files(self, out, tmp_path):
        data = (out / WEIGHTS).read_bytes()
        for kept in (data[:-1], data[:100], b""):
            (out / WEIGHTS).write_bytes(kept)
            assert WEIGHTS in self.refused(out)
        (out / WEIGHTS).unlink()
        assert f"no {WEIGHTS}" in self.refused(out)
        (tmp_path / "elsewhere").write_bytes(data)
        (out / WEIGHTS).symlink_to(tmp_path / "elsewhere")
        assert "lead" in self.refused(out) and WEIGHTS in self.refused(out)

    @pytest.mark.parametrize(("place", "values", "message"), [
        ("", {"surprise": 1}, "unknown key 'surprise'; a newer moeforge"),
        ("", {"format_version": 2}, "format_version = 2; this moeforge reads 1"),
        ("", {"format_version": None}, "format_version = None"),
        ("", {"base_shapes_sha256": 5}, "says 5"),
        ("", {"base_model_name_or_path": 5}, "base_model_name_or_path is 5"),
        ("", {"base_model_name_or_path": "no/../where"}, "no/../where: no such file or directory"),
        ("", {"revision": ["main"]}, "revision = ['main']: expected"),
        ("", {"attach": 1}, "attach = 1: expected an object"),
        ("", {"experts": ["a"]}, "experts = ['a']: expected a list of objects"),
        ("", {"mixtures": []}, "mixtures = []: expected a list of entries"),
        ("", {"mixtures": [7]}, "mixtures[0] = 7: expected an object"),
        ("mixtures.1", {"site": None}, "mixtures[1].site = None: expected a name"),
        ("mixtures.1", {"layers": [True]}, "mixtures[1].layers = [True]: expected numbers of layers"),
        ("mixtures.0", {"experts": {}}, "mixtures[0].experts.type is missing: expected a name"),
        ("mixtures.0.experts", {"count": 0}, "mixtures[0].experts.count = 0"),
        ("mixtures.0.experts", {"count": 10**12}, "asks for 2000000000005 experts"),
        ("mixtures.0.experts.options", {"targets": 3}, "mixtures[0].experts.options.targets = 3"),
        ("mixtures.0.router", {"null_experts": "2"}, "mixtures[0].router.null_experts = '2'"),
        ("mixtures.0.router", {"kind": ["linear"]}, "mixtures[0].router.kind = ['linear']"),
        ("mixtures.2.experts", {"type": "ffn"}, "experts of type 'ffn' at site 'o'"),
        ("mixtures.0", {"layers": [0, 0]}, "would stand there twice"),
    ])  # fmt: skip
    def test_settings(self, place, values, message, out):
        self.change(out, place, **values)
        assert message in self.refused(out)

    @pytest.mark.parametrize(("place", "values", "message"), [
        ("mixtures.0", {"surprise": 1}, "mixtures: unknown key 'surprise'"),
        ("mixtures.0.router", {"top_k": 9}, "top_k = 9"),
        ("mixtures.0.experts.options", {"surprise": 1}, "options.surprise is not known"),
        ("mixtures.0.experts.options", {"ranks": 3}, "options.ranks = 3: expected a list"),
        ("mixtures.0.experts", {"gated": False}, "gated = false"),
        ("mixtures.0.experts", {"width": 2**40}, "width = 1099511627776: they are built on the network there, which is 96 wide"),
        ("mixtures.0", {"keep": True}, "only what stands beside it is an adapter"),
    ])  # fmt: skip
    def test_entries_without_meaning(self, place, values, message, out):
        self.change(out, place, **values)
        assert message in self.refused(out, load=True)

    def test_no_adapter_is_its_own_base(self, out, base, tmp_path):
        self.change(out, base_model_name_or_path=str(out))
        assert "this adapter is its own base" in self.refused(out)
        lora = tmp_path / "lora"
        lora.mkdir()
        settings = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
            "base_model_name_or_path": str(out),
        }
        (lora / CONFIG).write_text(json.dumps(settings))
        save_file({"base_model.model.x": torch.ones(1)}, lora / WEIGHTS)
        self.change(out, base_model_name_or_path=str(lora))
        assert f"its own base, by way of {lora}" in self.refused(out)
        other = save_adapter(tmp_path / "other", base("llama"), BASES["llama"])
        self.change(out, base_model_name_or_path=str(other))
        assert "mixture of experts already" in self.refused(out)
