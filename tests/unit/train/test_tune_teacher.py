"""`tune --teacher`: which checkpoints teach, what is refused, what is recorded, and that no run learns from two teachers."""

import json

import pytest
import torch
from safetensors.torch import load_file

import moeforge
from moeforge.errors import BadInput, Interrupted, MoeforgeError, UsageProblem
from moeforge.pipeline.artifact import Artifact
from moeforge.testing import inprocess
from moeforge.testing.command import run
from moeforge.testing.models import tiny_dense, tiny_tokenizer
from moeforge.train.data import find_documents
from moeforge.train.encoding import Encoder
from moeforge.train.loop import Loop
from moeforge_tune import teacher as work

from .conftest import make_model
from .test_engine import pytestmark as engine

SHORT = {"sequence_length": 32, "batch_size": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny Llama, another one, a mixture made of the first with noise, and some text."""
    home = tmp_path_factory.mktemp("teacher")
    for name, seed in {"dense": 0, "other": 5}.items():
        # weights large enough that two models say different things
        make_model("llama", seed, vocab_size=199, max_position_embeddings=256).save_pretrained(home / name)
        tiny_tokenizer().save_pretrained(home / name)
    text = "".join(json.dumps({"text": f"{i} bottles, " * (i % 5 + 1)}) + "\n" for i in range(60))
    (home / "text.jsonl").write_text(text)
    inprocess.run("upcycle", home / "dense", home / "moe", "noise", experts=4, share=1.0, sigma=0.7, verify=False,
                  allow_inexact=True)  # fmt: skip
    return home


def options(home, teacher, **more):
    return {"data": (str(home / "text.jsonl"),), "steps": 4, **SHORT, "teacher": str(teacher), **more}


def tune(home, out, teacher, src="moe", **more):
    return inprocess.run("tune", home / src, out, **options(home, teacher, **more))


def distance(home, student, teacher):
    """Mean KL(teacher || student) in nats over tokens of the text."""
    models = [moeforge.load(str(path), dtype="float32") for path in (student, teacher)]
    encode = Encoder(tiny_tokenizer())
    total, count = 0.0, 0
    for document in find_documents([str(home / "text.jsonl")])[:20]:
        ids = torch.tensor([encode(document)])
        with torch.no_grad():
            mine, theirs = (model(input_ids=ids).logits.double().log_softmax(-1) for model in models)
        total += float((theirs.exp() * (theirs - mine)).sum())
        count += ids.numel()
    return total / count


def steps(made):
    return [
        record for line in (made.path / "tune/metrics.jsonl").open() if (record := json.loads(line))["event"] == "step"
    ]


def test_a_mixture_of_noisy_copies_comes_back_to_its_parent(home, tmp_path):
    """Its distance from the parent falls, and the text alone leads elsewhere."""
    before = distance(home, home / "moe", home / "dense")
    taught = tune(home, tmp_path / "taught", home / "dense", steps=60, kd=1.0)
    text = inprocess.run("tune", home / "moe", tmp_path / "text", **{**options(home, "", steps=60), "teacher": None})
    after, elsewhere = (distance(home, made.path, home / "dense") for made in (taught, text))
    assert after < 0.5 * before < before < elsewhere
    told = steps(taught)
    assert told[-1]["kd"] < 0.5 * told[0]["kd"]
    assert "kd" not in steps(text)[0]


def test_what_taught_is_recorded(home, tmp_path):
    made = tune(home, tmp_path / "out", home / "dense")
    source, teacher = made.manifest["parents"]
    assert source["ref"] == str(home / "moe") and source["manifest"]["verb"] == "upcycle" and "role" not in source
    assert (
        teacher["ref"] == str(home / "dense")
        and teacher["role"] == "teacher"
        and teacher["digest"].startswith("sha256:")
    )
    assert (made.manifest["options"]["kd"], made.manifest["options"]["kd_temperature"]) == (None, 1)
    shown = run("show", made.path, check=True).out
    assert f"taught by {home / 'dense'}" in shown and f"from {home / 'dense'}" in shown


def test_the_weight_is_nine_tenths_unless_it_is_given(home, tmp_path):
    made, same, other = (tune(home, tmp_path / str(kd), home / "dense", steps=2, kd=kd) for kd in (None, 0.9, 0.8))
    files = [(one.path / "tune/metrics.jsonl").read_bytes() for one in (made, same, other)]
    assert files[0] == files[1] != files[2]


def test_the_temperature_reaches_the_training(home, tmp_path):
    cool, warm = (
        steps(tune(home, tmp_path / f"{t:g}", home / "other", steps=1, kd_temperature=t))[0] for t in (1.0, 4.0)
    )
    assert cool["loss"] == warm["loss"] and cool["kd"] != pytest.approx(warm["kd"], rel=0.05)


def test_a_stopped_run_continues_bit_for_bit_and_from_no_other_teacher(home, tmp_path, monkeypatch):
    asked = {"steps": 6, "save_every": 2, "kd_temperature": 2.0}
    whole = tune(home, tmp_path / "whole", home / "dense", **asked)
    update = Loop._update

    def stopped(self):
        if self.step == 3:
            raise Interrupted("stopped")
        return update(self)

    def stop(name):
        with monkeypatch.context() as patch:
            patch.setattr(Loop, "_update", stopped)
            with pytest.raises(Interrupted):
                tune(home, tmp_path / name, home / "dense", **asked)
        assert list((tmp_path / f"{name}.partial").glob("state-*"))

    stop("part")
    part = tune(home, tmp_path / "part", home / "dense", **asked)
    assert part.manifest["timings"]["resumed"]
    for file in ("model.safetensors", "tune/metrics.jsonl"):
        assert (part.path / file).read_bytes() == (whole.path / file).read_bytes()
    stop("another")
    another = tune(home, tmp_path / "another", home / "other", **asked)
    assert not another.manifest["timings"]["resumed"]
    assert len(steps(another)) == 6 and steps(another)[0]["kd"] != steps(whole)[0]["kd"]


def test_a_teacher_that_changed_in_its_place_makes_another_run(home, tmp_path):
    teacher = tmp_path / "teacher"
    tiny_dense("llama")[0].save_pretrained(teacher)
    first = tune(home, tmp_path / "out", teacher, steps=1)
    asked = inprocess.request("tune", None, options(home, teacher, steps=1))
    key = asked.stage.inputs(asked.options, None)
    assert tune(home, tmp_path / "out", teacher, steps=1).manifest == first.manifest
    tiny_dense("llama", 3)[0].save_pretrained(teacher)
    assert asked.stage.inputs(asked.options, None)[:-1] == key[:-1] != asked.stage.inputs(asked.options, None)
    with pytest.raises(UsageProblem, match="other options or inputs"):
        tune(home, tmp_path / "out", teacher, steps=1)


def test_a_branch_on_the_hub_means_one_commit_from_key_to_run(monkeypatch):
    commits = iter(["1" * 40, "2" * 40])

    def pin(found, options):
        commit = next(commits)
        return Artifact("checkpoint", f"{found.ref}@{commit}"), f"sha256:{commit}"

    monkeypatch.setattr(work, "pin", pin)
    work._pinned_on_hub.cache_clear()
    try:
        assert [work.pinned("org/parent")[0].ref for _ in range(2)] == 2 * [f"org/parent@{'1' * 40}"]
    finally:
        work._pinned_on_hub.cache_clear()


def test_every_kind_of_checkpoint_teaches(home, tmp_path):
    """A GGUF file, packed weights, an adapter, a mixture; what they teach is what they say."""
    inprocess.run("export", home / "dense", tmp_path / "gguf", to="gguf")
    inprocess.run("compress", home / "dense", tmp_path / "nf4", "nf4")
    inprocess.run("attach", home / "dense", tmp_path / "adapter", "mixlora", rank=4, experts="4", verify=False)
    found = {}
    for name, ref in {"dense": home / "dense", "gguf": next((tmp_path / "gguf").glob("*.gguf")), "nf4": tmp_path / "nf4",
                      "adapter": tmp_path / "adapter", "moe": home / "moe"}.items():  # fmt: skip
        found[name] = steps(tune(home, tmp_path / f"from-{name}", ref, src="other", steps=1))[0]["kd"]
    assert found["gguf"] == pytest.approx(found["dense"], rel=1e-3)
    assert found["adapter"] == pytest.approx(found["dense"], rel=1e-4)  # its experts start with nothing to add
    assert found["nf4"] == pytest.approx(found["dense"], rel=0.5) and found["nf4"] != found["dense"]
    assert found["moe"] != found["dense"] and all(kd > 0.1 for kd in found.values())


def test_an_adapter_and_a_mixture_of_ours_are_taught(home, tmp_path):
    inprocess.run("attach", home / "dense", tmp_path / "adapter", "mixlora", rank=4, experts="4", verify=False)
    inprocess.run("upcycle", home / "dense", tmp_path / "own", "copy", experts=3, target="moeforge", verify=False)
    for name in ("adapter", "own"):
        made = inprocess.run(
            "tune", tmp_path / name, tmp_path / f"tuned-{name}", **options(home, home / "other", steps=25, kd=1.0)
        )
        told = steps(made)
        assert told[-1]["kd"] < 0.8 * told[0]["kd"]
        assert told[0]["balance"] > 0


def test_bf16_is_taught_in_bf16(home, tmp_path, monkeypatch):
    whole, kinds = Loop.run, []

    def watched(self, bar):
        kinds.append(self.teacher.model.dtype)
        return whole(self, bar)

    monkeypatch.setattr(Loop, "run", watched)
    short, full = (
        steps(tune(home, tmp_path / kind, home / "other", precision=kind))[0]["kd"] for kind in ("bf16", "fp32")
    )
    assert short == pytest.approx(full, rel=0.05) and short != full
    assert kinds == [torch.bfloat16, torch.float32]


def test_rows_hold_one_document_where_the_teacher_keeps_no_borders(home, tmp_path):
    teacher = tmp_path / "mamba"
    tiny_dense("mamba")[0].save_pretrained(teacher)
    data = str(home / "text.jsonl")
    done = run("tune", home / "moe", "--data", data, "--steps", 1, "--sequence-length", 32, "--batch-size", 2, "--teacher", teacher, "-o",
               tmp_path / "out", check=True)  # fmt: skip
    assert "the teacher, a MambaForCausalLM, cannot keep packed documents apart, so each row holds one" in done.err
    padded = json.loads((tmp_path / "out/tune/metrics.jsonl").read_text().splitlines()[1])
    packed = steps(tune(home, tmp_path / "packed", home / "dense", steps=1))[0]
    assert padded["tokens"] < packed["tokens"] == 64


def test_the_plan_counts_the_teacher(home):
    def facts(teacher, **more):
        return inprocess.plan("tune", home / "moe", **options(home, "", **more) | {"teacher": teacher}).facts

    alone, taught = facts(None), facts(str(home / "dense"))
    model = moeforge.load(str(home / "dense"))
    assert taught["parameters_teacher"] == sum(param.numel() for param in model.parameters())
    assert taught["read_bytes"] - alone["read_bytes"] == 4 * taught["parameters_teacher"]
    # weights, logits, and what the distance is taken in
    tables = 64 * 199
    assert (
        taught["peak_memory_bytes"] - alone["peak_memory_bytes"]
        == 4 * taught["parameters_teacher"] + 4 * tables + 24 * tables
    )


@engine
def test_every_rank_holds_the_teacher_whole(home):
    def peak(teacher, fsdp):
        found = inprocess.plan("tune", home / "moe", **options(home, "", fsdp=fsdp) | {"teacher": teacher})
        return found.facts["peak_memory_bytes"]

    one, two = (peak(str(home / "dense"), fsdp) - peak(None, fsdp) for fsdp in (1, 2))
    assert one == two > 0


@pytest.mark.parametrize(("asked", "message"), [
    ({"teacher": None, "kd": 0.5}, r"--kd 0.5 has no effect without a teacher; give --teacher REF, or leave it out"),
    ({"teacher": None, "kd_temperature": 2.0}, r"--kd-temperature 2 has no effect without a teacher"),
    ({"kd": 0.0}, r"--kd 0 gives --teacher \S+dense no weight; give more, up to 1, or leave --teacher out"),
    ({"kd": 1.5}, r"--kd 1.5: .*1"),
    ({"kd": float("nan")}, r"--kd"),
    ({"kd_temperature": 0.0}, r"--kd-temperature 0"),
    ({"teacher": "/nowhere"}, r"/nowhere: no such file"),
    ({"sequence_length": 200, "teacher": "narrow"}, r"--sequence-length 200: max_position_embeddings of --teacher \S+narrow is 128; use at most that"),
    ({"teacher": "small"}, r"--teacher \S+small: has vocab_size = 97, \S+moe has 199; only a model with the same tokens can be learnt from"),
    ({"teacher": "renamed"}, r"--teacher \S+renamed: token 40 is 'other', in \S+moe it is "),
    ({"teacher": "classifier"}, r"--teacher \S+classifier: architectures = \['LlamaForSequenceClassification'\]: not a causal"),
])  # fmt: skip
def test_refusals(home, tmp_path, asked, message):
    if asked.get("teacher") in {"narrow", "small", "renamed", "classifier"}:
        teacher = tmp_path / asked["teacher"]
        more = {"narrow": {"max_position_embeddings": 128}, "small": {"vocab_size": 97}}.get(teacher.name, {})
        tiny_dense("llama", **more)[0].save_pretrained(teacher)
        if teacher.name == "renamed":
            tiny_tokenizer().save_pretrained(teacher)
            body = json.loads((teacher / "tokenizer.json").read_text())
            letter = next(name for name, index in body["model"]["vocab"].items() if index == 40)
            body["model"]["vocab"]["other"] = body["model"]["vocab"].pop(letter)
            (teacher / "tokenizer.json").write_text(json.dumps(body))
        if teacher.name == "classifier":
            config = json.loads((teacher / "config.json").read_text())
            (teacher / "config.json").write_text(
                json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]})
            )
        asked = asked | {"teacher": str(teacher)}
    with pytest.raises(MoeforgeError, match=message) as caught:
        inprocess.plan("tune", home / "moe", **options(home, home / "dense") | asked)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_no_config_tells_is_refused_before_training(home, tmp_path, monkeypatch):
    teacher = tmp_path / "quiet"
    tiny_dense("llama", vocab_size=97)[0].save_pretrained(teacher)
    monkeypatch.setattr("moeforge_tune.teacher.plain_config", lambda config: {})
    monkeypatch.setattr(Loop, "run", lambda *_: pytest.fail("trained"))
    with pytest.raises(BadInput, match=r"--teacher \S+quiet: gives 97 logits, \S+moe 199; only a model"):
        tune(home, tmp_path / "out", teacher)


def test_the_output_is_not_put_over_the_teacher(home):
    with pytest.raises(UsageProblem, match=r"-o \S+dense/deeper .*\S+dense"):
        tune(home, home / "dense" / "deeper", home / "dense")
    assert load_file(home / "dense" / "model.safetensors")
