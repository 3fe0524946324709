"""A model of infinities or NaN is never handed over, whether the function was meant to change or not."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moeforge.errors import BadInput, GateRefused, MoeforgeError, UsageProblem
from moeforge.testing import inprocess
from moeforge_upcycle.experts import cast


@pytest.fixture
def upcycle(tmp_path):
    def run(src, method, **options):
        return inprocess.run("upcycle", src, tmp_path / "out", method, **{"experts": 4, "top_k": 2, **options})

    return run


def test_a_changed_function_must_be_finite(spoken, upcycle, tmp_path):
    with pytest.raises(GateRefused, match="infinities or NaN, first in layer 0"):
        upcycle(spoken(1), "noise", sigma=1e30, unit="absolute", verify=True)
    assert not (tmp_path / "out").exists()


def test_noise_that_overflows_is_named_by_tensor(spoken, upcycle):
    with pytest.raises(
        MoeforgeError, match=r"expert \d from model.layers.0.mlp.\w+.weight: \d+ of 6144 values are infinite"
    ):
        upcycle(spoken(1), "noise", sigma=1e39, unit="absolute", verify=False)
    with pytest.raises(UsageProblem, match="--sigma inf"):
        upcycle(spoken(1), "noise", sigma=float("inf"), verify=False)


def test_a_source_that_is_not_finite_is_refused(spoken, upcycle, tmp_path):
    source = spoken(4)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    told = r"model.safetensors: tensor 'model.layers.1.mlp.up_proj.weight' F32 \[\d+, 64\] .* first nan at \[3, 3\]"
    for method, options in (("copy", {}), ("split", {"granularity": 2, "partition": "random"}), ("noise", {})):
        for verify in (True, False):
            with pytest.raises(BadInput, match=told if method == "copy" else r"up_proj.weight' .* first nan at"):
                upcycle(source, method, verify=verify, **options)
            assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [{"router_std": float("inf")}, {"untie": float("inf")}, {"router_init": "zero", "untie": 0.1}]
)
def test_routers_that_cannot_be_are_refused_in_the_plan(spoken, options):
    with pytest.raises(UsageProblem, match=r"--router-std|--untie"):
        inprocess.plan("upcycle", spoken(1), "drop", experts=4, **options)


def test_a_uniform_router_of_one_row_is_refused(spoken):
    with pytest.raises(UsageProblem, match="single row"):
        inprocess.plan("upcycle", spoken(1), "split", granularity=2, experts=2, top_k=2, router_init="uniform")


@pytest.mark.parametrize(("dtype", "large"), [("F16", 7e4), ("BF16", 3.4e38), ("F32", 1e39)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, "large"])
def test_casts_are_finite_in_every_dtype(dtype, large, bad):
    values = np.random.default_rng(0).standard_normal((4, 5))
    assert np.allclose(cast(values, dtype, "good").astype(np.float64), values, rtol=1e-2)
    values[2, 1] = large if bad == "large" else bad
    with pytest.raises(MoeforgeError, match=r"w\.1: .* does not fit" if bad == "large" else r"w\.1: 1 of 20 values"):
        cast(values, dtype, "w.1")


def test_a_cast_that_changes_nothing_is_checked_too():
    values = np.array([1.0, np.nan], np.float32)
    with pytest.raises(MoeforgeError, match="1 of 2"):
        cast(values, "F32", "w")
