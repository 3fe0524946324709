"""Branch-Train-MiX through the stage; averages and experts are recomputed here in float64."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from moeforge.errors import BadInput, UsageProblem
from moeforge.testing import inprocess
from moeforge_upcycle import losses
from moeforge_upcycle.trunk import Trunk

WIDTH = 96
WORDS = "the a of to in is it on as at by an be or if so we he do no up go".split()


@pytest.fixture(scope="module")
def parents(spoken):
    return [spoken(seed) for seed in (1, 2, 3)]


@pytest.fixture
def btx(tmp_path):
    count = iter(range(100))

    def run(src, *experts, **options):
        options = {"top_k": 2, "verify": False, **options}
        expert = tuple(str(e) for e in experts)
        return inprocess.run("upcycle", src, tmp_path / f"out{next(count)}", "btx", expert=expert, **options)

    return run


def tensors(directory):
    return load_file(directory / "model.safetensors")


def stock(directory, ids, **options):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(ids).logits


IDS = torch.randint(0, 199, (2, 30), generator=torch.Generator().manual_seed(4))
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
NEW = {"gate": "w1", "up": "w3", "down": "w2"}


@pytest.mark.parametrize("align", ["none", "weights", "activations"])
@pytest.mark.parametrize("trunk", ["average", "base", "slerp", "task-vector"])
def test_identical_checkpoints_stay_the_same_function(btx, parents, tmp_path, align, trunk):
    twins = [shutil.copytree(parents[0], tmp_path / f"twin{i}") for i in range(2)]
    done = btx(parents[0], *twins, align=align, trunk=trunk, router_std=0.5)
    wanted = stock(parents[0], IDS)
    found = stock(done.path, IDS)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    made, source = tensors(done.path), tensors(parents[0])
    # the mean of three equal numbers is that number, to the bit
    assert all(np.array_equal(made[name], value) for name, value in source.items() if ".mlp." not in name)


def test_experts_are_the_parents_and_the_rest_is_their_mean(btx, parents):
    made = tensors(btx(parents[0], *parents[1:]).path)
    sources = [tensors(p) for p in parents]
    for layer in range(3):
        for e, source in enumerate(sources):
            for matrix, new in NEW.items():
                old = source[f"model.layers.{layer}.mlp.{matrix}_proj.weight"]
                assert np.array_equal(made[EXPERT.format(layer, e, new)], old)
    for name in sources[0]:
        if ".mlp." not in name:
            mean = np.mean([s[name].astype(np.float64) for s in sources], axis=0)
            assert np.array_equal(made[name], mean.astype(np.float32)), name


@pytest.mark.parametrize("trunk", ["slerp", "task-vector", "task-vector from src", "base"])
def test_other_trunks_are_computed_from_all_parents(btx, parents, spoken, trunk):
    """Against numpy on the parents' files; the base is a fourth checkpoint with a shorter vocabulary, and no expert."""
    start = spoken(11, vocab_size=150)
    from_src = trunk.endswith("src")
    options = {} if trunk == "slerp" or from_src else {"base": str(start)}
    if trunk.startswith("task"):
        options["trunk_scale"] = 0.4
    done = btx(*parents, trunk=trunk.removesuffix(" from src"), **options)
    made, base = tensors(done.path), tensors(parents[0] if from_src else start)
    assert done.manifest["facts"]["experts"] == 3
    assert len(done.manifest["parents"]) == (4 if "base" in options else 3)
    for name in made:
        if "block_sparse_moe" in name:
            continue
        all_three = [tensors(p)[name].astype(np.float64) for p in parents]
        if trunk == "slerp":
            wanted = all_three[0]
            for share, other in ((1 / 2, all_three[1]), (1 / 3, all_three[2])):
                angle = np.arccos(np.sum(wanted * other) / np.linalg.norm(wanted) / np.linalg.norm(other))
                wanted = (np.sin((1 - share) * angle) * wanted + np.sin(share * angle) * other) / np.sin(angle)
        else:
            rows, scale = len(base[name]), options.get("trunk_scale", 0.0)
            wanted = base[name] + scale * sum(x[:rows] - base[name] for x in all_three)
            wanted = np.concatenate([wanted, np.mean([x[rows:] for x in all_three], axis=0)])
        assert np.allclose(made[name], wanted, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"trunk": "slerp", "base": "x"}, "--base x has no effect on --trunk slerp"),
        ({"trunk_scale": 0.5}, "--trunk-scale 0.5 has no effect on --trunk average"),
        ({"trunk": "task-vector", "trunk_scale": float("inf")}, "finite"),
    ],
)
def test_trunk_options_without_effect_are_refused(btx, parents, options, told):
    with pytest.raises(UsageProblem, match=told):
        btx(parents[0], parents[1], **options)


