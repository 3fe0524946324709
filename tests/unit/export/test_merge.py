"""Adapters of LoRA experts as dense checkpoints: the function where weights are constant, one expert where they are not, a refusal
with what to do instead; and the nearest plain LoRA, with the error that it says."""

import contextlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moeforge
from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.expert_adapter import ExpertAdapter
from moeforge.errors import BadInput, MoeforgeError, UsageProblem
from moeforge.model.adapters import forced
from moeforge.model.merged_experts import MergedExperts
from moeforge.testing.inprocess import plan, run
from moeforge.testing.models import save_tiny

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(family):
        if family not in made:
            made[family] = save_tiny(tmp_path_factory.mktemp(family) / "base", family)
        return made[family]

    return base


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(53)


def attach(base, out, method="custom", **more):
    """An adapter whose values are nowhere zero."""
    path = run("attach", base, out, method=method, **{"rank": 3, "verify": False, **more}).path
    values = {}
    for name, value in load_file(path / WEIGHTS).items():
        noise = torch.randn_like(value)
        values[name] = value * (1 + 0.3 * noise) if name.endswith("magnitude_vector") else noise / 8
    save_file(values, path / WEIGHTS)
    (path / "moeforge.json").unlink()  # the digests are those of other values
    return path


def merge(adapter, out, **more):
    return run("export", adapter, out, to="hf", merge=True, **more)


def logits(model, ids=None):
    ids = torch.randint(90, (2, 11), generator=torch.Generator().manual_seed(5)) if ids is None else ids
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def of(directory):
    return moeforge.load(str(directory), dtype="float32")


