"""eval: the numbers are those of transformers in float32, however the model is held in memory."""

import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moeforge.checkpoint import open_checkpoint
from moeforge.errors import BadInput, GateRefused, MachineLacks, UsageProblem
from moeforge.model.load import load
from moeforge.model.proof import prove
from moeforge.options import build
from moeforge.pipeline.artifact import Artifact
from moeforge.pipeline.context import Context
from moeforge.pipeline.progress import Progress
from moeforge.testing import inprocess
from moeforge.testing.command import run
from moeforge.testing.conformance import check_light
from moeforge.testing.models import tiny_dense
from moeforge.train.data import find_documents, find_pools, hold_out, hold_out_pools
from moeforge.train.evaluation import Score
from moeforge.train.metrics import perplexity, perplexity_text
from moeforge_run.eval import Eval

LENGTH = 24


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents of unlike length: some shorter than a window, some of several."""
    file = tmp_path_factory.mktemp("text") / "d.jsonl"
    bodies = [f"{i}: " + "what the model has to guess, " * (i % 4) + "end" * i for i in range(12)]
    file.write_text("".join(json.dumps({"text": body}) + "\n" for body in bodies))
    return file, bodies


@pytest.fixture(scope="module")
def other(saved, tokenizer, tmp_path_factory):
    """Another model with the same tokenizer and another depth."""
    where = tmp_path_factory.mktemp("other")
    model, _ = tiny_dense("llama", seed=5, num_hidden_layers=2)
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return model, where


@pytest.fixture
def answer(tmp_path):
    def go(where, **options):
        ctx = Context("eval", Progress("eval", quiet=True), tmp_path)
        options = build(Eval.Options, {"sequence_length": LENGTH, **options})
        return Eval().answer([Artifact("checkpoint", str(where), where)], options, ctx)

    return go


def windows(tokenizer, bodies):
    """(tokens, next tokens) by hand: each document from its beginning, in pieces of at most LENGTH predictions."""
    for body in bodies:
        ids = [*tokenizer(body)["input_ids"], tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, LENGTH):
            piece = torch.tensor(ids[start : start + LENGTH + 1])
            yield piece[None, :-1], piece[1:]


@torch.no_grad()
def direct(tokenizer, bodies, model, against=None):
    """The same numbers from transformers alone, one window at a time."""
    found = {"tokens": 0, "loss": 0.0, "accuracy": 0.0, "kl": 0.0, "agreement": 0.0, "against_loss": 0.0}
    for ids, labels in windows(tokenizer, bodies):
        logp = model(input_ids=ids).logits[0].log_softmax(-1)
        found["tokens"] += len(labels)
        found["loss"] -= float(logp[range(len(labels)), labels].sum())
        found["accuracy"] += float((logp.argmax(-1) == labels).sum())
        if against is not None:
            wanted = against(input_ids=ids).logits[0].log_softmax(-1)
            found["against_loss"] -= float(wanted[range(len(labels)), labels].sum())
            found["kl"] += float((wanted.exp() * (wanted - logp)).sum())
            found["agreement"] += float((wanted.argmax(-1) == logp.argmax(-1)).sum())
    return {key: value if key == "tokens" else value / found["tokens"] for key, value in found.items()}


def same(found, wanted, *keys):
    assert found["tokens"] == wanted["tokens"]
    for key in keys:
        assert found[key] == pytest.approx(wanted[key], abs=1e-5, rel=1e-5), key
    assert found["perplexity"] == pytest.approx(math.exp(wanted["loss"]), rel=1e-4)


@pytest.mark.parametrize("memory", ["whole", "layers"])
@pytest.mark.parametrize("rows", [1, 5])
def test_loss_accuracy_and_divergence_are_those_of_transformers(answer, saved, other, tokenizer, text, memory, rows):
    wanted = direct(tokenizer, text[1], saved[0], other[0])
    assert wanted["kl"] > 0.01 and 0 < wanted["agreement"] < 1
    found = answer(saved[1], data=(str(text[0]),), against=str(other[1]), memory=memory, batch_size=rows).data
    same(found, wanted, "loss", "accuracy", "kl", "agreement", "against_loss")
    assert found["memory"] == memory and found["dtype"] == "float32"
    assert found["documents"] == 12 and found["windows"] > 12
    assert found["tokens_per_second"] > 0


def test_the_checkpoint_is_read_again_when_the_hidden_states_would_be_too_many(answer, saved, text, monkeypatch):
    from moeforge.train import runners

    whole = answer(saved[1], data=(str(text[0]),), memory="layers").data
    monkeypatch.setattr(runners, "STATES", 64 * 4 * 60)
    assert answer(saved[1], data=(str(text[0]),), memory="layers").data["loss"] == pytest.approx(
        whole["loss"], rel=1e-7
    )


def test_a_model_that_does_not_fit_is_run_layer_by_layer(answer, saved, text, monkeypatch):
    from moeforge.train import runners

    assert answer(saved[1], data=(str(text[0]),)).data["memory"] == "whole"
    monkeypatch.setattr(runners, "available_memory", lambda: 1_000_000)
    assert answer(saved[1], data=(str(text[0]),)).data["memory"] == "layers"


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_compressed_artifacts_are_measured_as_they_run(answer, saved, text, tmp_path, tokenizer, method):
    made = inprocess.run("compress", saved[1], tmp_path / "small", method, eval=False).path
    from moeforge import load

    wanted = direct(tokenizer, text[1], load(made, dtype="float32"), saved[0])
    assert wanted["kl"] > 1e-6
    same(answer(made, data=(str(text[0]),), against=str(saved[1])).data, wanted, "loss", "accuracy", "agreement")
    # decoded on read: int8 is then multiplied in float32, where bitsandbytes rounds activations too
    layered = answer(made, data=(str(text[0]),), against=str(saved[1]), memory="layers").data
    assert layered["loss"] == pytest.approx(wanted["loss"], rel=1e-2)
    assert layered["tokens"] == wanted["tokens"]


def test_a_bound_and_a_seed_choose_the_same_tokens_again(answer, saved, text):
    first, again, other = (answer(saved[1], data=(str(text[0]),), tokens=100, seed=seed).data for seed in (1, 1, 2))
    assert first["tokens"] == other["tokens"] == 100
    assert first["loss"] == again["loss"] != other["loss"]


def test_held_out_is_what_tune_keeps_out(answer, saved, tokenizer, text):
    kept = hold_out(find_documents([str(text[0])]), 0.3, 4)[1]
    assert 0 < len(kept) < 12
    wanted = direct(tokenizer, [document.read() for document in kept], saved[0])
    same(answer(saved[1], data=(str(text[0]),), held_out=0.3, seed=4).data, wanted, "loss")


def test_an_exact_tie_of_the_other_model_is_no_disagreement():
    score = Score()
    score.add(torch.tensor([[[1.0, 2.0, 0.0]]]), torch.tensor([[0]]), torch.tensor([[[2.0, 2.0, 1.0]]]))
    assert score.comparison.agreed == 1 and score.own.right == 0
    score.add(torch.tensor([[[1.0, 2.0, 5.0]]]), torch.tensor([[2]]), torch.tensor([[[2.0, 2.0, 1.0]]]))
    assert score.comparison.agreed == 1 and score.own.right == 1 and score.own.tokens == 2


def test_eval_and_the_proof_agree_on_the_same_logits(answer, saved, tokenizer, tmp_path):
    """One document in one window: the proof's random ids aside, both look at the same tokens."""
    near, _ = tiny_dense("llama")
    with torch.no_grad():
        for weight in near.parameters():
            weight += 0.05 * weight.std() * torch.randn_like(weight)
    near.save_pretrained(tmp_path / "near")
    tokenizer.save_pretrained(tmp_path / "near")
    body = "what two ways of measuring say of one text"
    ids = [*tokenizer(body)["input_ids"], tokenizer.eos_token_id]
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": body}))
    found = answer(tmp_path / "near", data=(str(tmp_path / "d.jsonl"),), against=str(saved[1]), sequence_length=99).data
    with open_checkpoint(str(saved[1])) as first:
        shown = prove(first, tmp_path / "near", text=[ids])
    assert found["tokens"] == len(ids) - 1 and found["kl"] > 1e-4
    assert (found["against_loss"], found["loss"]) == pytest.approx(shown.cross_entropy, rel=1e-6)
    # eval has no logits of the last token, which nothing follows
    with torch.no_grad():
        p, q = (
            model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1) for model in (saved[0], near)
        )
    last = float((p.exp() * (p - q)).sum())
    assert (found["kl"] * found["tokens"] + last) / len(ids) == pytest.approx(shown.text_kl, rel=1e-4)


