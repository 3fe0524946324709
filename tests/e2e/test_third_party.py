"""A third party's package adds a verb and a method without a line of ours being edited."""

import subprocess
import sys
from pathlib import Path

import pytest

from moeforge.testing.command import run
from moeforge.testing.conformance import check_stage

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "moeforge-foo"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The example installed into a directory of its own; returns the environment that sees it."""
    target = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, "--target", target, EXAMPLE], check=True, stdin=subprocess.DEVNULL)
    return {"PYTHONPATH": str(target), "MOEFORGE_PLUGINS": "moeforge-foo"}


def test_verb_and_method_appear(installed):
    assert "prune" in run("--help", env=installed).out
    assert "moeforge-foo" in run("plugins", env=installed).out
    assert "--noise-rel" in run("upcycle", "--method", "antithetic", "--help", env=installed).out
    assert "prune" not in run("--help").out, "MOEFORGE_PLUGINS= must hide third parties"


def test_the_verb_conforms(installed, tiny_llama, tmp_path):
    check_stage("prune", tiny_llama, ["--share", "0.3"], tmp_path, env=installed)


def test_the_method_conforms(installed, tiny_llama, tmp_path):
    check_stage("upcycle", tiny_llama, ["--experts", 4], tmp_path, method="antithetic", exact=False, env=installed)


def test_the_method_refuses_what_it_cannot_do(installed, tiny_llama):
    refused = run("upcycle", tiny_llama, "--method", "antithetic", "--experts", 3, env=installed)
    assert refused.code == 2
    assert "--experts 3 is odd" in refused.err
