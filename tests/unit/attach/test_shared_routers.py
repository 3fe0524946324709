"""`attach --router-input shared` from the command to every verb that reads what it writes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeforge
from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.expert_adapter import ExpertAdapter
from moeforge.checkpoint.linear_maps import linear_maps
from moeforge.checkpoint.lora_formats.places import places
from moeforge.errors import BadInput, MoeforgeError, UsageProblem
from moeforge.model.adapters import forced
from moeforge.model.streaming import StreamedModel
from moeforge.testing.inprocess import plan, run
from moeforge.testing.models import save_tiny

WEIGHTS = "adapter_model.safetensors"
IDS = torch.randint(90, (2, 11), generator=torch.Generator().manual_seed(5))
ATTENTION, FFN = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("shared") / "base", "llama")


def attach(base, out, **options):
    return run("attach", base, out, **{"rank": 3, "verify": False, "router_input": "shared", **options}).path


def scattered(path):
    """The adapter with values that are nowhere zero."""
    generator = torch.Generator().manual_seed(31)
    values = {
        name: torch.randn(value.shape, generator=generator) / 8 for name, value in load_file(path / WEIGHTS).items()
    }
    save_file(values, path / WEIGHTS)
    (path / "moeforge.json").unlink()  # the digests are those of other values
    return path


def tensors(path):
    return {name.removeprefix("base_model.model.model."): value for name, value in load_file(path / WEIGHTS).items()}


def routers(path):
    return {name.removesuffix(".router.weight") for name in tensors(path) if name.endswith(".router.weight")}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def of(path):
    return moeforge.load(str(path), dtype="float32")


def close(found, wanted, tolerance=1e-5):
    assert bool(found.isfinite().all())
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


def separate(path, out):
    """The same adapter with a router at every site, in files alone."""
    held = load_file(path / WEIGHTS)
    for name in [name for name in held if ".router." in name]:
        at, _, leaf = name.partition(".router.")
        block, _, keeper = at.rpartition(".")
        for site in next((group for group in (ATTENTION, FFN) if keeper in group), ()):
            if f"{block}.{site}.experts.0.lora_B.weight" in held:
                held[f"{block}.{site}.router.{leaf}"] = held[name].clone()
    out.mkdir()
    settings = json.loads((path / "adapter_config.json").read_text())
    for entry in settings["mixtures"]:
        entry["router"]["input"] = "site"
    (out / "adapter_config.json").write_text(json.dumps(settings))
    save_file(held, out / WEIGHTS)
    return out


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "phi3"])
@pytest.mark.parametrize("method", ["mola", "lora-mixer"])
def test_it_is_proven_as_any_other_or_has_nothing_to_share(family, method, tmp_path):
    save_tiny(tmp_path / "base", family)
    if family in ("gpt_neox", "phi3"):  # q, k and v are one map there, and gate and up
        with pytest.raises(
            UsageProblem, match="--router-input shared: no layer has experts at two linear maps that read the same"
        ):
            attach(tmp_path / "base", tmp_path / "out", method=method)
        return
    out = attach(tmp_path / "base", tmp_path / "out", method=method, verify=True)
    verdicts = json.loads((out / "moeforge.json").read_text())["verdicts"]
    assert verdicts["verified"] and not verdicts["failed"]
    assert verdicts["measured"]["tensors_reached"] == verdicts["measured"]["tensors_learning"] > 0
    assert routers(out) == {f"layers.{i}.{site}" for i in range(3) for site in
                            ("self_attn.q_proj", "self_attn.o_proj", *(("mlp.gate_proj", "mlp.down_proj") if method == "mola" else ()))}  # fmt: skip


def test_plan_and_files_hold_a_router_once_and_what_is_left_starts_as_without(base, tmp_path):
    out, apart = (
        attach(base, tmp_path / "out", method="mola"),
        attach(base, tmp_path / "apart", method="mola", router_input="site"),
    )
    one, many = tensors(out), tensors(apart)
    assert many.keys() - one.keys() == {f"layers.{i}.{site}.router.weight" for i in range(3) for site in
                                        ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")}  # fmt: skip
    assert all(torch.equal(many[name], value) for name, value in one.items())
    made = plan("attach", base, method="mola", rank=3, router_input="shared")
    assert set(made.tensors) == {f"model.{name}" for name in one}
    assert made.facts["parameters_adapter"] == sum(value.numel() for value in one.values())
    with open_checkpoint(str(out)) as adapter:
        assert isinstance(adapter, ExpertAdapter)
        maps = linear_maps(adapter.base.config, adapter.base.tensors, "x")
        assert sorted(place.name for place in places(adapter.entries, maps, "x")) == sorted(adapter.own)
    assert {e["router"]["input"] for e in json.loads((out / "adapter_config.json").read_text())["mixtures"]} == {
        "shared"
    }


@pytest.mark.parametrize("more", [{"method": "mola", "experts": "1,2,3"}, {"method": "lora-mixer", "null_experts": 1}, {"method": "mola", "select": "label"},
                                  {"method": "custom", "sites": "v,k,down", "share_a": True}, {"method": "custom", "sites": "up,gate", "router": "static"}])  # fmt: skip
def test_from_files_it_is_the_same_as_separate_routers(base, tmp_path, more):
    one = scattered(attach(base, tmp_path / "one", **more))
    if "sites" in more:
        assert {name.rpartition(".")[2] for name in routers(one)} == {
            "v,k,down": {"k_proj", "down_proj"},
            "up,gate": {"gate_proj"},
        }[more["sites"]]
    many = separate(one, tmp_path / "many")
    found, wanted = (of(path).eval() for path in (one, many))
    for expert in (None, 1):
        labels = {"mixture_labels": IDS % 2}
        with torch.no_grad(), forced(found, expert), forced(wanted, expert):
            close(found(input_ids=IDS, **labels).logits, wanted(input_ids=IDS, **labels).logits, 1e-6)


def test_streamed_exported_and_saved_it_is_the_same_model(base, tmp_path):
    one = scattered(attach(base, tmp_path / "one", method="mola"))
    wanted = logits(of(one))
    close(wanted, logits(of(separate(one, tmp_path / "many"))), 1e-6)
    with open_checkpoint(str(one)) as adapter:
        streamed = StreamedModel(adapter)
        (state,) = streamed.start([IDS])
        for index in range(streamed.depth):
            with streamed.layer(index) as layer:
                streamed.advance(state, layer)
        close(streamed.logits(state), wanted, 1e-6)
    whole = run("export", one, tmp_path / "whole", to="hf").path
    close(logits(of(whole)), wanted, 1e-6)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    assert model.model.layers[0].self_attn.k_proj.shared_input is model.model.layers[0].self_attn.q_proj.shared_input
    model.save_pretrained(tmp_path / "again")
    assert sum(".router." in name for name in load_file(tmp_path / "again" / "model.safetensors")) == 3 * 4
    close(logits(of(tmp_path / "again")), wanted, 1e-6)


@pytest.mark.parametrize("to", ["mola", "moe-peft"])
def test_other_programs_get_it_at_every_site(base, tmp_path, to):
    one = scattered(attach(base, tmp_path / "one", method="mola", experts="3"))
    made = run("export", one, tmp_path / "theirs", to=to)
    assert any("a router for each site" in text for text in made.manifest["warnings"])
    again = run(
        "attach", base, tmp_path / "again", method="import", adapter=str(made.path), allow_pickle=True, verify=False
    ).path
    wanted = separate(one, tmp_path / "many")
    assert tensors(again).keys() == tensors(wanted).keys()
    assert all(torch.equal(tensors(again)[name], value) for name, value in tensors(wanted).items())
    close(logits(of(again)), logits(of(one)), 1e-6)


def test_each_expert_is_a_plain_lora_and_constant_weights_are_merged(base, tmp_path):
    one = scattered(attach(base, tmp_path / "one", method="custom", sites="q,k,v,o", experts="2", router="static"))
    model = of(one)
    merged = run("export", one, tmp_path / "merged", to="hf", merge=True).path
    close(logits(of(merged)), logits(model))
    loras = run("export", one, tmp_path / "loras", to="peft-experts")
    assert not any("a router for each site" in text for text in loras.manifest["warnings"])
    for expert in range(2):
        lora = run(
            "attach",
            base,
            tmp_path / f"lora-{expert}",
            method="import",
            adapter=str(loras.path / f"expert-{expert}"),
            verify=False,
        ).path
        with forced(model, expert):
            close(logits(of(lora)), logits(model))


def imported(base, at):
    """Three LoRAs, of which none adapts all maps."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    for name, config in {"math": {"r": 3, "target_modules": ["q_proj", "v_proj"]}, "code": {"r": 5, "alpha_pattern": {"k_proj": 20}, "target_modules": ["q_proj", "k_proj"]},
                         "law": {"r": 2, "lora_alpha": 30, "target_modules": ["v_proj", "k_proj"]}}.items():  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config)
        ).save_pretrained(at / name)
    return tuple(f"{name}={at / name}" for name in ("math", "code", "law"))


