"""Ranks that share a model do what one process does: losses, gradients, clipping, weights, whatever the layout; gloo on CPUs."""

from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeforge.errors import BadInput
from moeforge.testing import inprocess
from moeforge.train.layout import Layout

from .conftest import make_model
from .many_ranks import alone, together

pytestmark = pytest.mark.skipif(
    tuple(int(part) for part in metadata.version("transformers").split(".")[:2]) < (5, 23),
    reason="transformers has had experts on ranks of their own since 5.23",
)
TOLERANCE = 5e-6
"""Of losses, and of gradients by norm, relative: float32 sums in another order."""
DRIFT = 4e-5
"""Of weights after some updates: AdamW divides by the root of the second moment, so a rounding error in a gradient near zero becomes a
step of its own; some processors come to 5.4e-6. What a rank forgets or counts twice changes 1e-3 and more."""
LAYOUTS = {
    2: {"fsdp2": (1, 2, 1, 1), "fsdp2-ep2": (1, 2, 2, 1), "tp2": (2, 1, 1, 1), "tp2-ep2": (2, 1, 2, 1)},
    4: {"fsdp4-ep4": (1, 4, 4, 1), "fsdp4-ep2": (1, 4, 2, 1), "tp2-fsdp2-ep4": (2, 2, 4, 1), "tp2-fsdp2": (2, 2, 1, 1),
        "fsdp2-ep2-rep2": (1, 2, 2, 2)},
    8: {"tp2-fsdp4-ep4": (2, 4, 4, 1), "tp2-fsdp2-ep4-rep2": (2, 2, 4, 2)},
}  # fmt: skip
"""Ranks -> name -> tp, fsdp, ep, replicate: the rows of spec/systems.md 3.1 and some more."""
LINEAR = {"balance": 0.0, "z": 0.1, "importance": 0.0}
"""Losses that do not ask how an update is cut into passes."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models to train."""
    home = tmp_path_factory.mktemp("engine")
    for family in ("mixtral", "qwen3_moe", "qwen2_moe", "llama"):
        make_model(family).save_pretrained(home / family)
    inprocess.run("upcycle", home / "llama", home / "own", "copy", experts=4, target="moeforge", verify=False)
    without_a_plan("jetmoe").save_pretrained(home / "jetmoe")
    # what all tokens have in common leads them to the first two experts: ranks that own others get none
    make_model("mixtral", num_local_experts=8).save_pretrained(home / "crowded")
    change(home / "crowded", lead)
    make_model("mixtral", num_local_experts=8).save_pretrained(home / "mixtral8")
    make_model("mixtral").save_pretrained(home / "broken")
    change(home / "broken", lambda name, value: value[5].fill_(torch.nan) if "lm_head" in name else None)
    return home


