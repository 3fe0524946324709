"""`tune` on adapters of LoRA experts: what learns, what is written, and that neither base nor interruption changes it."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

import moeforge
from moeforge.errors import Interrupted, MoeforgeError, UsageProblem
from moeforge.testing import inprocess
from moeforge.testing.models import tiny_dense, tiny_tokenizer
from moeforge.train.loop import Loop

SHORT = {"sequence_length": 32, "batch_size": 2, "learning_rate": 1e-2}


def digest(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.is_file()
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny Llama, two kinds of text, and adapters beside them."""
    place = tmp_path_factory.mktemp("tune")
    tiny_dense("llama")[0].save_pretrained(place / "dense")
    tiny_tokenizer().save_pretrained(place / "dense")
    (place / "one.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} bottles, " * (i % 5 + 1), "kind": "wine"}) + "\n" for i in range(40))
    )
    (place / "two.jsonl").write_text(
        "".join(json.dumps({"text": f"x = {i}\n" * (i % 4 + 1), "kind": "code"}) + "\n" for i in range(40))
    )
    for name, more in {"mixlora": {"experts": "4"}, "mola": {"experts": "1,2,3"}}.items():
        inprocess.run("attach", place / "dense", place / name, name, rank=4, verify=False, **more)
    return place


def tune(home, src, out, **options):
    data = options.pop("data", (str(home / "one.jsonl"), str(home / "two.jsonl")))
    return inprocess.run("tune", src, out, data=data, **{"steps": 4, **SHORT, **options})


def tensors(directory):
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["mixlora", "mola"])
def test_an_adapter_comes_out_that_learnt_everywhere_and_the_base_stays(home, tmp_path, name):
    before = digest(home / "dense")
    made = tune(home, home / name, tmp_path / "out", steps=25, entropy=0.01, importance=0.01)
    assert made.manifest["kind"] == "adapter" and made.artifact.kind == "adapter"
    assert not list(made.path.glob("model*")) and not list(made.path.glob("state-*"))
    old, new = tensors(home / name), tensors(made.path)
    assert old.keys() == new.keys() and all(old[n].dtype == new[n].dtype for n in old)
    # an expert that no token ever chose would stand still
    assert sum(torch.equal(old[n], new[n]) for n in old) == 0
    assert digest(home / "dense") == before
    verdicts = made.manifest["verdicts"]
    assert verdicts["held_out_loss_after"] < verdicts["held_out_loss_before"] - 0.3
    assert (made.path / "adapter_config.json").read_text() == (home / name / "adapter_config.json").read_text()
    ids = torch.arange(12).view(2, 6)
    tuned, dense = (
        moeforge.load(str(path), dtype="float32")(input_ids=ids).logits for path in (made.path, home / "dense")
    )
    assert float((tuned - dense).detach().norm() / dense.detach().norm()) > 0.01
    assert made.manifest["counts"]["parameters_trained"] == sum(value.numel() for value in new.values())


@pytest.mark.parametrize(("select", "moves"), [("experts", "lora_"), ("routers", "router")])
def test_groups_learn_alone_and_the_plan_counts_them(home, tmp_path, select, moves):
    made = tune(home, home / "mixlora", tmp_path / "out", train=select)
    old, new = tensors(home / "mixlora"), tensors(made.path)
    assert {n for n in old if not torch.equal(old[n], new[n])} == {n for n in old if moves in n}
    plan = inprocess.plan("tune", home / "mixlora", data=(str(home / "one.jsonl"),), train=select, sequence_length=32)
    assert plan.facts["parameters_trained"] == made.manifest["counts"]["parameters_trained"]
    assert plan.facts["write_bytes"] == sum(v.numel() * 4 for v in new.values())
    assert set(plan.tensors) == {n.removeprefix("base_model.model.") for n in new}


@pytest.mark.parametrize("pattern", ["model.embed_tokens.weight", "*.experts.base.*", "lm_head.*"])
def test_the_base_cannot_be_chosen(home, tmp_path, pattern):
    with pytest.raises(UsageProblem, match=r"all of them frozen in this model \(.*what can learn is called .*lora_A"):
        tune(home, home / "mixlora", tmp_path / "out", train=pattern)


def test_killed_and_continued_the_bits_are_the_same(home, tmp_path, monkeypatch):
    options = {"steps": 6, "evaluate_every": 2, "save_every": 1, "preserve": 0.01, "lora_plus": 4.0, "routing_every": 2}
    whole = tune(home, home / "mixlora", tmp_path / "whole", **options)
    update = Loop._update

    def stopped(self):
        if self.step == 3:
            raise Interrupted("stopped")
        return update(self)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_update", stopped)
        with pytest.raises(Interrupted):
            tune(home, home / "mixlora", tmp_path / "part", **options)
    part = tune(home, home / "mixlora", tmp_path / "part", **options)
    for file in ("adapter_model.safetensors", "tune/metrics.jsonl"):
        assert (part.path / file).read_bytes() == (whole.path / file).read_bytes()
    steps = [json.loads(line) for line in (whole.path / "tune/metrics.jsonl").open()]
    told = [record["routing"] for record in steps if "routing" in record]
    assert len(told) == 3 and all(
        sum(layer) == pytest.approx(1, abs=1e-4) for record in told for layer in record["load"]
    )
    assert all(
        len(record["violation"]) == len(record["dead"]) == len(record["entropy"]) == len(record["load"])
        for record in told
    )
    assert [record["preserve"] for record in steps if record["event"] == "step"][-1] > 0


