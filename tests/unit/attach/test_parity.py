"""The four published mixtures in every family on every back end: logits and all gradients beside a loop over whole networks in float64."""

import pytest

from moeforge.testing.adapters import save_adapter
from moeforge.testing.models import save_tiny, tiny_dense
from moeforge.testing.whole_experts import BACKENDS, ask_mixture, ask_whole, decode, layers_of, pinned, presets, worst
from moeforge_kernels import lora_experts, lora_network, routing
from moeforge_kernels.cpu import library

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "gpt2")
PRESETS = ("mixlora", "mola", "llava-mole", "lora-mixer")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """`adapter(family, preset)`: the directory of an adapter whose experts differ, beside its base."""
    root = tmp_path_factory.mktemp("parity")

    def save(family, preset):
        base, out = root / family, root / f"{family}-{preset}"
        if not base.exists():
            save_tiny(base, family)
        if not out.exists():
            save_adapter(out, base, presets(layers_of(tiny_dense(family)[0])[1])[preset])
        return out

    return save


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_logits_and_all_gradients(preset, family, adapter):
    path = adapter(family, preset)
    wanted = ask_whole(path, training=True)
    reached = sum(bool(g.any()) for g in wanted.gradients.values()) / len(wanted.gradients)
    assert reached >= 0.7, "some experts stay without tokens, most do not"
    for name, backends in BACKENDS.items():
        try:
            found = ask_mixture(path, backends, training=True)
        except ValueError as error:
            assert name == "cpu" and "cannot run this" in str(error)
            continue
        assert found.gradients.keys() == wanted.gradients.keys()
        tensor, error = worst(wanted.errors(found))
        assert error <= TOLERANCE, f"{name}: {tensor}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_token_after_token(preset, family, adapter, monkeypatch):
    """Without gradients, a few pairs at a time: on the compiled ops of a decoding step where they run."""
    path, asked = adapter(family, preset), []
    for op in (lora_experts.OP, lora_network.OP, routing.OP):
        plain = op.backends["cpu"].function
        monkeypatch.setitem(op.backends["cpu"].__dict__, "function",
                            lambda *args, plain=plain, op=op, **how: asked.append(op.name) or plain(*args, **how))  # fmt: skip
    found = decode(path).double()
    wanted = ask_whole(path, training=False).logits[: len(found)]
    assert float((found - wanted).norm()) <= TOLERANCE * float(wanted.norm())
    ffn = preset in ("mixlora", "llava-mole")
    used = {"lora_experts", *(["lora_network"] if ffn else []), *(["routing"] if preset != "llava-mole" else [])}
    assert set(asked) == (used if library.lacks(False) is None else set())


@pytest.mark.parametrize("preset", PRESETS)
def test_another_choice_in_use(preset, adapter):
    """LoRA-Mixer takes all experts in training and its best three after; the others choose alike."""
    path = adapter("llama", preset)
    wanted, training = ask_whole(path, training=False), ask_whole(path, training=True)
    found = ask_mixture(path, {}, training=False)
    assert worst(wanted.errors(found))[1] <= TOLERANCE
    assert (worst(training.errors(found))[1] <= TOLERANCE) is (preset != "lora-mixer")


def test_an_error_of_one_part_in_a_thousand_is_seen(adapter, monkeypatch):
    from moeforge.mixture.experts.lora_ffn import LoraFFNExperts

    path = adapter("llama", "mixlora")
    wanted = ask_whole(path, training=True)
    real = LoraFFNExperts._scale
    monkeypatch.setattr(LoraFFNExperts, "_scale", lambda self: real(self) * 1.001)
    assert worst(wanted.errors(ask_mixture(path, {}, training=True)))[1] > 10 * TOLERANCE


def test_back_ends_are_the_ones_asked_for():
    from moeforge_kernels import lora_ffn

    given = (None,) * 9
    for name in ("blocked", "grouped", "reference"):
        with pinned({"lora_ffn": name}):
            assert lora_ffn.OP.choose(None, *given).name == name
    assert "choose" not in vars(lora_ffn.OP)
    assert worst({"a": 1.0, "b": float("nan"), "c": 2.0})[0] == "b"