def without_a_plan(family):
    """A mixture for which transformers has no plan of experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                                                                 num_key_value_heads=2, kv_channels=8, num_local_experts=4))  # fmt: skip


def lead(name, value):
    """Every token has much of the first feature, and two experts ask for it."""
    if "embed" in name:
        value[:, 0] += 10
    if "gate." in name:
        value.zero_()[:2, 0] = 1


def change(directory, how):
    weights = load_file(directory / "model.safetensors")
    for name, value in weights.items():
        how(name, value)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def case(home, family, layout, **more):
    return {"model": str(home / family), "layout": layout, **more}


def plain(home, size):
    """Name -> a case that one process can do as well."""
    found = {}
    for name, layout in LAYOUTS[size].items():
        for family in ("mixtral", "qwen3_moe", "qwen2_moe") if layout[2] > 1 and size == 2 else ("mixtral",):
            found[f"{family} {name}"] = case(home, f"{family}8" if size > 2 else family, layout)
        found[f"padded {name}"] = case(home, "mixtral8", layout, shared=False)
        found[f"crowded {name}"] = case(home, "crowded", layout)
        found[f"odd {name}"] = case(home, "mixtral8", layout, length=7, settings={"rows": 1})
    return found


def special(home=Path()):
    """Cases of two ranks that ask for something of their own."""
    pair = (1, 2, 2, 1)
    return {
        "dense fsdp2": case(home, "llama", (1, 2, 1, 1)),
        "dense tp2": case(home, "llama", (2, 1, 1, 1)),
        "checkpointing": case(home, "mixtral", pair, checkpointing=True),
        "experts only": case(home, "mixtral", pair, select="experts", settings={"preserve": 0.3}),
        "routers only": case(home, "mixtral", pair, select="routers"),
        "last layer only": case(home, "mixtral", pair, select="*.layers.1.*,lm_head.weight"),
        "full disk": case(home, "mixtral", pair, full_disk=True),
        "of type moeforge": case(home, "own", (1, 2, 1, 1)),
        "unclipped": case(home, "mixtral", pair, settings={"clip": 0.0}),
        "whole": case(home, "mixtral", None),
    }


def short(home):
    return {f"bf16 {name}": case(home, "mixtral", LAYOUTS[2][name], short=True) for name in ("fsdp2-ep2", "tp2-ep2")}


def refused(home):
    """Cases that must end at once, on both ranks."""
    return {
        "no experts": case(home, "llama", (1, 2, 2, 1)),
        "no plan": case(home, "jetmoe", (1, 2, 2, 1)),
        "nan": case(home, "broken", (1, 2, 2, 1)),
    }


def resumed(home):
    """Runs that stop on a layout and continue on another; what is in one directory is one run."""
    found = {}
    for name, (first, then) in {"fsdp2-ep2 to tp2-ep2": ((1, 2, 2, 1), (2, 1, 2, 1)), "tp2 to fsdp2": ((2, 1, 1, 1), (1, 2, 1, 1)),
                                "fsdp2-ep2 to whole": ((1, 2, 2, 1), None)}.items():  # fmt: skip
        passes = 2 if first[1] == 1 else 1
        options = {"amount": 6, "accumulate": passes, **LINEAR}
        found[f"stopped {name}"] = case(
            home, "mixtral", first, settings=options, stop=9 if passes == 2 else 5, run=name
        )
        found[f"continued {name}"] = case(home, "mixtral", then, settings=options, run=name)
    found["stopped for one"] = case(home, "mixtral", (1, 2, 2, 1), settings={"amount": 6, **LINEAR}, stop=5, run="one")
    found["continued from one"] = case(home, "mixtral", (1, 2, 2, 1), settings={"amount": 6, **LINEAR}, run="from one")
    return found


def collect(found, size, directory):
    """Name -> (case, what the ranks did)."""
    for number, case in enumerate(found.values()):
        case["directory"] = str(directory / case.pop("run", str(number)).replace(" ", "-"))
    results = together(found, size, directory)
    return {name: (case, results[name]) for name, case in found.items()}


def reference(case, size, directory):
    """What one process does with the rows of all."""
    layout = case["layout"] or (1, size, 1, 1)
    settings = case.get("settings", {})
    rows = settings.get("rows", 2) * layout[1] * layout[3]
    return alone(case | {"layout": None, "settings": settings | {"rows": rows}}, directory)


def agree(one, other, cut_alike=True):
    """Records, gradients of the first update, weights.

    Args:
        cut_alike: an update has the same passes in both; balance and importance look at one pass after the other.
    """
    assert other["stopped"] is None and len(one["records"]) == len(other["records"])
    for a, b in zip(one["records"], other["records"], strict=True):
        assert a.keys() == b.keys() and a["event"] == b["event"]
        for key in {"step", "tokens", "lr", "loss", "norm", "z", "preserve", *(("balance", "importance", "imbalance") if cut_alike else ())} & a.keys():  # fmt: skip
            if a[key] is None:  # the imbalance of a dense model
                assert b[key] is None
                continue
            assert b[key] == pytest.approx(a[key], rel=TOLERANCE, abs=1e-9), (a["event"], a["step"], key)
    for kind in ("gradients", "weights"):
        assert one[kind].keys() == other[kind].keys()
        whole = float(torch.nn.utils.get_total_norm(one[kind].values()))
        assert whole > 0
        limit = TOLERANCE if kind == "gradients" else DRIFT
        for name, value in one[kind].items():
            # a tensor's gradient may be the small rest of large terms, so it is measured by a hundredth of all at least
            bound = limit * max(float(value.norm()), 0.01 * whole)
            assert float((other[kind][name] - value).norm()) <= bound, (kind, name)


@pytest.fixture(scope="module")
def two(home, tmp_path_factory):
    """All cases of two ranks, in one start of them."""
    place = tmp_path_factory.mktemp("two")
    found = plain(home, 2) | special(home) | short(home) | refused(home) | resumed(home)
    first = case(home, "mixtral", None, settings={"amount": 6, "accumulate": 2, **LINEAR}, stop=9)
    assert alone(first, place / "from-one")["stopped"] is not None
    return collect(found, 2, place)


def test_two_ranks_do_what_one_process_does(home, two, tmp_path):
    for name in plain(home, 2):
        agree(reference(two[name][0], 2, tmp_path / name), two[name][1])
    for name in plain(home, 2):
        loads = [record["routing"]["load"] for record in two[name][1]["records"] if record["event"] == "step"]
        if name.startswith("crowded"):
            assert all(layer == [0.5, 0.5, *6 * [0.0]] for layers in loads for layer in layers)


@pytest.mark.parametrize("name", list(special()))
def test_two_ranks_do_what_one_process_does_where_something_is_special(two, tmp_path, name):
    agree(reference(two[name][0], 2, tmp_path / "one"), two[name][1])


def test_what_cannot_be_shared_out_or_is_no_number_is_refused_on_every_rank(two):
    told = two["no experts"][1]["refused"]
    assert "--ep 2" in told and "LlamaForCausalLM" in told and "without --tp, --fsdp and --ep" in told
    told = two["no plan"][1]["refused"]
    assert "--ep 2" in told and "no ep plan" in told and "--fsdp can" in told
    assert "the loss became nan at step 1" in two["nan"][1]["stopped"]


@pytest.mark.parametrize(
    "name", [name.removeprefix("stopped ") for name in resumed(Path()) if " to " in name and "stopped" in name]
)
def test_a_run_continues_on_another_layout_as_if_it_had_not_stopped(two, tmp_path, name):
    first, then = two[f"stopped {name}"][1], two[f"continued {name}"][1]
    assert first["stopped"].startswith("Interrupted") and 0 < first["step"] < 6
    assert then["step"] == 6
    whole = alone(two[f"stopped {name}"][0] | {"layout": None, "stop": None, "settings": {"rows": 4, "amount": 6, **LINEAR}}, tmp_path / "one")  # fmt: skip
    agree(whole, then | {"gradients": whole["gradients"]}, cut_alike=False)


def test_a_run_of_ranks_continues_alone_and_the_other_way_round(two, tmp_path):
    whole = alone(two["stopped for one"][0] | {"layout": None, "stop": None, "settings": {"rows": 4, "amount": 6, **LINEAR}}, tmp_path / "one")  # fmt: skip
    stopped, first = two["stopped for one"]
    assert first["stopped"].startswith("Interrupted")
    rest = alone(stopped | {"layout": None, "stop": None}, Path(stopped["directory"]))
    assert rest["accumulate"] == 2
    other = two["continued from one"][1]
    assert other["accumulate"] == 1
    for found in (rest, other):
        agree(whole, found | {"gradients": whole["gradients"]}, cut_alike=False)


def test_bfloat16_computes_and_float32_adds_up(two, tmp_path):
    for name in ("bf16 fsdp2-ep2", "bf16 tp2-ep2"):
        case, found = two[name]
        one = reference(case | {"short": False}, 2, tmp_path / name)
        assert found["dtypes"] == {"torch.float32"}
        for a, b in zip(one["records"], found["records"], strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=0.05)
        assert found["records"][1]["loss"] != pytest.approx(one["records"][1]["loss"], rel=1e-5)


def test_experts_that_the_plan_did_not_reach_are_an_error():
    from moeforge.train.engine import _check_experts

    with pytest.raises(BadInput, match=r"--ep 2: model\.layers\.0\.mlp\.experts\.gate_up_proj was not shared out"):
        _check_experts(make_model("mixtral"), Layout(1, 2, 2, 1), "moe")


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 8])
def test_more_ranks_do_what_one_process_does(home, tmp_path, size):
    for name, (case, found) in collect(plain(home, size), size, tmp_path / "ranks").items():
        agree(reference(case, size, tmp_path / name), found)
