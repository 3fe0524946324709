"""`tune` under a launcher: one line on stdout, one rank that talks, a checkpoint as one process writes it, and ends that leave something to
continue from."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import moeforge
from moeforge.errors import MachineLacks, UsageProblem
from moeforge.launch import _check_team
from moeforge.pipeline.ranks import Rank, here
from moeforge.registry import find
from moeforge.testing import inprocess
from moeforge.testing.command import environment
from moeforge.testing.models import tiny_dense, tiny_tokenizer
from moeforge.verb import Verb

from .conftest import make_model
from .test_engine import pytestmark as engine

SHORT = ["--sequence-length", "32", "--batch-size", "2", "--learning-rate", "1e-2", "--balance", "0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny Mixtral, a tiny Llama, an adapter of LoRA experts and some text."""
    home = tmp_path_factory.mktemp("ranks")
    words = tiny_tokenizer()
    make_model("mixtral", vocab_size=len(words) + 3).save_pretrained(home / "moe")
    tiny_dense("llama")[0].save_pretrained(home / "dense")
    for name in ("moe", "dense"):
        words.save_pretrained(home / name)
    (home / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} bottles, " * (i % 5 + 1)}) + "\n" for i in range(60))
    )
    return home


def words(home, out, *more, src="moe"):
    return ["tune", str(home / src), "--data", str(home / "text.jsonl"), *SHORT, *map(str, more), "-o", str(out)]