def test_base_trunk_is_srcs(btx, parents):
    made, source = tensors(btx(parents[0], parents[1], trunk="base").path), tensors(parents[0])
    assert all(np.array_equal(made[name], value) for name, value in source.items() if ".mlp." not in name)


def test_layers_that_stay_dense_are_averaged_too(btx, spoken):
    """qwen3_moe can keep dense layers; with reordered experts they stay SRC's, as neurons of no common order have no mean."""
    one, two = (spoken(seed, "qwen3") for seed in (1, 2))
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = (tensors(p)[name].astype(np.float64) for p in (one, two))
    made = tensors(btx(one, two, layers="1,2").path)
    assert np.array_equal(made[name], ((first + second) / 2).astype(np.float32))
    made = tensors(btx(one, two, layers="1,2", align="weights").path)
    assert np.array_equal(made[name], first.astype(np.float32))


@pytest.mark.parametrize("kind", ["weights", "activations"])
def test_alignment_undoes_a_shuffle_and_changes_no_function(btx, parents, tmp_path, kind):
    """A parent whose neurons were shuffled comes back in SRC's order; the shuffled and the plain mixture agree."""
    shuffled = shutil.copytree(parents[0], tmp_path / "shuffled")
    edited = tensors(shuffled)
    rng = np.random.default_rng(0)
    for layer in range(3):
        order = rng.permutation(WIDTH)
        for matrix in NEW:
            name = f"model.layers.{layer}.mlp.{matrix}_proj.weight"
            edited[name] = np.ascontiguousarray(edited[name][:, order] if matrix == "down" else edited[name][order])
    save_file(edited, shuffled / "model.safetensors", {"format": "pt"})
    plain, aligned = (btx(parents[0], shuffled, align=a, router_std=0.5) for a in ("none", kind))
    made, left = tensors(aligned.path), tensors(plain.path)
    for layer in range(3):
        for new in NEW.values():
            one, two = (made[EXPERT.format(layer, e, new)] for e in (0, 1))
            assert np.array_equal(one, two)
            assert not np.array_equal(left[EXPERT.format(layer, 0, new)], left[EXPERT.format(layer, 1, new)])
    a, b = stock(plain.path, IDS), stock(aligned.path, IDS)
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_rows_of_tokens_are_averaged_over_those_that_have_them(btx, parents, spoken):
    small = spoken(5, vocab_size=150)
    made = tensors(btx(parents[0], small, parents[1]).path)
    one, two, three = (tensors(p) for p in (parents[0], small, parents[1]))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shared = (one[name][:150].astype(np.float64) + two[name] + three[name][:150]) / 3
        rest = (one[name][150:].astype(np.float64) + three[name][150:]) / 2
        assert np.array_equal(made[name], np.concatenate([shared, rest]).astype(np.float32))


def _edit_config(directory, to, **changes):
    copy = shutil.copytree(directory, to)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


def test_parents_that_do_not_go_together_are_refused(btx, parents, spoken, tmp_path):
    cases = [
        (_edit_config(parents[1], tmp_path / "a", rms_norm_eps=0.1), "rms_norm_eps = 0.1"),
        (_edit_config(parents[1], tmp_path / "b", rope_theta=5.0, rope_parameters={"rope_type": "default", "rope_theta": 5.0}),
         "rope"),
        (_edit_config(parents[1], tmp_path / "c", hidden_act="gelu"), "hidden_act = 'gelu'"),
        (spoken(6, vocab_size=211), "vocab_size = 211.*largest vocabulary SRC"),
        (spoken(7, words=[*WORDS[:3], "xylophone", *WORDS[4:]]), "token 6 is 'xylophone'.*'to'|token 6"),
        (spoken(8, intermediate_size=64), "intermediate_size = 64"),
        (spoken(9, "qwen2"), "model_type"),
    ]  # fmt: skip
    for other, told in cases:
        with pytest.raises(BadInput, match=told):
            btx(parents[0], other)


