"""The command answers before anything heavy is imported."""

import subprocess
import sys

import pytest

from moeforge.registry import entries
from moeforge.testing.command import environment, run
from moeforge.testing.conformance import check_light


@pytest.mark.parametrize("verb", sorted(entries("moeforge.verbs")))
def test_the_help_of_a_verb_imports_nothing_heavy(verb):
    check_light([verb, "--help"], {})


def test_help_version_and_plugins_import_nothing_heavy():
    for words in (["--help"], ["--version"], ["plugins"], ["completion", "bash"]):
        code = ("import sys; sys.argv[0] = 'moeforge'\nfrom moeforge.cli import main\ntry: main()\n"
                "except SystemExit as stop: assert not stop.code\nassert 'torch' not in sys.modules")  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *words], capture_output=True, text=True, env=environment()
        )
        assert done.returncode == 0, done.stderr


def test_help_imports_no_verb_and_knows_what_each_says_of_itself():
    code = "import sys; from moeforge.cli import main\ntry: main()\nexcept SystemExit: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "--help"], capture_output=True, text=True, env=environment()
    )
    loaded = set(done.stderr.split())
    assert "click" in loaded
    assert not {"torch", "numpy", "gguf", "rich"} & loaded
    told = " ".join(done.stdout.split())
    for name, (entry,) in entries("moeforge.verbs").items():
        assert entry.summary == entry.load().summary, name
        assert entry.summary in told


def test_every_verb_and_method_is_listed():
    shown = run("plugins", check=True).out
    assert "broken" not in shown
    for name in ("upcycle", "btx", "carve", "nf4", "generate"):
        assert name in shown


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["upcicle"], 2, "did you mean 'upcycle'"),
        (["upcycle", "--expert", "4", "x"], 2, "--experts"),
        (["upcycle", "--method", "drip", "x"], 2, "did you mean 'drop'"),
        (["upcycle", "a", "b"], 2, "unexpected 'b'"),
        (["upcycle", "./nowhere"], 3, "no such file"),
        (["upcycle"], 3, "stdin was empty"),
        (["diff", "a"], 2, "diff takes A B"),
        (["upcycle", "x", "--config", "none.toml"], 2, "No such file"),
    ],
)
def test_wrong_command_lines_end_in_one_line_and_a_code(words, code, said):
    result = run(*words)
    assert result.code == code
    assert said in result.err
    assert len(result.err.splitlines()) == 1
    assert "Traceback" not in result.err
    assert result.out == ""