def test_held_out_of_a_mixture_is_what_tune_keeps_out_of_each_source(answer, saved, tokenizer, text, tmp_path):
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"text": f"another source, line {i}" + "." * i}) + "\n" for i in range(7)))
    data = (f"{text[0]}=3", f"{more}=1")
    kept = hold_out_pools(find_pools(data), 0.3, 4)[1]
    assert [str(more) in document.key for document in kept].count(True) == 2
    found = answer(saved[1], data=data, held_out=0.3, seed=4).data
    same(found, direct(tokenizer, [document.read() for document in kept], saved[0]), "loss")
    assert found["data"] == list(data)
    whole = answer(saved[1], data=data).data
    assert whole["documents"] == 19
    same(whole, answer(saved[1], data=(str(text[0]), str(more))).data, "loss", "accuracy")


@pytest.mark.parametrize("memory", ["whole", "layers"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_model_of_nan_is_refused_by_name(answer, saved, other, tokenizer, text, tmp_path, memory, poison):
    model, _ = tiny_dense("llama", seed=int(torch.randint(1000, ()).item()))
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[3, 5] = poison
    model.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")
    options = {"data": (str(text[0]),), "memory": memory}
    for first, against in (
        (tmp_path / "poisoned", None),
        (tmp_path / "poisoned", saved[1]),
        (saved[1], tmp_path / "poisoned"),
    ):
        with pytest.raises(GateRefused, match=r"/poisoned \(computed in float32\): infinities or NaN") as refusal:
            answer(first, against=None if against is None else str(against), **options)
        assert str(saved[1]) not in str(refusal.value)


def test_perplexity_ends_where_a_float_does():
    assert perplexity(1.5) == pytest.approx(math.exp(1.5))
    assert perplexity(709.0) == pytest.approx(math.exp(709.0))
    assert perplexity(800.0) is perplexity(math.inf) is perplexity(math.nan) is None
    assert perplexity_text(perplexity(2.0)) == "7.389" and perplexity_text(perplexity(800.0)) == "above 1e308"


def test_a_model_that_is_sure_of_the_wrong_token_is_told_in_json_all_the_same(answer, saved, tokenizer, text, tmp_path):
    model, _ = tiny_dense("llama")
    with torch.no_grad():
        model.lm_head.weight *= 1e5
    model.save_pretrained(tmp_path / "sure")
    tokenizer.save_pretrained(tmp_path / "sure")
    told = answer(tmp_path / "sure", data=(str(text[0]),))
    found = json.loads(json.dumps(told.data, allow_nan=False))
    assert found["perplexity"] is None and 710 < found["loss"] < 1e9
    assert "above 1e308" in told.text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "needs text"),
        ({"lm_eval": ("x",), "against": "y"}, "--against"),
        ({"data": ("x",), "limit": 3}, "--limit"),
        ({"lm_eval": ("x",), "memory": "layers"}, "--memory layers"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, told):
    with pytest.raises(UsageProblem, match=told):
        build(Eval.Options, options)


def test_models_that_cut_text_into_other_tokens_are_not_compared(answer, saved, tokenizer, text, tmp_path):
    from transformers import PreTrainedTokenizerFast

    shifted = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = shifted["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "t.json").write_text(json.dumps(shifted))
    saved[0].save_pretrained(tmp_path / "other")
    strange = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t.json"), bos_token="<s>", eos_token="</s>")
    strange.save_pretrained(tmp_path / "other")
    with pytest.raises(BadInput, match="not the same ones"):
        answer(saved[1], data=(str(text[0]),), against=str(tmp_path / "other"))
    saved[0].save_pretrained(tmp_path / "mute")
    with pytest.raises(BadInput, match="no tokenizer"):
        answer(tmp_path / "mute", data=(str(text[0]),))
    # one tokenizer is enough for two
    assert answer(tmp_path / "mute", data=(str(text[0]),), against=str(saved[1])).data["kl"] == pytest.approx(
        0, abs=1e-12
    )


def test_lm_eval_is_asked_for_by_name_when_it_is_missing(answer, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    with pytest.raises(MachineLacks, match=r"pip install 'moeforge\[lm-eval\]'"):
        answer(saved[1], lm_eval=("hellaswag",))


def test_lm_eval_gets_the_loaded_model(answer, saved, tokenizer, monkeypatch):
    """A stand-in with the harness' interface: the model and the tokenizer reach it, its numbers come back."""
    asked = {}

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size, max_length):
            self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size

    def simple_evaluate(model, tasks, limit, **rest):
        asked.update(tasks=tasks, limit=limit)
        ids = torch.tensor([model.tokenizer("abc")["input_ids"]])
        logits = model.model(input_ids=ids).logits
        return {"results": {"first": {"acc,none": float(logits.argmax()), "alias": "first"}, "second": {"ppl,none": 3}}}

    package, models, hf, tasks = (
        ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
    )
    package.simple_evaluate, hf.HFLM = simple_evaluate, HFLM
    tasks.TaskManager = lambda: SimpleNamespace(all_tasks=["first", "second"])
    package.__spec__ = SimpleNamespace(name="lm_eval")
    for module in (package, models, hf, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    found = answer(saved[1], lm_eval=("first,second",), limit=7)
    wanted = saved[0](input_ids=torch.tensor([tokenizer("abc")["input_ids"]])).logits.argmax()
    assert found.data["lm_eval"] == {"first": {"acc,none": float(wanted)}, "second": {"ppl,none": 3.0}}
    assert asked == {"tasks": ["first", "second"], "limit": 7}
    assert "second  ppl,none" in found.text
    with pytest.raises(UsageProblem, match="did you mean 'first'"):
        answer(saved[1], lm_eval=("firstt",))


def test_the_command_prints_a_table_or_one_line_of_json(saved, text, tmp_path):
    check_light(["eval", "--help"], {})
    words = ["eval", saved[1], "--data", text[0], "--tokens", 60]
    done = run(*words, check=True)
    assert "perplexity" in done.out and "60 tokens of" in done.out and "tokens/s" in done.out
    found = json.loads(run(*words, "--json", check=True).out)
    assert found["tokens"] == 60 and f"{found['perplexity']:.4g}" in done.out


@pytest.mark.parametrize(
    ("options", "error"),
    [({"device": "nowhere"}, UsageProblem), ({"dtype": "foo"}, UsageProblem), ({"device": "cuda:99"}, MachineLacks)],
)
def test_a_device_or_type_that_is_not_there_is_refused(answer, saved, text, options, error):
    with pytest.raises(error, match="|".join(options.values())):
        answer(saved[1], data=(str(text[0]),), **options)


@pytest.fixture(scope="module")
def mixture(saved, tmp_path_factory):
    return inprocess.run(
        "upcycle", saved[1], tmp_path_factory.mktemp("mix") / "moe", "noise", experts=4, top_k=2, verify=False
    ).path


def test_routers_are_watched_by_source_without_changing_a_number(answer, mixture, tokenizer, text, tmp_path):
    other = [f"{i} + {i} = {2 * i};" for i in range(7)]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps({"text": body}) + "\n" for body in other))
    data = (str(text[0]), str(tmp_path / "code.jsonl"))
    plain, found = (answer(mixture, data=data, batch_size=3, routing=on).data for on in (False, True))
    watched = found.pop("routing")
    # a number of speed is none of the text
    assert {**found, "tokens_per_second": 0} == {**plain, "tokens_per_second": 0} and "routing" not in plain
    model = load(str(mixture), dtype="float32")
    counts = torch.zeros(3, 2, 4)
    for label, bodies in enumerate((text[1], other)):
        for ids, _ in windows(tokenizer, bodies):
            with torch.no_grad():
                logits = model(input_ids=ids, output_router_logits=True).router_logits
            for layer, said in enumerate(logits):
                counts[layer, label] += torch.bincount(said.topk(2).indices.flatten(), minlength=4)
    assert watched["sites"] == [f"model.layers.{layer}.mlp" for layer in range(3)]
    for layer in range(3):
        assert watched["load"][layer] == pytest.approx((counts[layer].sum(0) / counts[layer].sum()).tolist(), abs=1e-6)
        shares = (counts[layer] / counts[layer].sum(-1, keepdim=True)).tolist()
        assert [pytest.approx(row, abs=1e-6) for row in shares] == watched["by_label"][layer]


def test_routers_that_cannot_be_watched_are_told(answer, saved, mixture, text, monkeypatch):
    with pytest.raises(BadInput, match="has no mixtures"):
        answer(saved[1], data=(str(text[0]),), routing=True)
    monkeypatch.setattr("moeforge.train.runners.available_memory", lambda: 0)
    with pytest.raises(MachineLacks, match="one layer at a time"):
        answer(mixture, data=(str(text[0]),), routing=True)
    with pytest.raises(UsageProblem, match="--routing"):
        build(Eval.Options, {"routing": True, "lm_eval": ("x",)})
    with pytest.raises(UsageProblem, match="--memory layers"):
        build(Eval.Options, {"routing": True, "data": ("x",), "memory": "layers"})