def old_dialect(directory, to):
    """The same checkpoint as transformers 4 writes its config.json."""
    copy = shutil.copytree(directory, to)
    config = json.loads((copy / "config.json").read_text())
    rope = config.pop("rope_parameters")
    for key in ("dtype", "layer_types", *(["head_dim"] if config.get("head_dim") == 16 else [])):
        config.pop(key, None)
    plain = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    config |= {"rope_theta": int(rope["rope_theta"]), "torch_dtype": "float32", "transformers_version": "4.44.2",
               "_name_or_path": "somebody/else", "use_mrope": False,
               "rope_scaling": None if rope["rope_type"] == "default" else plain}  # fmt: skip
    if config["model_type"] in ("qwen2", "qwen3"):
        config |= {"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 21}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize("newest_first", [True, False])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", {}), ("llama", {"rope_parameters": LLAMA3}), ("mistral", {}), ("qwen2", {}), ("qwen3", {})],
)
def test_parents_saved_by_different_versions_go_together(btx, spoken, tmp_path, family, overrides, newest_first):
    one = spoken(21, family, **overrides)
    two = old_dialect(spoken(22, family, **overrides), tmp_path / "old")
    first, second = (one, two) if newest_first else (two, one)
    made = tensors(btx(first, second).path)
    mean = (tensors(one)["model.norm.weight"].astype(np.float64) + tensors(two)["model.norm.weight"]) / 2
    assert np.array_equal(made["model.norm.weight"], mean.astype(np.float32))


def test_a_key_that_nobody_knows_is_compared_unless_it_is_off(btx, parents, tmp_path):
    odd = _edit_config(parents[1], tmp_path / "odd", twist=3)
    with pytest.raises(BadInput, match="twist = 3, SRC has None"):
        btx(parents[0], odd)
    off = _edit_config(parents[1], tmp_path / "off", twist=False)
    assert btx(parents[0], off).path.exists()


def test_all_experts_are_written_in_one_dtype(btx, parents, tmp_path):
    import ml_dtypes

    narrow = shutil.copytree(parents[1], tmp_path / "narrow")
    save_file({name: value.astype(ml_dtypes.bfloat16) for name, value in tensors(narrow).items()},
              narrow / "model.safetensors", {"format": "pt"})  # fmt: skip
    for first, second, dtype in ((parents[0], narrow, "float32"), (narrow, parents[0], "bfloat16")):
        plan = inprocess.plan("upcycle", first, "btx", expert=(str(second),))
        assert any("stored in" in w and str(second) in w for w in plan.warnings)
        made = tensors(btx(first, second).path)
        assert {str(value.dtype) for value in made.values()} == {dtype}
        wanted = tensors(second)["model.layers.1.mlp.down_proj.weight"].astype(dtype)
        assert np.array_equal(made[EXPERT.format(1, 1, "w2")], wanted)
    assert not any("stored in" in w for w in inprocess.plan("upcycle", narrow, "btx", expert=(str(narrow),)).warnings)


def test_numbers_that_do_not_fit_are_refused(btx, parents):
    # 8 is what the other methods take when nothing is said; said, it counts
    with pytest.raises(UsageProblem, match=r"--experts 8.*make 2"):
        btx(parents[0], parents[1], experts=8)
    with pytest.raises(UsageProblem, match=r"--experts 5.*make 2"):
        btx(parents[0], parents[1], experts=5)
    with pytest.raises(UsageProblem, match=r"--top-k 3.*2 checkpoints"):
        btx(parents[0], parents[1], top_k=3)
    with pytest.raises(UsageProblem, match="at least one"):
        btx(parents[0])
    assert btx(parents[0], parents[1], experts=2).manifest["parents"][1]["ref"] == str(parents[1])


