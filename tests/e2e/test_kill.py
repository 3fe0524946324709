"""A run that is killed leaves nothing that looks whole, and the same command then gives the same bytes."""

from moeforge.testing.kill import kill_and_resume


def test_killed_runs_resume_to_the_same_bytes(tiny_llama, tmp_path):
    words = ["upcycle", tiny_llama, "--method", "drop", "--no-verify", "--max-shard-size", "40kB"]
    expected, kills = kill_and_resume(words, tmp_path / "out", times=6)
    assert {kill.digest for kill in kills} == {expected}
    assert not any(kill.whole_too_early for kill in kills)
    assert any(kill.died for kill in kills)
