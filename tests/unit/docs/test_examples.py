"""The examples that `--help` and the docs show are command lines that work."""

import io
import shlex
import signal
import sys

import pytest

from moeforge import cli, launch, registry
from moeforge.pipeline.artifact import MANIFEST
from moeforge.testing.command import run

VERBS = [entry for found in registry.entries("moeforge.verbs").values() for entry in found]
EXAMPLES = [(entry.name, line) for entry in VERBS for line in entry.load().examples]
RUN = {
    "moeforge upcycle org/dense --dry-run": None,
    "moeforge upcycle org/dense --experts 8 --top-k 2 -o moe": "moe",
    "moeforge upcycle org/dense --dry-run | moeforge show": None,
    "moeforge show moe": None,
    "moeforge verify moe": None,
    "moeforge export model.gguf --to hf -o model": "model",
    "moeforge upcycle model.gguf --method split --granularity 4 --experts 32 --top-k 8 -o fine": "fine",
    'moeforge generate moe "The with statement is used to" -n 24': None,
}
"""Examples that are run as they stand, in this order -> the artifact that each leaves."""


def stages(line):
    """[verb, words after it] of every stage of a pipe; where the last one's answer goes is the shell's."""
    words, found = shlex.split(line), [[]]
    if words[-2:-1] == [">"]:
        words = words[:-2]
    for word in words:
        if word == "|":
            found.append([])
        else:
            found[-1].append(word)
    assert all(stage[0] == "moeforge" for stage in found), line
    return [(stage[1], stage[2:]) for stage in found]


def options(verb, words):
    """What the command makes of a command line, up to the point where it would read SRC."""
    with cli.forge.make_context("moeforge", [verb, *words], resilient_parsing=False) as parent:
        command = cli.forge.get_command(parent, verb)
        with command.make_context(verb, list(words), parent=parent) as ctx:
            given = {name: value for name, value in ctx.params.items()
                     if ctx.get_parameter_source(name).name != "DEFAULT"}  # fmt: skip
            sources, positional = launch.split_words(command, given.pop("places", ()))
            return sources, launch.choose(command, {**given, **positional})


@pytest.mark.parametrize("verb", [entry.name for entry in VERBS])
def test_the_help_of_a_verb_shows_its_examples(verb):
    shown = run(verb, "--help", check=True).out
    lines = [line for name, line in EXAMPLES if name == verb]
    assert lines
    assert all(f"\n    {line}\n" in shown for line in lines)


@pytest.mark.parametrize(("verb", "line"), EXAMPLES)
def test_an_example_parses_and_uses_its_verb(verb, line):
    assert verb in [name for name, _ in stages(line)]
    for place, (name, words) in enumerate(stages(line)):
        sources, chosen = options(name, words)
        # the first stage names its source, the others read the pipe; plan takes a model as an option does, and measures without one
        model, measures = (getattr(chosen.options, option, None) for option in ("model", "calibrate"))
        piped = None in sources or (model == "-" and not measures)
        assert piped == (place > 0)


def test_the_parser_of_these_tests_refuses_what_is_wrong():
    with pytest.raises(Exception, match="--expert"):
        options("upcycle", ["org/dense", "--expert", "8"])
    with pytest.raises(Exception, match="--top-k 0"):
        options("upcycle", ["org/dense", "--top-k", "0"])


@pytest.fixture
def here(tiny_with_tokenizer, tmp_path, monkeypatch):
    """A working directory with the files that the examples name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEFORGE_HOME", str(tmp_path / "home"))
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "dense").symlink_to(tiny_with_tokenizer)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert cli.forge.main(["export", "org/dense", "--to", "gguf", "-o", "gguf"], "moeforge", standalone_mode=False) == 0
    next((tmp_path / "gguf").glob("*.gguf")).rename(tmp_path / "model.gguf")
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_examples_run_as_they_stand(here, capfd, monkeypatch):
    assert set(RUN) <= {line for _, line in EXAMPLES}
    for line, left in RUN.items():
        out = ""
        for verb, words in stages(line):
            capfd.readouterr()
            monkeypatch.setattr(sys, "stdin", io.StringIO(out))
            code = cli.forge.main([verb, *words], "moeforge", standalone_mode=False)
            out = capfd.readouterr().out
            assert code == 0, line
            assert out.strip(), line
        if left is not None:
            assert (here / left / MANIFEST).exists()
