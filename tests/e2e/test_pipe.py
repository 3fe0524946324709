"""Stages joined by a real shell."""

import json
import subprocess

import pytest

from moeforge.testing.command import environment, moeforge_argv, run


def shell(script, tmp_path, **env):
    """Run a bash script with `moeforge` defined as this interpreter's."""
    head = f'moeforge() {{ {" ".join(moeforge_argv())} "$@"; }}\n'
    return subprocess.run(["bash", "-c", head + script], capture_output=True, text=True, cwd=tmp_path,
                          env=environment(MOEFORGE_HOME=str(tmp_path / "home"), **env))  # fmt: skip


@pytest.fixture
def upcycle(tiny_llama):
    return f"moeforge upcycle {tiny_llama} --experts 4 --top-k 2"


def test_references_travel_and_the_terminal_is_left_alone(upcycle, tmp_path):
    done = shell(f"{upcycle} --no-verify | moeforge export --to hf -o out", tmp_path)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["path"] == str(tmp_path / "out")
    assert all(text.startswith(("upcycle:", "export:")) for text in done.stderr.splitlines())
    lineage = json.loads((tmp_path / "out" / "moeforge.json").read_text())["parents"][0]["manifest"]
    assert lineage["verb"] == "upcycle"


def test_a_failed_first_stage_fails_the_pipe_without_pipefail(tmp_path):
    done = shell(
        "moeforge upcycle nowhere.gguf | moeforge compress --method nf4 | moeforge push org/name --dry-run", tmp_path
    )
    assert done.returncode == 3
    assert "upcycle: error: nowhere.gguf" in done.stderr
    assert "push: error: stdin was empty" in done.stderr
    assert not (tmp_path / "home").exists()


def test_a_typo_in_the_second_stage_stops_the_first(upcycle, tmp_path):
    done = shell(f"{upcycle} -o up | moeforge export --tto hf; echo ${{PIPESTATUS[@]}}", tmp_path)
    assert done.stdout.split() == ["141", "2"]
    assert not (tmp_path / "up").exists()


def test_a_whole_pipe_is_costed_before_anything_is_written(upcycle, tmp_path):
    done = shell(f"{upcycle} --dry-run | moeforge compress --method nf4 | moeforge push org/name", tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    plan = json.loads(done.stdout)
    assert (plan["kind"], plan["verb"]) == ("plan", "push")


def test_the_same_pipe_again_is_already_done(upcycle, tmp_path):
    first = shell(f"{upcycle} --no-verify", tmp_path)
    again = shell(f"{upcycle} --no-verify", tmp_path)
    assert json.loads(first.stdout) == json.loads(again.stdout)
    assert "already done" in again.stderr


def test_make_sees_the_manifest_as_its_target(tiny_llama, tmp_path):
    (tmp_path / "Makefile").write_text(
        f"up/moeforge.json: {tiny_llama}/config.json\n\tmoeforge upcycle {tiny_llama} --no-verify -o up >/dev/null\n"
    )
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "moeforge"
    script.write_text(f'#!/bin/sh\nexec {" ".join(moeforge_argv())} "$@"\n')
    script.chmod(0o755)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    assert "moeforge upcycle" in shell("make", tmp_path, PATH=path).stdout
    assert "up to date" in shell("make", tmp_path, PATH=path).stdout
    # The source looks newer, but nothing that matters changed: the result is reused and its time refreshed.
    shell(f"touch {tiny_llama}/config.json; make", tmp_path, PATH=path)
    assert "up to date" in shell("make", tmp_path, PATH=path).stdout


def test_options_come_from_flags_over_file_over_defaults(tiny_llama, tmp_path):
    (tmp_path / "r.toml").write_text('method = "noise"\nexperts = 6\ntop_k = 3\nverify = false\noutput = "up"\n')
    result = run("upcycle", tiny_llama, "--config", tmp_path / "r.toml", "--top-k", 2, cwd=tmp_path, check=True)
    manifest = json.loads((result.path / "moeforge.json").read_text())
    assert result.path == tmp_path / "up"
    assert (manifest["method"], manifest["options"]["experts"], manifest["options"]["top_k"]) == ("noise", 6, 2)
    (tmp_path / "r.toml").write_text("expert = 6\n")
    refused = run("upcycle", tiny_llama, "--config", tmp_path / "r.toml")
    assert refused.code == 2
    assert "did you mean 'experts'" in refused.err


@pytest.mark.parametrize("query", ["eval --data builtin:prose", "generate hello", "verify"])
def test_a_plan_has_no_weights_to_ask(query, upcycle, tmp_path):
    done = shell(f"{upcycle} --dry-run | moeforge {query}", tmp_path)
    assert done.returncode == 3
    assert "needs weights, and a plan has none yet" in done.stderr
    assert "experts" in shell(f"{upcycle} --dry-run | moeforge show", tmp_path).stdout
