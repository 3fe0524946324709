"""Differences are found where they are, measured as they are, and nowhere else."""

import ml_dtypes
import numpy as np
import pytest

from moeforge.errors import ExitCode
from moeforge.testing.command import run
from moeforge_inspect import diff
from moeforge_inspect.diff import Diff, config_difference


@pytest.fixture
def values():
    rng = np.random.default_rng(5)
    return {
        "a.weight": rng.standard_normal((7, 5), dtype=np.float32),
        "b.weight": rng.standard_normal(11).astype(ml_dtypes.bfloat16),
    }


def test_equal_checkpoints(ask, checkpoint, values):
    answer = ask(Diff, checkpoint("a", values), checkpoint("b", values))
    assert answer.exit_code == ExitCode.OK and answer.data["equal"]
    assert answer.data["tensors"]["equal"] == 2 and answer.text.endswith("\nequal")


def test_values_are_measured(ask, checkpoint, values):
    other = {name: value.copy() for name, value in values.items()}
    other["a.weight"][3, 2] += 0.5
    other["a.weight"][0, 0] -= 0.125
    answer = ask(Diff, checkpoint("a", values), checkpoint("b", other))
    assert answer.exit_code == ExitCode.GATE and not answer.data["equal"]
    change = answer.data["tensors"]["changed"]["a.weight"]
    gap = np.abs(other["a.weight"].astype(np.float64) - values["a.weight"])
    assert change["max_abs"] == pytest.approx(gap.max())
    assert change["relative"] == pytest.approx(gap.max() / np.abs(values["a.weight"]).max())
    assert change["changed"] == pytest.approx(2 / 35)
    assert list(answer.data["tensors"]["changed"]) == ["a.weight"] and answer.data["tensors"]["equal"] == 1


def test_chunks_change_nothing(ask, checkpoint, monkeypatch):
    rng = np.random.default_rng(6)
    a = {"w": rng.standard_normal((23, 3), dtype=np.float32)}
    b = {"w": a["w"].copy()}
    b["w"][22, 1] = 9.0
    paths = checkpoint("a", a), checkpoint("b", b)
    whole = ask(Diff, *paths).data["tensors"]
    monkeypatch.setattr(diff, "CHUNK_BYTES", 48)
    assert ask(Diff, *paths).data["tensors"] == whole
    assert whole["changed"]["w"]["changed"] == pytest.approx(1 / 69)


def test_nan_is_a_difference_unless_both_have_it(ask, checkpoint, values):
    broken = {name: value.copy() for name, value in values.items()}
    broken["a.weight"][1, 1] = np.nan
    clean, bad = checkpoint("a", values), checkpoint("b", broken)
    for pair in ((clean, bad), (bad, clean)):
        answer = ask_loose(ask, *pair)
        assert answer.exit_code == ExitCode.GATE
    again = {name: value.copy() for name, value in broken.items()}
    again["a.weight"][2, 2] += 1
    change = ask(Diff, bad, checkpoint("c", again)).data["tensors"]["changed"]["a.weight"]
    assert change["max_abs"] == pytest.approx(1) and change["changed"] == pytest.approx(1 / 35)


def ask_loose(ask, *pair):
    """A tolerance does not swallow a NaN."""
    return ask(Diff, *pair, tolerance=1e9)


def test_names_shapes_and_dtypes(ask, checkpoint, values):
    other = {
        "a.weight": values["a.weight"].T,
        "b.weight": values["b.weight"].astype(np.float32),
        "c.weight": values["a.weight"],
    }
    found = ask(Diff, checkpoint("a", {**values, "gone": values["a.weight"]}), checkpoint("b", other)).data["tensors"]
    assert found["only_in_a"] == {"gone": ["F32", [7, 5]]} and found["only_in_b"] == {"c.weight": ["F32", [7, 5]]}
    assert found["reshaped"] == {"a.weight": [["F32", [7, 5]], ["F32", [5, 7]]]}
    change = found["changed"]["b.weight"]
    assert change["dtype"] == ["BF16", "F32"] and change["max_abs"] == 0 and change["changed"] == 0


def test_tolerance_and_no_values(ask, checkpoint, values):
    near = {name: value.copy() for name, value in values.items()}
    near["a.weight"] *= np.float32(1.001)
    a, b = checkpoint("a", values), checkpoint("b", near)
    assert ask(Diff, a, b, tolerance=0.0005).exit_code == ExitCode.GATE
    loose = ask(Diff, a, b, tolerance=0.002)
    assert (
        loose.exit_code == ExitCode.OK
        and loose.data["tensors"]["within_tolerance"] == 1
        and loose.data["tensors"]["equal"] == 1
    )
    headers = ask(Diff, a, b, values=False)
    assert headers.exit_code == ExitCode.OK and "values not compared" in headers.text


def test_config(ask, checkpoint, values):
    a = checkpoint("a", values, hidden_size=4, rope={"theta": 1.0, "type": "x"}, gone=None)
    b = checkpoint("b", {"other": values["a.weight"]}, hidden_size=4.0, rope={"theta": 2.0, "type": "x"}, new=[1])
    answer = ask(Diff, a, b, config_only=True)
    assert answer.data["config"] == {
        "only_in_a": {"gone": None},
        "only_in_b": {"new": [1]},
        "changed": {"rope.theta": [1.0, 2.0]},
    }
    assert "tensors" not in answer.data and answer.exit_code == ExitCode.GATE
    assert config_difference({"x": True}, {"x": 1})["changed"] == {"x": [True, 1]}


def test_long_lists_are_cut(ask, checkpoint, values):
    many = {f"t{i:02d}": values["a.weight"] for i in range(diff.SHOWN + 4)}
    paths = checkpoint("a", many), checkpoint("b", {"t00": values["a.weight"]})
    assert "... and 3 more" in ask(Diff, *paths).text
    assert f"t{diff.SHOWN + 3}" in ask(Diff, *paths, all=True).text


def test_command(checkpoint, values):
    a, b = checkpoint("a", values), checkpoint("b", {"b.weight": values["b.weight"]})
    assert run("diff", a, a).code == 0
    told = run("diff", a, b, "--json")
    assert told.code == ExitCode.GATE and list(told.reference["tensors"]["only_in_a"]) == ["a.weight"]
    assert run("diff", a, "/nowhere/at/all").code == ExitCode.BAD_INPUT
