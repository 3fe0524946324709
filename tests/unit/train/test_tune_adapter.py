"""`tune` on adapters of LoRA experts: what learns, what is written, and that neither base nor interruption changes it."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

import moeforge
from moeforge.errors import Interrupted, UsageProblem
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
