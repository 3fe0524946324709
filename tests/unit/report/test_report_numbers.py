"""The numbers are those of the files, of the run and of the model, computed here in another way."""

import dataclasses
import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import moeforge
from moeforge.checkpoint import open_checkpoint
from moeforge.errors import BadInput, UsageProblem
from moeforge.pipeline.context import Context
from moeforge.pipeline.progress import Progress
from moeforge.testing.command import run
from moeforge.testing.conformance import check_light
from moeforge.testing.models import tiny, tiny_tokenizer
from moeforge_inspect import drift
from moeforge_inspect.drift import between_experts, from_parent
from moeforge_inspect.measured import find_training, lifts, read_metrics, separations

MATRICES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@pytest.fixture
def ctx(tmp_path):
    return Context("report", Progress("report", "none", True, io.StringIO()), tmp_path)


@pytest.fixture
def write(tmp_path):
    """Write a directory that opens as a checkpoint, and open it."""

    def made(name, tensors):
        directory = tmp_path / name
        directory.mkdir()
        held = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        save_file(held, directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return open_checkpoint(str(directory))

    return made


def relative(b, a):
    b, a = (np.concatenate([np.asarray(part, np.float64).ravel() for part in parts]) for parts in (b, a))
    return float(np.linalg.norm(b - a) / np.linalg.norm(a))


@pytest.mark.parametrize("kind", ["moe", "own"])
def test_experts_are_measured_from_the_dense_weights_that_they_replaced(home, report, kind):
    found = report(home / kind).data["drift"]
    dense, made = load_file(home / "dense" / "model.safetensors"), load_file(home / kind / "model.safetensors")
    assert found["layers"] == [0, 1, 2] and found["same"] and found["outside"] == dict.fromkeys(found["outside"], 0.0)
    for layer in found["layers"]:
        root = f"model.layers.{layer}."
        old = [dense[f"{root}mlp.{name}.weight"] for name in MATRICES]
        for expert in range(4):
            names = [
                f"block_sparse_moe.experts.{expert}.{MATRICES[name]}"
                if kind == "moe"
                else f"mlp.experts.{expert}.{name}"
                for name in MATRICES
            ]
            assert found["experts"][layer][expert] == pytest.approx(
                relative([made[f"{root}{name}.weight"] for name in names], old), rel=1e-5
            )
    assert min(map(min, found["experts"])) > 1e-4
    assert len(found["without"]) == 3 and all("gate" in name or "router" in name for name in found["without"])


def test_a_tuned_mixture_and_a_compressed_one_are_measured_from_their_parents(home, report):
    tuned = report(home / "tuned").data["drift"]
    old, new = (load_file(home / name / "model.safetensors") for name in ("moe", "tuned"))
    routers = [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(3)]
    assert tuned["roles"]["routers"] == pytest.approx(
        [relative([new[name]], [old[name]]) for name in routers], rel=1e-5
    )
    assert tuned["without"] == [] and tuned["compared"] == len(old)
    small = report(home / "small").data["drift"]
    # four bits: a tenth of the weights' length, of every expert
    assert all(0.05 < value < 0.2 for row in small["experts"] for value in row)


def test_an_adapter_is_measured_by_its_own_tensors(home, report):
    data = report(home / "adapter").data
    found = data["drift"]
    assert [len(row) for row in found["experts"]] == [0, 2, 3]  # one expert is plain LoRA
    assert all("lora" in name or "router" in name for name in found["without"])
    assert data["sizes"]["parameters_total"] > found["compared"] and data["training"]["held_out"]
    assert data["apart"]["layers"] == [1, 2]  # a layer of one expert has nothing to compare
    first = report(home / "attached").data
    assert first["drift"] is None and "counterpart" in first["missing"]["drift"]["why"]


def test_pieces_change_nothing_and_zeros_and_nan_are_no_number(write, ctx, monkeypatch):
    rng = np.random.default_rng(1)
    names = [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
    ]
    old = {name: rng.standard_normal((24, 7)).astype(np.float32) for name in names}
    new = {name: value + rng.standard_normal(value.shape).astype(np.float32) / 8 for name, value in old.items()}
    expected = [relative([new[name]], [old[name]]) for name in names[:1]]
    old[names[1]][:] = 0
    new[names[2]][3, 3] = np.nan
    parent, child = write("old", old), write("new", new)
    whole = from_parent(child, parent, ctx)
    assert whole["layers"] == [0, 1, 2] and whole["roles"]["feed-forward"] == [
        pytest.approx(expected[0], rel=1e-6),
        None,
        None,
    ]
    monkeypatch.setattr(drift, "CHUNK_BYTES", 80)
    pieces = from_parent(child, parent, ctx)
    assert pieces["roles"]["feed-forward"][0] == pytest.approx(expected[0], rel=1e-6) and pieces["roles"][
        "feed-forward"
    ][1:] == [None, None]


@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_experts_from_each_other_however_near_they_are(write, ctx, monkeypatch, spread):
    rng = np.random.default_rng(2)
    shared = {name: rng.standard_normal((12, 10)) for name in MATRICES}
    experts = [
        {name: (value + spread * rng.standard_normal(value.shape)).astype(np.float32) for name, value in shared.items()}
        for _ in range(5)
    ]
    apart = {
        f"model.layers.3.mlp.experts.{e}.{name}.weight": value
        for e, held in enumerate(experts)
        for name, value in held.items()
    }
    stacked = {f"model.layers.3.mlp.experts.{name}": np.stack([held[name] for held in experts]) for name in MATRICES}
    flat = np.stack([np.concatenate([held[name].ravel() for name in MATRICES]) for held in experts]).astype(np.float64)
    gaps = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    norms = (flat**2).sum(-1)
    expected = gaps / np.sqrt((norms[:, None] + norms) / 2)
    for block_bytes in (drift.BLOCK_BYTES, 200):
        monkeypatch.setattr(drift, "BLOCK_BYTES", block_bytes)
        for name, tensors in {"each": apart, "one": stacked}.items():
            found = between_experts(write(f"{name}-{block_bytes}", tensors), ctx)
            assert found["layers"] == [3]
            # six digits are told
            np.testing.assert_allclose(found["pairs"][0], expected, rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(found["mean"][0], expected.sum(1) / 4, rtol=1e-3, atol=1e-6)


def test_stacked_experts_are_measured_one_by_one(write, ctx):
    rng = np.random.default_rng(3)
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    old = rng.standard_normal((4, 6, 5)).astype(np.float32)
    new = old + rng.standard_normal((4, 1, 1)).astype(np.float32) / 4
    found = from_parent(write("new", {name: new}), write("old", {name: old}), ctx)
    assert found["experts"] == [pytest.approx([relative([b], [a]) for a, b in zip(old, new, strict=True)], rel=1e-5)]


def test_lift_and_separation_by_hand():
    # one layer, three labels of which the last was not met, four experts of which the last is idle
    rows = [[0.5, 0.5, 0.0, 0.0], [0.1, 0.5, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert lifts([rows])[0] == [[pytest.approx(5 / 3), 1.0, 0.0, None]]
    assert lifts([rows])[1] == [[pytest.approx(1 / 3), 1.0, 2.0, None]]
    assert lifts([rows])[2] == [[None] * 4]
    assert separations([rows]) == [[pytest.approx(0.2), pytest.approx(0.2), None]]


def test_training_is_found_in_the_artifact_or_in_the_parent_it_was_made_of(home, report, tmp_path):
    tuned, small = report(home / "tuned", drift=False).data, report(home / "small", drift=False).data
    lines = [json.loads(line) for line in (home / "tuned" / "tune" / "metrics.jsonl").read_text().splitlines()]
    steps = [[line["step"], line["loss"]] for line in lines if line["event"] == "step"]
    held = [line for line in lines if line["event"] == "held_out"]
    assert tuned["training"]["steps"] == steps and len(steps) == 4
    assert tuned["training"]["held_out"] == [[0, held[0]["loss"]], [4, held[1]["loss"]]]
    assert [load["title"] for load in tuned["training"]["loads"]] == [
        "held-out text, step 0", "training text, step 2", "training text, step 4", "held-out text, step 4"]  # fmt: skip
    assert tuned["training"]["loads"][-1]["load"] == held[1]["load"]
    assert tuned["training"]["loads"][0]["sites"] == [f"model.layers.{layer}.mlp" for layer in range(3)]
    assert [name.rpartition("/")[2] for name in tuned["specialisation"]["labels"]] == ["wine.jsonl", "code.jsonl"]
    assert tuned["specialisation"]["lift"] == lifts(held[1]["by_label"])
    assert small["training"]["from"] == str(home / "tuned") and small["training"]["steps"] == steps
    # another artifact at the parent's place is not the parent
    shutil.copytree(home / "tuned", tmp_path / "tuned")
    manifest = json.loads((home / "small" / "moeforge.json").read_text())
    manifest["parents"][0]["ref"] = str(tmp_path / "tuned")
    assert find_training(home / "small", manifest)["from"] == str(tmp_path / "tuned")
    other = json.loads((tmp_path / "tuned" / "moeforge.json").read_text())
    (tmp_path / "tuned" / "moeforge.json").write_text(json.dumps(other | {"digest": "sha256:" + "0" * 64}))
    assert find_training(home / "small", manifest) is None


@pytest.mark.parametrize("line", [
    "{", "[]", '{"event": "step"}', '{"event": "step", "step": 1, "loss": NaN}', '{"event": "step", "step": "1", "loss": 2}',
    '{"event": "held_out", "step": 1, "loss": 2, "load": [["x"]]}', '{"event": "held_out", "step": 1, "loss": 2, "load": [[1]], "sites": []}',
    '{"event": "held_out", "step": 1, "loss": 2, "load": [[1]], "by_label": [[[1, 2]]]}',
])  # fmt: skip
def test_a_damaged_line_of_metrics_is_named(line):
    good = '{"event": "step", "step": 1, "loss": 2.0}\n'
    assert read_metrics(good, "m")["steps"] == [[1, 2.0]] and "distances" not in read_metrics(good, "m")
    taught = good.replace('"loss"', '"kd": 0.5, "loss"')
    assert read_metrics(taught, "m")["distances"] == [[1, 0.5]]
    with pytest.raises(BadInput, match="line 1"):
        read_metrics(taught.replace("0.5", "NaN"), "m")
    with pytest.raises(BadInput, match="m, line 2: not a record of tune"):
        read_metrics(good + line, "m")


def test_a_text_goes_where_the_models_own_routers_send_it(home, report):
    text = "3 bottles of x = 1\n"
    found = report(home / "moe", text=text, drift=False).data["tokens"]
    assert "".join(found["tokens"]) == text and found["of"] == len(found["ids"]) == len(text)
    model = moeforge.load(str(home / "moe"), dtype="float32")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([found["ids"]]), output_router_logits=True).router_logits
    assert found["sites"] == [f"model.layers.{layer}.mlp" for layer in range(3)] and found["counts"] == [4] * 3
    for rows, load, said in zip(found["routes"], found["load"], logits, strict=True):
        weights, chosen = torch.topk(torch.softmax(said.float(), -1), 2)
        weights = weights / weights.sum(-1, keepdim=True)
        assert [row[::2] for row in rows] == chosen.tolist()
        assert np.allclose([row[1::2] for row in rows], weights, atol=1e-3)
        assert load == pytest.approx((torch.bincount(chosen.flatten(), minlength=4) / chosen.numel()).tolist())


# in the adapter's first layer there is one expert, and no choice
@pytest.mark.parametrize(
    ("kind", "experts"), [("own", {0: 4, 1: 4, 2: 4}), ("small", {0: 4, 1: 4, 2: 4}), ("adapter", {1: 2, 2: 3})]
)
def test_a_text_is_routed_through_every_kind_of_mixture(home, report, kind, experts):
    found = report(home / kind, text="4 bottles", drift=False, max_tokens=5).data["tokens"]
    assert len(found["tokens"]) == 5 and found["of"] == 9
    assert {
        int(site.split(".")[2]): count for site, count in zip(found["sites"], found["counts"], strict=True)
    } == experts
    for rows, load, count in zip(found["routes"], found["load"], found["counts"], strict=True):
        assert len(rows) == 5 and len(load) == count and sum(load) == pytest.approx(1)
        assert all(0 <= expert < count for row in rows for expert in row[::2])


@pytest.mark.parametrize(("family", "extra"), [
    ("qwen3_moe", {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}),
    ("granitemoe", {"num_local_experts": 5, "num_experts_per_tok": 2}),
])  # fmt: skip
def test_a_mixture_that_moeforge_did_not_make(report, tmp_path, family, extra):
    from transformers import AutoConfig

    sizes = {"vocab_size": 199, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    tiny(AutoConfig.for_model(family, **sizes, **extra))[0].save_pretrained(tmp_path / family)
    tiny_tokenizer().save_pretrained(tmp_path / family)
    data = report(tmp_path / family, text="abc").data
    assert (
        data["tokens"]["counts"] == [5, 5] and data["apart"]["layers"] == [0, 1] and len(data["apart"]["mean"][0]) == 5
    )
    # random experts: nearly unrelated
    assert all(1.2 < value < 1.6 for row in data["apart"]["mean"] for value in row)
    assert (
        data["lineage"] is None
        and "lineage" in data["missing"]
        and data["missing"]["drift"]["why"] == "No parent is recorded."
    )
    again = report(tmp_path / family, parent=str(tmp_path / family)).data["drift"]
    assert again["same"] is None and {value for row in again["experts"] for value in row} == {0.0}


def test_what_is_absent_is_told_with_what_would_make_it(home, report):
    missing = report(home / "moe", drift=False).data["missing"]
    assert set(missing) == {"training", "load", "specialisation", "tokens", "eval", "drift", "apart"}
    assert missing["training"]["command"] == f"moeforge tune {home / 'moe'} --data SOURCE -o tuned"
    assert missing["load"]["command"].startswith(
        f"moeforge eval {home / 'moe'} --data A --data B --routing --json > eval.json;"
    )
    assert "load" not in report(home / "moe", drift=False, text="a").data["missing"]


def test_a_parent_that_is_gone_or_changed_is_told(home, report, tmp_path):
    for name in ("dense", "moe"):
        shutil.copytree(home / name, tmp_path / name)
    manifest = json.loads((tmp_path / "moe" / "moeforge.json").read_text())
    manifest["parents"][0]["ref"] = str(tmp_path / "dense")
    (tmp_path / "moe" / "moeforge.json").write_text(json.dumps(manifest))
    for file in (tmp_path / "dense").iterdir():
        os.utime(file, (1, 1))  # cannot be known for the same any more
    moved = report(tmp_path / "moe")
    assert moved.data["drift"]["same"] is False and "changed since" in moved.page
    shutil.rmtree(tmp_path / "dense")
    gone = report(tmp_path / "moe").data
    assert (
        gone["drift"] is None
        and str(tmp_path / "dense") in gone["missing"]["drift"]["why"]
        and gone["apart"] is not None
    )


def test_numbers_of_eval_are_shown(home, report, tmp_path):
    (tmp_path / "eval.json").write_text(
        'noise\n{"loss": 2.5, "perplexity": 12.18, "tokens": 100, "lm_eval": {"piqa": {"acc": 0.61}}}\n'
    )
    answer = report(home / "moe", drift=False, eval=tmp_path / "eval.json")
    assert answer.data["eval"]["loss"] == 2.5 and "12.18" in answer.page and "piqa" in answer.page
    for text in ("", "{", '{"other": 1}'):
        (tmp_path / "eval.json").write_text(text)
        with pytest.raises(BadInput, match="--eval"):
            report(home / "moe", drift=False, eval=tmp_path / "eval.json")


def test_an_evaluation_that_watched_the_routers_fills_load_and_specialisation(home, report, tmp_path):
    data = [word for kind in ("wine", "code") for word in ("--data", home / f"{kind}.jsonl")]
    told = run("eval", home / "moe", *data, "--routing", "--sequence-length", 32, "--json", check=True).out
    (tmp_path / "eval.json").write_text(told)
    said = json.loads(told)["routing"]
    answer = report(home / "moe", drift=False, eval=tmp_path / "eval.json")
    assert answer.data["eval"]["load"]["load"] == said["load"] and "evaluated text" in answer.page
    assert [name.rpartition("/")[2] for name in answer.data["specialisation"]["labels"]] == ["wine.jsonl", "code.jsonl"]
    assert answer.data["specialisation"]["lift"] == lifts(said["by_label"])
    assert not {"load", "specialisation"} & answer.data["missing"].keys()
    (tmp_path / "eval.json").write_text(json.dumps({"loss": 1, "routing": {"load": [["x"]]}}))
    with pytest.raises(BadInput, match="its `routing`"):
        report(home / "moe", drift=False, eval=tmp_path / "eval.json")


def test_wishes_that_cannot_be_met_are_refused(home, report, tmp_path):
    with pytest.raises(UsageProblem, match="two texts"):
        report(home / "moe", text="a", text_file=tmp_path / "x")
    with pytest.raises(UsageProblem, match="--no-drift"):
        report(home / "moe", parent="x", drift=False)
    with pytest.raises(UsageProblem, match="cannot be read"):
        report(home / "moe", text_file=tmp_path / "nothing")
    with pytest.raises(BadInput, match="no token"):
        report(home / "moe", text="", drift=False)
    with pytest.raises(BadInput, match="has no mixtures"):
        report(home / "dense", text="a", drift=False)
    with pytest.raises(BadInput):
        report(home / "moe", parent=str(tmp_path / "nothing"))


def test_without_a_text_torch_is_not_imported(home, tmp_path):
    check_light(["report", str(home / "tuned"), "-o", str(tmp_path / "page.html")], {})
    assert "Drift" in (tmp_path / "page.html").read_text()


def test_only_the_beginning_of_a_large_file_is_read(home, report, tmp_path):
    (tmp_path / "long.txt").write_text("bottles " * 5000)
    found = report(home / "moe", text_file=tmp_path / "long.txt", max_tokens=7, drift=False).data["tokens"]
    assert len(found["tokens"]) == 7 and found["of"] == 64 * 7


def test_the_options_are_frozen_data():
    from moeforge_inspect.report import Options

    assert dataclasses.fields(Options) and Options.__dataclass_params__.frozen
