"""The conformance suite finds what is wrong: a stage that is right but for one fault, told by an option."""

import json

import pytest

from moeforge.testing import conformance
from moeforge.testing.command import run

FAULTY = """
import sys
from dataclasses import dataclass, replace

import numpy as np

from moeforge.checkpoint import Input, TensorOp, open_checkpoint
from moeforge.checkpoint.companions import write_companions
from moeforge.checkpoint.writer import write_checkpoint
from moeforge.options import opt
from moeforge.pipeline.artifact import Plan
from moeforge.pipeline.stage import Written

COUNT = 0

@dataclass(frozen=True)
class Options:
    fault: str = opt("what is wrong", default="nothing")
    share: float = opt("a number", default=0.5)

    def __post_init__(self):
        if self.fault == "options":
            object.__setattr__(self, "share", self.share / 2)

class Faulty:
    name, summary, api_version = "faulty", "copy a checkpoint, with one fault", 1
    consumes, produces, output, default_method, Options = frozenset({"checkpoint"}), "checkpoint", "directory", None, Options

    def plan(self, src, options, method):
        if options.fault == "heavy":
            import torch
        checkpoint = open_checkpoint(src.ref)
        ops = []
        for info in checkpoint.tensors.values():
            harm = info.name == "model.norm.weight" and options.fault in ("liar", "nan")
            compute = (lambda w: w * np.float32("nan" if options.fault == "nan" else 1.01)) if harm else None
            ops.append(TensorOp((info,), (Input(checkpoint, info.name),), compute))
        return Plan("faulty", None, "copies", config=checkpoint.config,
                    tensors={i.name: (i.dtype, i.shape) for i in checkpoint.tensors.values()},
                    verdicts={"exact": options.fault != "nan"}, payload=(checkpoint, ops, options))

    def run(self, plan, out, ctx):
        checkpoint, ops, options = plan.payload
        done = write_checkpoint(ops, out.path, journal=out.journal)
        config = dict(plan.config)
        if options.fault == "config":
            config["num_hidden_layers"] += 1
        write_companions(checkpoint, out.path, config)
        if options.fault == "loud":
            ctx.progress.stream.write("look at me\\n")
        return Written("checkpoint", digests=done.files, parents=(checkpoint.provenance(),))
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """The environment in which the verb `faulty` is installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "faulty.py").write_text(FAULTY)
    info = site / "faulty-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[moeforge.verbs]\nfaulty = faulty:Faulty\n")
    return {"PYTHONPATH": str(site), "MOEFORGE_PLUGINS": "faulty"}


CHECKS = [name for name in vars(conformance) if name.startswith("check_") and name != "check_stage"]


def test_without_a_fault_it_conforms(faulty, tiny_llama, tmp_path, monkeypatch):
    """And the suite is all of the checks: each one is made, and equality is measured where it is promised."""
    made = []

    def noting(name, check):
        def noted(*args):
            made.append((name, args))
            return check(*args)

        return noted

    for name in CHECKS:
        monkeypatch.setattr(conformance, name, noting(name, getattr(conformance, name)))
    conformance.check_stage("faulty", tiny_llama, ["--share", "0.1"], tmp_path, exact=True, env=faulty)
    assert {name for name, _ in made} == set(CHECKS)
    assert [args[0][-1] for name, args in made if name == "check_light"] == ["--help", "--dry-run"]
    assert [args[1:3] for name, args in made if name == "check_model"] == [(tmp_path / "first", True)]


@pytest.mark.parametrize(
    ("fault", "check", "rule"),
    [
        ("heavy", "check_light", "imported .*torch"),
        ("liar", "check_model", "promised to be the same function"),
        ("nan", "check_model", "infinities or NaN"),
        ("config", "check_model", "cannot be loaded and run as a model"),
        ("options", "check_options", "do not survive being written"),
        ("loud", "check_stderr", "do not start with 'faulty'"),
    ],
)
def test_each_fault_is_found(faulty, tiny_llama, tmp_path, fault, check, rule):
    """By the check that is meant to: the suite makes them all, see above."""
    env, out = {"MOEFORGE_HOME": str(tmp_path / "home"), **faulty}, tmp_path / "first"
    words = ["faulty", str(tiny_llama), "--fault", fault]
    if check == "check_light":
        arguments = [[*words, "--dry-run"], env]
    else:
        done = run(*words, "-o", out, check=True, env=env)
        manifest = json.loads((out / "moeforge.json").read_text())
        arguments = {
            "check_model": [tiny_llama, out, manifest["verdicts"]["exact"], env],
            "check_options": ["faulty", tiny_llama, manifest, tmp_path, env],
            "check_stderr": ["faulty", done],
        }[check]
    with pytest.raises(AssertionError, match=rule):
        getattr(conformance, check)(*arguments)
