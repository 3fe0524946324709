"""Experts, calibration texts and prompts are part of a conversion's key: a change in any is another run."""

import json
import random

import pytest

from moeforge.errors import UsageProblem
from moeforge.pipeline.journal import Journal
from moeforge.testing import inprocess
from moeforge.testing.models import tiny_dense

WORDS = "the a of to in is it on as at by an be or".split()


def words(seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=400))


def prompts(word: str) -> str:
    return "".join(f'[[expert]]\npositive = ["{word} {other}"]\n' for other in ("the", "of", "to", "in"))


@pytest.fixture
def cases(spoken, tmp_path):
    """name -> (options, change what they name)."""
    expert = spoken(seed=1)
    (tmp_path / "text.txt").write_text(words(0))
    (tmp_path / "other.txt").write_text(words(1))
    (tmp_path / "prompts.toml").write_text(prompts("on"))
    texts = (str(tmp_path / "text.txt"), str(tmp_path / "other.txt"))
    routed = {"experts": 4, "calibration_tokens": 64, "verify": False}
    return {
        "expert": (
            {"method": "btx", "expert": (str(expert),), "verify": False},
            lambda: tiny_dense("llama", 2)[0].save_pretrained(expert),
        ),
        "calibration": (
            {"method": "copy", "router_init": "kmeans", "calibration": texts, **routed},
            lambda: (tmp_path / "text.txt").write_text(words(2)),
        ),
        "prompts": (
            {"method": "copy", "router_init": "prompts", "prompts": tmp_path / "prompts.toml", **routed},
            lambda: (tmp_path / "prompts.toml").write_text(prompts("by")),
        ),
    }


@pytest.mark.parametrize("case", ["expert", "calibration", "prompts"])
def test_a_changed_input_is_not_already_done(spoken, cases, tmp_path, case):
    src, (options, change) = spoken(), cases[case]
    first = inprocess.run("upcycle", src, tmp_path / "out", **options)
    again = inprocess.run("upcycle", src, tmp_path / "out", **options)
    assert again.manifest["created"] == first.manifest["created"]
    change()
    with pytest.raises(UsageProblem, match="other options or inputs"):
        inprocess.run("upcycle", src, tmp_path / "out", **options)
    changed = inprocess.run("upcycle", src, tmp_path / "new", **options)
    assert changed.manifest["key"] != first.manifest["key"]
    assert changed.manifest["digest"] != first.manifest["digest"]


@pytest.mark.parametrize("case", ["expert", "calibration", "prompts"])
def test_a_resume_after_a_change_starts_anew(spoken, cases, tmp_path, case, monkeypatch):
    src, (options, change) = spoken(), cases[case]
    options = {**options, "max_shard_size": 60_000}

    def die(self, file, info):
        real(self, file, info)
        raise KeyboardInterrupt

    real = Journal.record
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "record", die)
        inprocess.run("upcycle", src, tmp_path / "out", **options)
    journal = (tmp_path / "out.partial" / ".moeforge-journal.jsonl").read_text()
    assert len(journal.splitlines()) > 1, "nothing to resume from: the test proves nothing"
    change()
    resumed = inprocess.run("upcycle", src, tmp_path / "out", **options)
    assert resumed.manifest["timings"]["resumed"] is False
    assert resumed.manifest["key"] != json.loads(journal.splitlines()[0])["key"]
    fresh = inprocess.run("upcycle", src, tmp_path / "fresh", **options)
    assert resumed.manifest["digest"] == fresh.manifest["digest"]