def start(*args, size=2):
    """`torchrun -m moeforge ARGS` on one machine."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(size),
        "-m",
        "moeforge",
        *args,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())  # fmt: skip


def finish(process):
    """Exit code, stdout, and what moeforge itself said."""
    out, err = process.communicate(timeout=200)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("tune")]


def logits(directory):
    tokens = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(3))
    return moeforge.load(directory)(input_ids=tokens).logits.detach()


@engine
def test_two_ranks_write_what_one_process_writes(home, tmp_path):
    code, out, said = finish(start(*words(home, tmp_path / "two", "--steps", 5, "--fsdp", 2, "--ep", 2)))
    assert code == 0, said
    reference = json.loads(out)
    assert reference["path"] == str(tmp_path / "two")
    assert sum("parameters learn" in line for line in said) == 1 and sum("after 5 steps" in line for line in said) == 1
    one = inprocess.run("tune", home / "moe", tmp_path / "one", data=(str(home / "text.jsonl"),), steps=5, accumulate=2, sequence_length=32,
                        batch_size=2, learning_rate=1e-2, balance=0.0)  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in one.path.iterdir())
    told = json.loads((tmp_path / "two" / "moeforge.json").read_text())
    assert told["tensors"].keys() == one.manifest["tensors"].keys()
    assert told["counts"]["tokens"] == one.manifest["counts"]["tokens"]
    two, wanted, start_ = logits(tmp_path / "two"), logits(one.path), logits(home / "moe")
    assert float((two - wanted).norm()) <= 1e-5 * float(wanted.norm())
    assert float((wanted - start_).norm()) > 1e-2 * float(wanted.norm())


@engine
@pytest.mark.slow
def test_a_killed_rank_takes_the_others_along_and_another_layout_continues(home, tmp_path):
    """And a layout that continues says how; what is done is not done again."""
    options = ["--steps", 60, "--save-every", 4]
    process = start(*words(home, tmp_path / "out", *options, "--fsdp", 2, "--ep", 2))
    partial = tmp_path / "out.partial"
    deadline = time.monotonic() + 120
    while not list(partial.glob("state-*.safetensors")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(ranks[1], signal.SIGKILL)
    code, out, said = finish(process)
    assert code != 0 and out == "" and not (tmp_path / "out").exists()
    # torchrun ends the others with SIGTERM, and that they heard it may be said before the error or after
    (error,) = [line for line in said if "error" in line]
    assert "another rank has ended" in error
    code, out, said = finish(start(*words(home, tmp_path / "out", *options, "--tp", 2)))
    assert code == 0, said
    assert any(re.search(r"continuing after step \d+, with --accumulate 2", line) for line in said)
    code, again, said = finish(start(*words(home, tmp_path / "out", *options)))
    assert (code, again) == (0, out) and any("already done" in line for line in said)
    inprocess.run("tune", home / "moe", tmp_path / "one", data=(str(home / "text.jsonl"),), steps=60, accumulate=2, sequence_length=32,
                  batch_size=2, learning_rate=1e-2, balance=0.0)  # fmt: skip
    wanted = logits(tmp_path / "one")
    assert float((logits(tmp_path / "out") - wanted).norm()) <= 1e-3 * float(wanted.norm())


@engine
@pytest.mark.slow
def test_a_stop_on_one_rank_stops_all_with_the_state_saved(home, tmp_path):
    process = start(*words(home, tmp_path / "out", "--steps", 4000, "--save-every", 4, "--fsdp", 2))
    partial = tmp_path / "out.partial"
    while not list(partial.glob("state-*.safetensors")) and process.poll() is None:
        time.sleep(0.05)
    ranks = [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(ranks[1], signal.SIGTERM)
    code, out, said = finish(process)
    assert code != 0 and out == "" and list(partial.glob("state-*.safetensors"))
    assert [line for line in said if "error" in line] == ["tune: error: stopped; run the same command again to resume"]


@pytest.mark.slow
def test_an_error_of_use_is_said_once(home, tmp_path):
    code, out, said = finish(start(*words(home, tmp_path / "out", "--dp-replicate", 3)))
    assert code != 0 and out == ""
    assert len(said) == 1 and "--dp-replicate 3 needs 3 processes, and there are 2" in said[0]


def launched(monkeypatch, index=0, world=2, local=0):
    for name, value in {"RANK": index, "WORLD_SIZE": world, "LOCAL_RANK": local}.items():
        monkeypatch.setenv(name, str(value))


def test_a_launcher_is_known_by_all_of_its_variables(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert here() == Rank() and not here().silent
    launched(monkeypatch, 9, 16, 1)
    assert here() == Rank(9, 16, 1, True) and here().silent
    launched(monkeypatch, 8, 16, 0)
    assert not here().silent  # the first one of the second machine


def planned(home, src="moe", **options):
    return inprocess.plan("tune", home / src, data=(str(home / "text.jsonl"),), sequence_length=32, **options)


@engine
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"fsdp": 3}, r"--fsdp 3 needs 3 or a multiple of it processes, and there are 2"),
        ({"tp": 2, "ep": 4}, r"--ep 4: must divide"),
        ({"src": "dense", "fsdp": 2, "ep": 2}, "has no experts"),
        (
            {"fsdp": 2, "optimizer": "adamw-8bit"},
            "--optimizer adamw-8bit: cannot hold the moments of parameters in shards",
        ),
    ],
)
def test_layouts_are_refused_by_the_plan(home, monkeypatch, options, told):
    launched(monkeypatch)
    with pytest.raises(UsageProblem, match=told):
        planned(home, **options)


@engine
def test_a_plan_counts_for_all_ranks_and_its_memory_for_one(home, monkeypatch):
    alone = planned(home).facts
    shared = planned(home, fsdp=2, ep=2).facts  # as for a dry run, without ranks
    assert shared["tokens_a_step"] == 2 * alone["tokens_a_step"]
    assert shared["peak_memory_bytes"] < alone["peak_memory_bytes"]
    launched(monkeypatch)
    assert planned(home).facts["tokens_a_step"] == 2 * alone["tokens_a_step"]


@engine
def test_sources_that_the_engine_does_not_load_in_parts_are_told_what_works(home):
    inprocess.run("attach", home / "dense", home / "adapter", "mixlora", rank=4, verify=False, experts="4")
    with pytest.raises(UsageProblem, match=r"adapter of LoRA experts.*without --tp, --fsdp and --ep"):
        planned(home, src="adapter", fsdp=2)
    inprocess.run("upcycle", home / "dense", home / "own", "copy", experts=3, target="moeforge")
    for numbers in ({"tp": 2}, {"fsdp": 2, "ep": 2}):
        with pytest.raises(
            UsageProblem, match=r"mixture of type moeforge.*--fsdp works; without --tp, --fsdp and --ep"
        ):
            planned(home, src="own", **numbers)
    assert planned(home, src="own", fsdp=2).facts["tokens_a_step"] > 0
    with pytest.raises(UsageProblem, match=r"has 3 experts.*would hold none"):
        planned(home, src="own", fsdp=4)


def test_an_older_transformers_is_refused_with_its_version(home, monkeypatch):
    monkeypatch.setattr("moeforge_tune.ranks.metadata.version", lambda name: "5.17.0")
    with pytest.raises(MachineLacks, match=r"--fsdp 2 .*: needs transformers 5\.23 or newer, 5\.17\.0 is installed"):
        planned(home, fsdp=2)
    assert planned(home).facts["tokens_a_step"] > 0


def test_what_one_process_does_is_refused_under_a_launcher():
    with pytest.raises(UsageProblem, match="upcycle runs in one process, and a launcher started 2"):
        _check_team(Verb(find("moeforge.verbs", "upcycle", "verb")), ["moe"], 2)
    tune = Verb(find("moeforge.verbs", "tune", "verb"))
    with pytest.raises(UsageProblem, match="2 processes cannot all read SRC from stdin"):
        _check_team(tune, [None], 2)
    _check_team(tune, ["moe"], 2)
