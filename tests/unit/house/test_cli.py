"""The command around the verbs: typed common options, broken plugins, and how a process ends."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, make_dataclass
from importlib.metadata import EntryPoint

import pytest

from moeforge import cli, registry
from moeforge.checkpoint import architectures
from moeforge.errors import BadInput, UsageProblem, tame
from moeforge.launch import choose, method_named
from moeforge.options import opt
from moeforge.registry import Entry
from moeforge.testing.command import environment, moeforge_argv, run
from moeforge.testing.models import save_tiny
from moeforge.verb import Verb


def verb(name="upcycle"):
    return Verb(registry.find("moeforge.verbs", name, "verb"))


@pytest.fixture
def config(tmp_path):
    def write(text):
        file = tmp_path / "r.toml"
        file.write_text(text)
        return file

    return write


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('dry_run = "no"', "--dry-run is on or off"),
        ("force = 1", "--force is on or off"),
        ('json = "yes"', "--json is on or off"),
        ("output = 5", "--output is a path"),
        ('progress = "bars"', "did you mean 'bar'"),
        ("quiet = []", "--quiet is on or off"),
        ("method = 5", "--method is a text"),
        ('config = "other.toml"', "unknown option 'config'"),
        ("debug = true", "unknown option 'debug'"),
        ("experts = inf", "not a valid int"),
        ("untie = nan", "finite"),
        ('outptu = "x"', "did you mean 'output'"),
        ("calibration = 5", "--calibration is a path"),
    ],
)
def test_a_config_file_is_as_typed_as_the_command_line(config, line, said):
    with pytest.raises(UsageProblem, match=said):
        choose(verb(), {"config": config(line + "\n")})


def test_a_value_that_does_not_fit_names_the_file_that_it_stands_in(config):
    for line in ('experts = "many"', "method = 5", "output = 5", 'max_memory = "lots"'):
        file = config(line + "\n")
        with pytest.raises(UsageProblem, match=f"--config {file}: --{line.split()[0].replace('_', '-')}"):
            choose(verb(), {"config": file})
    with pytest.raises(UsageProblem, match=r"--config .*r\.toml: --method"):
        method_named(str(config("method = 5\n")))
    assert choose(verb(), {"config": config('experts = "many"\n'), "experts": 6}).options.experts == 6


def test_common_options_of_a_file_reach_the_run_and_flags_win(config):
    file = config('dry_run = true\nforce = false\noutput = "here"\nprogress = "none"\nexperts = 6\n')
    chosen = choose(verb(), {"config": file, "force": True}).common
    assert (chosen.dry_run, chosen.force, str(chosen.output), chosen.progress) == (True, True, "here", "none")


def test_a_query_knows_no_output(config):
    with pytest.raises(UsageProblem, match="unknown option 'output'"):
        choose(verb("show"), {"config": config('output = "x"\n')})


def test_the_method_of_a_file_is_typed(config):
    assert method_named(str(config('method = "drop"\n'))) == "drop"
    with pytest.raises(UsageProblem, match="is a text"):
        method_named(str(config("method = 5\n")))


# -- plugins of others


@dataclass(frozen=True)
class NoOptions:
    pass


def plugin(**changes):
    """A Stage class that is right but for the changes; None takes an attribute away."""
    right = {
        "name": "mend", "summary": "mend it", "api_version": 1, "consumes": frozenset({"checkpoint"}),
        "produces": "checkpoint", "output": "directory", "default_method": None, "Options": NoOptions,
        "plan": lambda self, *a: None, "run": lambda self, *a: None,
    }  # fmt: skip
    return type("Mend", (), {name: value for name, value in {**right, **changes}.items() if value is not KeyError})


def fails(self):
    raise RuntimeError("no licence")


BROKEN = {
    "no Options": (plugin(Options=KeyError), "Mend has no Options"),
    "Options is no dataclass": (plugin(Options=int), "Mend.Options: TypeError"),
    "Options of an impossible type": (
        plugin(Options=make_dataclass("O", [("x", int | str, opt("x", default=1))], frozen=True)),
        "Mend.Options: TypeError",
    ),
    "Options that take a common name": (
        plugin(Options=make_dataclass("O", [("force", bool, opt("x", default=False))], frozen=True)),
        "redefines ['force']",
    ),
    "no summary": (plugin(summary=KeyError), "Mend has no summary"),
    "summary of a wrong type": (plugin(summary=5), "Mend.summary is 5"),
    "consumes of a wrong type": (plugin(consumes=["checkpoint"]), "Mend.consumes is"),
    "no plan": (plugin(plan=KeyError), "Mend has no plan"),
    "neither stage nor query": (plugin(run=KeyError), "Mend has no sources"),
    "a constructor that fails": (plugin(__init__=fails), "no licence"),
    "no class": ({"mend": 1}, "is no class"),
}


@pytest.fixture
def third_party(monkeypatch):
    real = registry.load_object

    def install(group, loaded, name="mend"):
        monkeypatch.setattr(registry, "_third_party", lambda: (Entry(group, name, "their:Mend", "moeforge-mend"),))
        monkeypatch.setattr(registry, "load_object", lambda target: loaded if target == "their:Mend" else real(target))

    return install


def command(capsys, *words):
    code = cli.forge.main(list(words), "moeforge", standalone_mode=False)
    assert code in (None, 0)
    return capsys.readouterr().out


def test_a_right_plugin_is_listed_as_such(third_party, capsys):
    third_party("moeforge.verbs", plugin())
    assert "mend it" in command(capsys, "--help")
    assert "broken" not in command(capsys, "plugins")


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_verb_is_listed_and_hurts_nobody_else(third_party, capsys, case):
    loaded, said = BROKEN[case]
    third_party("moeforge.verbs", loaded)
    shown = " ".join(command(capsys, "--help").split())
    assert "broken:" in shown
    assert "upcycle" in shown
    (line,) = [line for line in command(capsys, "plugins").splitlines() if "mend" in line.split()]
    assert "broken" in line
    assert said in line
    assert "--experts" in command(capsys, "upcycle", "--help")
    with pytest.raises(Exception, match="moeforge-mend"):
        cli.forge.main(["mend", "x"], "moeforge", standalone_mode=False)


@pytest.mark.parametrize("case", ["no Options", "no summary", "a constructor that fails"])
def test_a_broken_method_is_listed_and_hurts_nobody_else(third_party, capsys, case):
    third_party("moeforge.upcycle", BROKEN[case][0])
    assert "--experts" in command(capsys, "upcycle", "--help")
    (line,) = [line for line in command(capsys, "plugins").splitlines() if "mend" in line.split()]
    assert "broken" in line
    with pytest.raises(Exception, match="moeforge-mend"):
        cli.forge.main(["upcycle", "--method", "mend", "x"], "moeforge", standalone_mode=False)


def test_a_method_that_takes_an_option_of_its_verb_is_broken(third_party, capsys):
    options = make_dataclass("O", [("experts", int, opt("x", default=1))], frozen=True)
    third_party("moeforge.upcycle", plugin(reference="theirs", Options=options))
    (line,) = [line for line in command(capsys, "plugins").splitlines() if "mend" in line.split()]
    assert "redefines ['experts']" in line


@pytest.mark.parametrize(("loaded", "broken"), [({"layer": "x"}, False), ("/no/such.json", True), (5, True)])
def test_architectures_of_others_are_looked_at(third_party, capsys, loaded, broken):
    third_party(registry.ARCHITECTURES, loaded)
    (line,) = [line for line in command(capsys, "plugins").splitlines() if "mend" in line.split()]
    assert ("broken" in line) is broken


def test_a_broken_architecture_is_named_where_it_is_used(monkeypatch):
    broken = EntryPoint("their_lm", "no_such_module:table", registry.ARCHITECTURES)
    monkeypatch.setattr(architectures, "_third_party", lambda: [broken])
    with pytest.raises(BadInput, match=r"'their_lm' is described by .*, which is broken: ModuleNotFoundError"):
        architectures.architecture({"model_type": "their_lm"})


# -- how a process ends


def shell(script, **env):
    head = f'moeforge() {{ {" ".join(moeforge_argv())} "$@"; }}\n'
    return subprocess.run(["bash", "-c", head + script], capture_output=True, text=True, env=environment(**env))


def test_the_bare_command_shows_the_help_as_it_is():
    done = run()
    assert done.code == 2
    assert done.err == run("--help").out
    assert len(done.err.splitlines()) > 20


def test_sizes_in_the_help_are_sizes():
    (option,) = (param for param in verb().params if param.name == "max_shard_size")
    assert "[default: 5 GB]" in option.help


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["upcycle"], 3, ["stdin was empty", "no SRC was given", "stage before"]),
        (["show"], 3, ["stdin was empty", "no SRC was given"]),
        (["show", "-"], 3, ["stdin was empty: the stage before"]),
        (["generate", "moe"], 3, ["stdin was empty", "no SRC was given ('moe' was taken as PROMPT)"]),
        (["push", "org/moe"], 3, ["no SRC was given ('org/moe' was taken as REPO)"]),
        (["push", "moe"], 2, ["'moe' is not a Hub repository", "no SRC was given before it ('moe' was taken as REPO)"]),
        (["upcycle", "x", "--granularity", "4"], 2, ["'--granularity'", "--method split and --method shared have it"]),
        (["upcycle", "x", "--expert", "4"], 2, ["--experts", "--method btx has it"]),
        (["upcycle", "x", "--no-such"], 2, ["No such option '--no-such'"]),
    ],
)
def test_a_missing_source_and_another_methods_option_say_what_to_do(words, code, said):
    done = run(*words)
    assert done.code == code
    assert all(part in done.err for part in said), done.err
    assert len(done.err.splitlines()) == 1


def test_a_source_left_out_at_a_terminal_names_what_became_of_the_words(monkeypatch):
    monkeypatch.setattr(sys, "stdin", open_terminal := Terminal())
    assert open_terminal.isatty()
    with pytest.raises(UsageProblem, match=r"needs SRC .* \('moe' was taken as PROMPT\)"):
        verb("generate").main(["moe"], standalone_mode=False)


class Terminal:
    def isatty(self):
        return True


def test_what_a_config_holds_moves_no_cursor(tmp_path):
    dense = save_tiny(tmp_path / "dense", "llama")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"architectures": ["Llama\x1b[2J\x9b1mForCausalLM"]}))
    shown = run("show", dense, check=True).out
    assert "Llama\\x1b[2J\\x9b1mForCausalLM" in shown
    assert "\x1b" not in shown and len(shown.splitlines()) > 5
    assert tame("a\tb\n\u3000\r\x00") == "a\tb\n\u3000\\r\\x00"


def test_a_default_place_that_cannot_be_made_names_the_variable(tmp_path):
    dense = save_tiny(tmp_path / "dense", "llama")
    failed = run("export", dense, "--to", "hf", env={"MOEFORGE_HOME": "/proc/x"})
    assert failed.code == 2
    assert "MOEFORGE_HOME /proc/x/artifacts" in failed.err and "choose another MOEFORGE_HOME" in failed.err
    assert "-o" not in failed.err.split()


@pytest.mark.parametrize(("where", "how"), [("dense/in", "lies inside"), ("dense", "is"), (".", "contains")])
def test_a_dry_run_refuses_the_places_that_a_run_refuses(tmp_path, where, how):
    dense = save_tiny(tmp_path / "dense", "llama")
    for words in ((), ("--dry-run",)):
        refused = run("export", dense, "--to", "hf", "-o", tmp_path / where, *words)
        assert refused.code == 2 and f" {how} {dense}, which this run reads" in refused.err, refused.err


def test_debug_adds_a_traceback_and_keeps_the_exit_code():
    for words in (["show", "./nowhere"], ["upcycle", "x", "--experts", "1"]):
        plain, debug = run(*words), run(*words, "--debug")
        assert plain.code == debug.code != 1
        assert plain.err == debug.err.splitlines(keepends=True)[-1]
        assert "Traceback" in debug.err


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("moeforge show ./nowhere >&-", 141, "stdout is closed"),
        ("moeforge plugins >&-", 141, "stdout is closed"),
        ("moeforge show ./nowhere 2>&-", 3, ""),
        ("moeforge show ./nowhere 2>/dev/full", 3, ""),
        ("moeforge plugins >/dev/full", 5, "stdout: No space left"),
        ("moeforge show <&-", 3, "stdin is closed"),
        ("moeforge show '~no-such-user-here/x'", 3, "no such user"),
        ("moeforge show $(printf 'n%.0s' $(seq 5000))", 3, "no such file"),
        ("moeforge upcycle x -o '~no-such-user-here/x'", 2, "no such user"),
        ("moeforge upcycle x --prompts '~no-such-user-here/x' --router-init prompts", 2, "no such user"),
    ],
)
def test_odd_streams_and_paths_end_in_one_line_and_the_right_code(script, code, said):
    done = shell(script)
    assert done.returncode == code
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == bool(said)


@pytest.mark.parametrize(
    "words", ["plugins", "--help", "show --help", "completion bash", "show model", "show model --tensors"]
)
def test_a_reader_that_is_gone_is_no_failure(tmp_path, words):
    made = run("export", save_tiny(tmp_path / "dense", "llama"), "--to", "hf", "-o", tmp_path / "model", check=True)
    ends, starts = os.pipe()
    os.close(ends)
    argv = moeforge_argv(*(made.path if word == "model" else word for word in words.split()))
    done = subprocess.run(argv, stdout=starts, stderr=subprocess.PIPE, text=True, env=environment())
    os.close(starts)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_stream_is_not_taken_by_a_file(tmp_path):
    script = ("import os, sys; from moeforge.cli import _occupy_descriptors; closed = _occupy_descriptors()\n"
              f"file = os.open({str(tmp_path / 'weights')!r}, os.O_CREAT | os.O_WRONLY)\n"
              "os.write(file, f'{file > 2} {closed}'.encode()); print('noise')")  # fmt: skip
    subprocess.run(["bash", "-c", f'"{sys.executable}" -P -c "$0" <&- >&- 2>&-', script], env=environment(), check=True)
    assert (tmp_path / "weights").read_text() == "True True"