def test_loras_trained_apart_get_one_router_which_starts_at_what_they_answer_most(base, tmp_path):
    torch.manual_seed(7)
    refs = imported(base, tmp_path)
    out = attach(
        base,
        tmp_path / "out",
        method="lora-mixer",
        experts_from=refs,
        router="cosine",
        router_init="prototypes",
        verify=True,
    )
    verdicts = json.loads((out / "moeforge.json").read_text())["verdicts"]
    assert verdicts["verified"] and not verdicts["failed"]
    assert routers(out) == {f"layers.{i}.self_attn.q_proj" for i in range(3)}
    model, held = of(out), tensors(out)
    for layer in range(3):
        at = f"layers.{layer}.self_attn"
        for e in range(3):
            deltas = []
            for site in ATTENTION:
                a, b = (held[f"{at}.{site}.experts.{e}.lora_{half}.weight"].double() for half in "AB")
                deltas.append(model.model.layers[layer].self_attn.get_submodule(site).experts.scales[e] * b @ a)
            row = held[f"{at}.q_proj.router.weight"][e].double()
            answered = float((torch.cat(deltas) @ row).norm())
            # the power method stops early where two directions answer nearly alike
            assert abs(float(row.norm()) - 1) < 1e-5 and answered > 0.95 * float(
                torch.linalg.svdvals(torch.cat(deltas))[0]
            )