def stock(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def agree(found, wanted, unlike):
    """The same to rounding, and not what nothing would have given."""
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error <= 1e-5, error
    assert float((unlike - wanted).abs().max() / wanted.abs().max()) > 1e-2


CONSTANT = {
    "plain": {"sites": "q,k,v,qkv,o", "plain": "gate,up,gate_up,down", "experts": "1"},
    "rslora": {"sites": "q,qkv", "plain": "down", "experts": "1", "rslora": True, "alpha": 5.0},
    "static": {"sites": "q,v,qkv,down", "experts": "4", "router": "static", "select": "all"},
    "static top-2": {"sites": "o", "experts": "5", "router": "static", "top_k": 2, "renormalise": False},
    "static none": {
        "sites": "o",
        "experts": "3",
        "router": "static",
        "top_k": 2,
        "gate_scale": "none",
        "share_a": True,
    },
    "static null": {"sites": "up,down", "experts": "3", "router": "static", "select": "all", "null_experts": 1},
}
DORA = {
    "dora": {"sites": "q,qkv", "plain": "up,down", "experts": "1", "dora": True},
    "dora static": {"sites": "v,down", "experts": "3", "router": "static", "dora": True, "renormalise": False, "top_k": 2},
}  # fmt: skip


PAIRS = [(family, kind) for family in ("llama", "qwen2", "phi3", "gpt2") for kind in (*CONSTANT, *DORA)]


@pytest.mark.parametrize(("family", "kind"), [pair for pair in PAIRS if pair[0] != "gpt2" or pair[1] not in DORA])
def test_constant_weights_merge_into_the_same_function(family, kind, bases, tmp_path):
    base = bases(family)
    adapter = attach(base, tmp_path / "adapter", **{**CONSTANT, **DORA}[kind])
    done = merge(adapter, tmp_path / "out")
    assert done.manifest["verdicts"]["exact"] and done.manifest["verdicts"]["merged"] > 0
    agree(logits(stock(done.path)), logits(of(adapter)), logits(stock(base)))


@pytest.mark.parametrize("method", ["mixlora", "mola", "llava-mole"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_an_expert_is_merged_as_forced_routes_compute_it(method, family, bases, tmp_path):
    adapter = attach(bases(family), tmp_path / "adapter", method, experts="3", dora=method == "mola")
    model = of(adapter)
    seen = []
    for expert in (0, 2):
        done = merge(adapter, tmp_path / f"out{expert}", expert=str(expert))
        assert not done.manifest["verdicts"]["exact"] and "expert" in done.manifest["verdicts"]["why_inexact"]
        with forced(model, expert):
            wanted = logits(model)
        seen.append(logits(stock(done.path)))
        agree(seen[-1], wanted, logits(model))
    assert not torch.allclose(*seen, atol=1e-2)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_one_expert_under_a_router_counts_once_unless_its_score_does_not(score, bases, tmp_path):
    base = bases("llama")
    adapter = attach(base, tmp_path / "adapter", sites="q", experts="1")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (entry,) = settings["mixtures"]
    entry["router"] |= {"kind": "linear", "select": "topk", "score": score, "renormalise": False, "factor": 0.7}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    routers = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.router.weight": torch.randn(1, 64) for i in range(3)
    }
    save_file(load_file(adapter / WEIGHTS) | routers, adapter / WEIGHTS)
    if score == "sigmoid":
        with pytest.raises(BadInput, match="depend on the token"):
            plan("export", adapter, to="hf", merge=True)
        return
    agree(logits(stock(merge(adapter, tmp_path / "out").path)), logits(of(adapter)), logits(stock(base)))


def test_an_expert_is_called_by_the_name_it_was_imported_under(bases, tmp_path):
    adapter = attach(bases("llama"), tmp_path / "adapter", "mixlora", experts="2")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["experts"] = [{"name": "math"}, {"name": "code"}]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    by_name = load_file(merge(adapter, tmp_path / "a", expert="code").path / "model.safetensors")
    by_number = load_file(merge(adapter, tmp_path / "b", expert="1").path / "model.safetensors")
    assert all(torch.equal(by_name[name], by_number[name]) for name in by_number)
    with pytest.raises(BadInput, match=r"no expert 'law': give a number from 0 to 1 or a name \(math, code\)"):
        merge(adapter, tmp_path / "c", expert="law")


def test_rows_are_the_same_however_they_are_asked_for(bases, tmp_path):
    with open_checkpoint(
        str(attach(bases("phi3"), tmp_path / "a", sites="qkv", plain="gate_up", experts="1"))
    ) as adapter:
        assert isinstance(adapter, ExpertAdapter)
        merged = MergedExperts(adapter)
        for name in sorted(merged.changed)[:2]:
            whole = merged.read(name)
            parts = [merged.read(name, slice(at, at + 37)) for at in range(0, len(whole), 37)]
            assert np.array_equal(np.concatenate(parts), whole)
            assert not np.array_equal(whole, adapter.base.read(name))


def test_a_sixteen_bit_base_is_rounded_once_and_says_so(bases, tmp_path):
    run("export", bases("llama"), tmp_path / "short", to="hf", type="bf16")
    adapter = attach(tmp_path / "short", tmp_path / "adapter", plain="q", sites="v", experts="1")
    done = merge(adapter, tmp_path / "out")
    assert "rounded to BF16" in done.manifest["verdicts"]["why_inexact"]
    found, base = load_file(done.path / "model.safetensors"), load_file(tmp_path / "short" / "model.safetensors")
    deltas = load_file(adapter / WEIGHTS)
    name = "model.layers.1.self_attn.q_proj"
    a, b = (deltas[f"base_model.model.{name}.lora_{half}.weight"].double() for half in "AB")
    wanted = base[f"{name}.weight"].double() + 2 * b @ a
    assert found[f"{name}.weight"].dtype == torch.bfloat16
    assert torch.equal(found[f"{name}.weight"], wanted.float().bfloat16())
    assert torch.equal(found["model.norm.weight"], base["model.norm.weight"])


def test_a_sixteen_bit_base_keeps_what_is_merged_in_float32(bases, tmp_path):
    run("export", bases("llama"), tmp_path / "short", to="hf", type="bf16")
    adapter = attach(tmp_path / "short", tmp_path / "adapter", plain="q", sites="down", experts="1")
    done = merge(adapter, tmp_path / "out", type="f32")
    assert done.manifest["verdicts"]["exact"]
    agree(logits(stock(done.path)), logits(of(adapter)), logits(stock(tmp_path / "short")))


def test_what_float16_cannot_hold_is_refused(bases, tmp_path):
    adapter = attach(bases("llama"), tmp_path / "adapter", sites="q", experts="1", alpha=1e8)
    with pytest.raises(BadInput, match=r"layers.\d.self_attn.q_proj.weight merged holds .* beyond the largest F16"):
        merge(adapter, tmp_path / "out", type="f16")


@pytest.mark.parametrize("more", [{}, {"merge": True}, {"merge": True, "expert": "1"}])
def test_a_packed_base_is_decoded_only_if_asked(more, bases, tmp_path):
    run("compress", bases("llama"), tmp_path / "packed", method="nf4")
    routed = {"method": "mixlora", "experts": "2"} if "expert" in more else {"sites": "q", "experts": "1"}
    adapter = attach(tmp_path / "packed", tmp_path / "adapter", **routed)
    with pytest.raises(BadInput, match=r"the base .*packed are codes \(quantization_config\).*--dequantize"):
        plan("export", adapter, to="hf", **more)
    done = run("export", adapter, tmp_path / "out", to="hf", dequantize=True, **more)
    model = of(adapter)
    with forced(model, 1) if "expert" in more else contextlib.nullcontext():
        wanted = logits(model)
    agree(logits(of(done.path)), wanted, logits(of(tmp_path / "packed")))


REFUSED = {
    "a router": ("mola", {}, {}, "site 'q' of layers .* depend on the token.*--expert.*upcycle"),
    "a router at ffn": ("mixlora", {}, {}, "site 'ffn' .*depend on the token.*--expert merges one.*--method lora"),
    "static at ffn": ("custom", {"router": "static", "select": "all", "experts": "3"}, {}, "behind the activation"),
    "labels": ("custom", {"sites": "q", "select": "label", "experts": "3"}, {}, "kind 'label'.*depend on the token"),
    "too few": ("mola", {"experts": "2,3,4"}, {"expert": "3"}, r"no expert 3 at site 'q' of layers \[0\]: experts.count = 2"),
    "no such": ("mola", {}, {"expert": "99"}, "no expert '99': give a number from 0 to"),
    "nothing to choose": ("custom", {"sites": "q", "experts": "1"}, {"expert": "0"}, "no site has experts to choose among"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_dense_model_is_refused_in_one_line(case, bases, tmp_path):
    method, options, more, words = REFUSED[case]
    adapter = attach(bases("llama"), tmp_path / "adapter", method, **options)
    with pytest.raises(BadInput, match=words) as caught:
        plan("export", adapter, to="hf", merge=True, **more)
    assert "\n" not in str(caught.value) and str(adapter) in str(caught.value)


def test_magnitudes_on_transposed_matrices_are_refused(bases, tmp_path):
    adapter = attach(bases("gpt2"), tmp_path / "adapter", sites="up", experts="1", dora=True)
    with pytest.raises(BadInput, match=r"magnitudes on .*c_fc.weight"):
        plan("export", adapter, to="hf", merge=True)


def test_flags_that_do_not_go_together(bases, tmp_path):
    adapter = attach(bases("llama"), tmp_path / "adapter")
    for options, words in (
        ({"to": "moe"}, "moeforge upcycle ADAPTER --method lora"),
        ({"to": "gguf", "merge": True}, "--merge writes a dense checkpoint"),
        ({"to": "hf", "expert": "1"}, "--expert 1 goes with --merge"),
        ({"to": "hf", "approximate_rank": 2}, "--approximate-rank 2 writes a PEFT LoRA"),
    ):
        with pytest.raises(UsageProblem, match=words):
            plan("export", adapter, **options)
    for options in ({"to": "hf", "merge": True}, {"to": "peft", "approximate_rank": 2}):
        with pytest.raises(BadInput, match="is for adapters of LoRA experts"):
            plan("export", bases("llama"), **options)


@pytest.mark.parametrize("method", ["mixlora", "mola"])
def test_the_whole_is_a_checkpoint_of_our_own_type(method, bases, tmp_path):
    import transformers

    adapter = attach(bases("qwen2"), tmp_path / "adapter", method, experts="3")
    done = run("export", adapter, tmp_path / "out", to="hf")
    assert json.loads((done.path / "config.json").read_text())["model_type"] == "moeforge"
    wanted = logits(of(adapter))
    agree(logits(of(done.path)), wanted, logits(stock(bases("qwen2"))))
    auto = transformers.AutoModelForCausalLM.from_pretrained(done.path, dtype=torch.float32).eval()
    agree(logits(auto), wanted, logits(stock(bases("qwen2"))))


def dense_mean(adapter):
    """module -> the mean delta, in float64 and by definition."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    values = {n.removeprefix("base_model.model."): v.double() for n, v in load_file(adapter / WEIGHTS).items()}
    found = {}
    for name, b in values.items():
        if name.endswith(".lora_B.weight"):
            head, number = name.split(".experts.")[0], name.partition(".experts.")[2].partition(".")[0]
            below = name.partition(f".experts.{number}.")[2].removesuffix("lora_B.weight").strip(".")
            module = ".".join(filter(None, (head, below))) if number else name.removesuffix(".lora_B.weight")
            routed = [e for e in settings["mixtures"] if e["router"]["kind"] != "always"]
            weight = 1 / routed[0]["experts"]["count"] if number else 1
            delta = weight * 2 * b @ values[name.replace("lora_B", "lora_A")]  # alpha = 2 r
            found[module] = found.get(module, 0) + delta
    return found


@pytest.mark.parametrize("method", ["mixlora", "mola"])
def test_the_nearest_lora_and_the_error_that_it_says(method, bases, tmp_path):
    adapter = attach(bases("llama"), tmp_path / "adapter", method, experts="3")
    wanted = dense_mean(adapter)
    done = run("export", adapter, tmp_path / "out", to="peft", approximate_rank=4)
    assert done.artifact.kind == "adapter" and not done.manifest["verdicts"]["exact"]
    said, made = done.manifest["counts"]["relative_error"], load_file(done.path / WEIGHTS)
    assert set(said) == set(wanted) and len(made) == 2 * len(wanted)
    for module, delta in wanted.items():
        a, b = (made[f"base_model.model.{module}.lora_{half}.weight"].double() for half in "AB")
        values = torch.linalg.svdvals(delta)
        least = float(values[4:].norm() / values.norm())
        error = float((b @ a - delta).norm() / delta.norm())
        assert error == pytest.approx(least, abs=1e-6) and said[module] == pytest.approx(least, abs=1e-6)
    routed = next(module for module in wanted if "mlp" in module)
    assert said[routed] > 0.05
    whole = run("export", adapter, tmp_path / "whole", to="peft", approximate_rank=9)
    assert max(whole.manifest["counts"]["relative_error"].values()) < 1e-6
    import peft

    model: Any = peft.PeftModel.from_pretrained(stock(bases("llama")), whole.path).eval()
    by_hand: Any = stock(bases("llama"))
    with torch.no_grad():
        for module, delta in wanted.items():
            by_hand.get_submodule(module).weight.add_(delta.float())
    agree(logits(model), logits(by_hand), logits(stock(bases("llama"))))
    agree(logits(of(whole.path)), logits(by_hand), logits(stock(bases("llama"))))


def test_magnitudes_have_no_nearest_lora(bases, tmp_path):
    adapter = attach(bases("llama"), tmp_path / "adapter", "mola", dora=True)
    with pytest.raises(MoeforgeError, match=r"options.dora of site 'q'"):
        plan("export", adapter, to="peft", approximate_rank=4)
