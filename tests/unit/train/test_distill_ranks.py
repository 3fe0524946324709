"""Ranks that learn from a teacher do what one process does, whether each holds the student whole or a part of it."""

import pytest

from .conftest import make_model
from .many_ranks import together
from .test_engine import TOLERANCE, agree, reference
from .test_engine import pytestmark as engine

KD = {"kd": 0.8, "kd_temperature": 2.0}
CASES = {
    "whole": (None, {}),
    "whole padded": (None, {"shared": False}),
    "fsdp2 ep2": ((1, 2, 2, 1), {}),
    "fsdp2 padded": ((1, 2, 1, 1), {"shared": False}),
    "tp2": ((2, 1, 1, 1), {}),
}
"""Name -> layout, and what else sets the case apart. The ranks of tp2 see the same rows."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Name -> the case and what two ranks made of it."""
    home = tmp_path_factory.mktemp("taught")
    make_model("mixtral").save_pretrained(home / "mixtral")
    make_model("llama", seed=9).save_pretrained(home / "llama")
    cases = {
        name: {"model": str(home / "mixtral"), "teacher": str(home / "llama"), "layout": layout, "directory": str(home / name.replace(" ", "-")),
               "settings": KD, **more}
        for name, (layout, more) in CASES.items()
    }  # fmt: skip
    made = together(cases, 2, home / "ranks")
    return {name: (cases[name], made[name]) for name in cases}


@engine
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_do_what_one_process_does(found, tmp_path, name):
    case, made = found[name]
    wanted = reference(case, 2, tmp_path / "one")
    agree(wanted, made)
    for one, two in zip(wanted["records"], made["records"], strict=True):
        if one["event"] == "step":
            assert two["kd"] == pytest.approx(one["kd"], rel=TOLERANCE) and one["kd"] > 0.1