def test_a_tuned_adapter_is_tuned_again(home, tmp_path):
    first = tune(home, home / "mola", tmp_path / "a")
    again = tune(home, first.path, tmp_path / "b")
    assert again.manifest["verdicts"]["held_out_loss_before"] == pytest.approx(
        first.manifest["verdicts"]["held_out_loss_after"], rel=1e-6
    )


def test_bf16_learns_what_is_stored_in_float32(home, tmp_path):
    made = tune(home, home / "mixlora", tmp_path / "out", precision="bf16", train="routers", learning_rate=1e-6)
    old, new = tensors(home / "mixlora"), tensors(made.path)
    assert all(torch.equal(old[n], new[n]) for n in old if "lora_" in n), "what did not learn is not rounded"
    routers = [n for n in old if "router" in n]
    assert all(0 < float((old[n] - new[n]).abs().max()) < 1e-5 for n in routers), "steps below what bf16 resolves"


@pytest.mark.parametrize("name", ["mixlora", "lora-mixer"])
def test_an_adapter_over_a_base_in_4_bits_learns_and_leaves_its_bytes_alone(home, tmp_path, name):
    packed = inprocess.run("compress", home / "dense", tmp_path / "nf4", "nf4").path
    before = digest(packed)
    src = inprocess.run("attach", packed, tmp_path / "adapter", name, rank=4, experts="3", verify=False).path
    made = tune(home, src, tmp_path / "out", steps=25, gradient_checkpointing=True)
    verdicts = made.manifest["verdicts"]
    assert verdicts["held_out_loss_after"] < verdicts["held_out_loss_before"] - 0.3
    assert digest(packed) == before
    old, new = tensors(src), tensors(made.path)
    assert sum(torch.equal(old[n], new[n]) for n in old) == 0


@pytest.mark.parametrize("label", [0, 1])
def test_labels_choose_in_training_and_routers_in_measuring(home, tmp_path, label):
    """The hard phase: text moves its own expert alone; what is measured is the config's routing, here both experts."""
    text = tmp_path / "text.jsonl"
    lines = [json.loads(line) for line in (home / "one.jsonl").open()]
    text.write_text("".join(json.dumps(line | {"expert": label}) + "\n" for line in lines))
    src = inprocess.run(
        "attach", home / "dense", tmp_path / "two", "lora-mixer", rank=4, experts="2", top_k=2, verify=False
    ).path
    made = tune(home, src, tmp_path / "out", data=(str(text),), routing="label", label_field="expert")
    old, new = tensors(src), tensors(made.path)
    moved = {n for n in old if not torch.equal(old[n], new[n]) and "lora_B" in n}
    assert moved == {n for n in old if "lora_B" in n and f".experts.{label}." in n}
    assert not any("router" in n for n in old if not torch.equal(old[n], new[n]))
    held = [json.loads(line) for line in (made.path / "tune/metrics.jsonl").open() if "held_out" in line]
    assert all(layer == [0.5, 0.5] for layer in held[0]["load"])


def test_a_label_field_of_words_is_numbered_and_recorded(home, tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text((home / "one.jsonl").read_text() + (home / "two.jsonl").read_text())
    two = inprocess.run(
        "attach", home / "dense", tmp_path / "two", "lora-mixer", rank=4, experts="2", top_k=2, verify=False
    ).path
    made = tune(home, two, tmp_path / "out", data=(str(mixed),), routing="label", label_field="kind")
    assert made.manifest["counts"]["labels"] == ["code", "wine"]


def test_all_experts_take_part_in_the_soft_phase(home, tmp_path):
    made = tune(home, home / "mixlora", tmp_path / "out", routing="all", routing_every=1, steps=2)
    records = [json.loads(line) for line in (made.path / "tune/metrics.jsonl").open()]
    told = [record["routing"] for record in records if "routing" in record]
    assert all(layer == pytest.approx([0.25] * 4, abs=1e-6) for record in told for layer in record["load"])
    assert (made.path / "adapter_config.json").read_text() == (home / "mixlora/adapter_config.json").read_text()


@pytest.mark.parametrize(("options", "message"), [
    ({"routing": "label", "data": 3}, r"3 labels .* and 2 experts at q of layer 1"),
    ({"label_field": "text"}, r"label"),
    ({"label_field": "mood"}, r"--label-field mood: found None there"),
    ({"label_field": "kind", "data": "builtin:prose"}, r"--label-field kind: builtin:prose is plain text"),
    ({"preserve": 1.0, "train": "routers"}, r"--preserve 1: no expert learns with --train routers"),
])  # fmt: skip
def test_refusals(home, tmp_path, options, message):
    files = [str(home / "one.jsonl"), str(home / "two.jsonl")]
    data = {3: (*files, str(home / "dense/../one.jsonl")), "builtin:prose": ("builtin:prose",)}.get(
        options.get("data"), tuple(files)
    )
    with pytest.raises(MoeforgeError, match=message) as caught:
        tune(
            home,
            home / "mola",
            tmp_path / "out",
            **options | {"data": data} | ({"routing": "label"} if "label_field" in options else {}),
        )
    assert "\n" not in str(caught.value)


def test_routing_by_label_is_for_mixtures_of_ours(home, tmp_path):
    with pytest.raises(UsageProblem, match=r"--routing all: .*dense has no routers of moeforge's own"):
        tune(home, home / "dense", tmp_path / "out", routing="all")