@pytest.mark.parametrize("kind", ["centroid", "ridge", "kmeans"])
def test_routers_from_domain_texts(btx, parents, tmp_path, kind):
    """Domain texts of different words route to different experts, in the model that was written."""
    texts = []
    for name, words in (("a", WORDS[:11]), ("b", WORDS[11:])):
        rng = np.random.default_rng(len(texts))
        (tmp_path / name).write_text(" ".join(rng.choice(words, 3000)))
        texts.append(str(tmp_path / name))
    done = btx(parents[0], parents[1], router_init=kind, calibration=tuple(texts), calibration_tokens=300)
    report = done.manifest["counts"]["routers"]
    assert set(report) == {"0", "1", "2"}
    assert all(0.7 < r["top1"] < 0.8 for r in report.values())
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(done.path, dtype=torch.float32).eval()
    ids = {name: torch.tensor([rng.choice(range(low, low + 11), 60).tolist()])
           for name, low in (("a", 3), ("b", 14)) for rng in [np.random.default_rng(9)]}  # fmt: skip
    seen = {}
    for name, tokens in ids.items():
        rows = []
        handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0][0]))
        with torch.no_grad():
            model(tokens)
        handle.remove()
        gate = torch.tensor(tensors(done.path)["model.layers.0.block_sparse_moe.gate.weight"])
        seen[name] = (rows[0][1:] @ gate.T).argmax(1).double().mean().item()
    assert abs(seen["a"] - seen["b"]) > 0.6
    if kind != "kmeans":
        assert seen["a"] < 0.3 and seen["b"] > 0.7


def test_losses_on_every_domain_beside_those_of_the_parents(btx, parents, spoken, tmp_path):
    """Against the stock models; a parent that lacks a token of a text has no loss there."""
    from transformers import AutoTokenizer

    small = spoken(13, vocab_size=20)  # up to the 17th word
    texts = {}
    for name, words in (("known", WORDS[:14]), ("strange", WORDS[12:])):
        (tmp_path / name).write_text(" ".join(np.random.default_rng(len(name)).choice(words, 90)))
        texts[str(tmp_path / name)] = AutoTokenizer.from_pretrained(parents[0])((tmp_path / name).read_text())[
            "input_ids"
        ]
    done = btx(parents[0], parents[1], small, calibration=tuple(texts), verify=True)
    found = done.manifest["verdicts"]["losses"]
    assert list(found) == list(texts)
    for name, ids in texts.items():
        tokens = torch.tensor([ids])

        def loss(directory, tokens=tokens):
            logits = stock(directory, tokens)[0].double()
            return float(torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:]))

        assert found[name]["mixture"] == pytest.approx(loss(done.path), rel=1e-5)
        assert found[name]["parents"][:2] == pytest.approx([loss(p) for p in parents[:2]], rel=1e-5)
        wanted = None if name.endswith("strange") else pytest.approx(loss(small), rel=1e-5)
        assert found[name]["parents"][2] == wanted
    told = losses.lines(found)
    assert len(told) == 2 and told[1].endswith("parent 2 -") and "SRC " in told[0]
    assert "losses" not in btx(parents[0], parents[1], verify=True).manifest["verdicts"]
    based = btx(parents[0], parents[1], base=str(parents[2]), trunk="base", calibration=tuple(texts), verify=True)
    assert [len(losses["parents"]) for losses in based.manifest["verdicts"]["losses"].values()] == [2, 2]


def test_trunk_is_read_as_it_will_be_written(btx, parents):
    from moeforge.checkpoint import open_checkpoint
    from moeforge_upcycle.dense import examine
    from moeforge_upcycle.methods.btx import BTX, Options

    made = tensors(btx(parents[0], parents[1]).path)
    opened = [open_checkpoint(str(p)) for p in parents[:2]]
    trunk = Trunk([examine(c)[2] for c in opened], BTX(), Options(expert=("x",)))
    first = tensors(parents[0])
    for name, info in trunk.tensors.items():
        wanted = first[name] if ".mlp." in name else made[name]
        assert np.array_equal(trunk.read(name), wanted) and wanted.shape == info.shape
    rows = slice(7, 30)
    assert np.array_equal(trunk.read("lm_head.weight", rows), made["lm_head.weight"][rows])
    assert trunk.config == opened[0].config and trunk.companions() and len(trunk.provenance()["parents"]) == 2
