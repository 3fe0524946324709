"""Shell completion as docs/completion.md describes it: the answers of the command, and bash's own use of them."""

import shutil
import subprocess

import pytest

from moeforge.registry import entries, find
from moeforge.testing.command import environment, moeforge_argv, run


def complete(line, shell="bash"):
    """What is offered for the last word of a command line, as the scripts ask for it, and what stderr said."""
    words = line.split(" ")
    typed = {"COMP_WORDS": line, "COMP_CWORD": words[-1] if shell == "fish" else str(len(words) - 1)}
    done = run(env={"_MOEFORGE_COMPLETE": f"{shell}_complete", **typed}, check=True)
    return done.out, done.err


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("moeforge ", {"completion", "plugins", *entries("moeforge.verbs")}),
        ("moeforge up", {"upcycle"}),
        ("moeforge upcycle --method ", set(entries("moeforge.upcycle"))),
        ("moeforge compress --method i", {"int8"}),
        ("moeforge upcycle --method split --gran", {"--granularity"}),
        ("moeforge upcycle --gran", set()),  # copy, the default method, has no such option
        ("moeforge export --to ", {"hf", "gguf", "mixlora", "moe-peft", "mola", "peft", "peft-experts", "moe"}),
        ("moeforge completion z", {"zsh"}),
    ],
)
def test_the_command_offers_what_fits(line, offered):
    out, _ = complete(line)
    assert out.split() == [f"plain,{word}" for word in out.replace("plain,", "").split()]
    assert set(out.replace("plain,", "").split()) == offered


@pytest.mark.parametrize("line", ["moeforge upcycle ./m", "moeforge diff ./m", "moeforge upcycle a -o ./m"])
def test_paths_are_left_to_the_shell(line):
    assert complete(line)[0].split() == ["file,./m"]


@pytest.mark.parametrize("line", ["moeforge upcycle --method drip --s", "moeforge upcycle --config none.toml --s"])
def test_a_line_that_is_still_wrong_is_completed_without_a_message(line):
    out, err = complete(line)
    assert "plain,--seed" in out.split()
    assert err == ""


@pytest.mark.parametrize(("shell", "answer"), [("zsh", "plain\nupcycle\n{}\n"), ("fish", "plain,upcycle\t{}\n")])
def test_other_shells_get_the_summary_too(shell, answer):
    summary = find("moeforge.verbs", "upcycle", "verb").load().summary
    assert complete("moeforge up", shell) == (answer.format(summary), "")


def test_bash_completes_through_the_printed_script(tmp_path):
    """The script itself, in a real bash; `moeforge` must be a command, since the script calls it by name."""
    (tmp_path / "moeforge").write_text(f'#!/bin/sh\nexec {" ".join(moeforge_argv())} "$@"\n')
    (tmp_path / "moeforge").chmod(0o755)
    script = """
        source <(moeforge completion bash)
        complete -p moeforge
        COMP_WORDS=(moeforge upcycle --method split --gr) COMP_CWORD=4 COMP_LINE="${COMP_WORDS[*]}" COMP_POINT=${#COMP_LINE}
        $(complete -p moeforge | sed -E 's/.*-F ([^ ]+).*/\\1/') moeforge
        echo "offered: ${COMPREPLY[*]}"
    """
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "--norc", "-c", script], capture_output=True, text=True, cwd=tmp_path,
                          env=environment(PATH=f"{tmp_path}:/usr/bin:/bin"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "complete -o nosort -F _moeforge_completion moeforge",
        "offered: --granularity",
    ]
