"""A run that is killed leaves nothing that looks whole, and the same command then gives the same bytes."""

import json
import signal

import pytest

from moeforge.testing.kill import kill_and_resume
from moeforge.testing.models import SIZES, tiny, tiny_tokenizer


def test_killed_runs_resume_to_the_same_bytes(tiny_llama, tmp_path):
    words = ["upcycle", tiny_llama, "--method", "drop", "--no-verify", "--max-shard-size", "40kB"]
    expected, kills = kill_and_resume(words, tmp_path / "out", times=6)
    assert {kill.digest for kill in kills} == {expected}
    assert not any(kill.whole_too_early for kill in kills)
    assert any(kill.died for kill in kills)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_training_ends_in_the_same_weights(tmp_path, sent):
    from transformers import AutoConfig

    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    tiny(AutoConfig.for_model("mixtral", **sizes))[0].save_pretrained(tmp_path / "moe")
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} bottles on the wall, " * (i % 7 + 1)}) + "\n" for i in range(60)))
    words = ["tune", tmp_path / "moe", "--data", text, "--steps", 24, "--save-every", 2, "--sequence-length", 64,
             "--batch-size", 2, "--accumulate", 2, "--evaluate-every", 15]  # fmt: skip
    expected, kills = kill_and_resume(words, tmp_path / "out", times=2, seed=3, sent=sent)
    assert {kill.digest for kill in kills} == {expected}
    assert not any(kill.whole_too_early for kill in kills)
    assert any(kill.died for kill in kills)