def test_tuned_every_router_learns_and_the_routers_alone_can(base, tmp_path):
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} bottles, " * (i % 5 + 1)}) + "\n" for i in range(40))
    )
    from moeforge.testing.models import tiny_dense, tiny_tokenizer

    tiny_dense("llama")[0].save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    one = attach(tmp_path / "base", tmp_path / "one", method="mola", experts="3")
    options = {
        "data": (str(tmp_path / "text.jsonl"),),
        "steps": 3,
        "sequence_length": 32,
        "batch_size": 2,
        "learning_rate": 1e-2,
    }
    before = tensors(one)
    for train in ("all", "routers"):
        made = run("tune", one, tmp_path / train, train=train, gradient_checkpointing=True, **options)
        after = tensors(made.path)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert after.keys() == before.keys()
        assert {name for name in before if ".router." in name} <= moved
        # B starts at zero: routers alone learn from the balance loss only
        assert (moved == {name for name in before if ".router." in name}) is (train == "routers")
        assert made.manifest["counts"]["parameters_trained"] == sum(
            before[name].numel() for name in (before if train == "all" else moved)
        )


def test_refusals(base, tmp_path):
    for more, told in (({"method": "mixlora"}, r"--router-input shared: .*q, k, v; gate, up.*there are some at ffn"),
                       ({"method": "custom", "sites": "q,o,up"}, r"there are some at q, o, up"),
                       ({"method": "mola", "experts": "1"}, r"there are some at none")):  # fmt: skip
        with pytest.raises(UsageProblem, match=told) as caught:
            attach(base, tmp_path / "out", **more)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    one = attach(base, tmp_path / "one", method="lora-mixer")
    settings = json.loads((one / "adapter_config.json").read_text())
    settings["mixtures"][0]["router"]["input"] = "layer"
    (one / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(BadInput, match=r"router\.input = 'layer': expected 'site' or 'shared'"):
        open_checkpoint(str(one))


def test_a_file_with_a_router_too_many_or_too_few_is_refused(base, tmp_path):
    one = attach(base, tmp_path / "one", method="lora-mixer")
    held = load_file(one / WEIGHTS)
    name = "base_model.model.model.layers.1.self_attn.{}.router.weight"
    save_file({**held, name.format("k_proj"): held[name.format("q_proj")].clone()}, one / WEIGHTS)
    with pytest.raises(MoeforgeError, match=r"holds .*k_proj\.router\.weight, which its mixtures do not name"):
        open_checkpoint(str(one))
    save_file({n: v for n, v in held.items() if n != name.format("q_proj")}, one / WEIGHTS)
    with pytest.raises(MoeforgeError, match=r"q_proj\.router\.weight is missing"):
        open_checkpoint(str(one))
