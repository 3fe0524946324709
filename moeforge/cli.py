"""The `moeforge` command. Verbs and methods are found by name and imported only when they are used; nothing here
imports torch.

Inside a verb the order is: parse flags, check them, read stdin, plan, and only then import what computes.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from . import __version__, registry
from .errors import ExitCode, MoeforgeError, UsageProblem, one_line
from .launch import COMMON
from .options import specs
from .pipeline.ranks import here
from .verb import Verb, check_names

PATIENCE_S = 5
"""How long a process that is not the first of several waits for that one to say what went wrong."""


@contextlib.contextmanager
def _noticing_a_reader_that_is_gone() -> Iterator[None]:
    """click itself would end with code 1, which means that the work failed."""
    try:
        yield
    except BrokenPipeError as error:
        raise click.exceptions.Exit(ExitCode.READER_GONE) from error


class Forge(click.Group):
    """The verbs, listed without importing them until their summary is needed."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _noticing_a_reader_that_is_gone():  # --help prints here
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _noticing_a_reader_that_is_gone():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*registry.entries("moeforge.verbs"), *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        try:
            return Verb(registry.find("moeforge.verbs", cmd_name, "verb"))
        except UsageProblem as error:
            if ctx.resilient_parsing:
                return None
            raise click.UsageError(str(error), ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        verbs = registry.entries("moeforge.verbs")
        for name in self.list_commands(ctx):
            known = [entry.summary for entry in verbs.get(name, ())]
            if len(known) == 1 and known[0]:
                rows.append((name, known[0]))
                continue
            try:
                command = self.get_command(ctx, name)
            except click.UsageError as error:
                rows.append((name, f"broken: {error.message}"))
                continue
            if command is not None:
                rows.append((name, command.get_short_help_str(limit=90)))
        with formatter.section("Verbs"):
            formatter.write_dl(rows)


@click.group(cls=Forge, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="moeforge")
def forge() -> None:
    """Turn the checkpoint you have into the mixture of experts you want, and ship it.

    \b
      moeforge upcycle SRC | moeforge tune --data D | moeforge compress | moeforge push ORG/NAME

    Every verb takes an artifact (a directory, a GGUF file, a Hub id, or the reference that the verb before it printed)
    and prints one line: a reference to what it made. Progress goes to stderr. `moeforge VERB --help` explains a verb.

    Exit codes: 0 done, 1 failed, 2 usage, 3 bad input, 4 a check refused, 5 the machine lacks something, 130
    interrupted, 141 the next stage is gone.
    """


@forge.command()
@click.option("--json", "as_json", is_flag=True, help="one line of JSON")
def plugins(as_json: bool) -> None:
    """List verbs, methods and architectures, who provides them, and what is broken."""
    rows = []
    for group in registry.groups():
        for name, providers in registry.entries(group).items():
            for entry in providers:
                try:
                    state = _summary(entry)
                except UsageProblem as error:
                    state = f"broken: {error}"
                rows.append({"group": group, "name": name, "from": entry.distribution, "summary": state})
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        click.echo(f"{row['group'].removeprefix('moeforge.'):<14} {row['name']:<12} {row['from']:<16} {row['summary']}")


def _summary(entry: registry.Entry) -> str:
    """What an entry is for; as thorough about what is broken as using it would be."""
    if entry.group == "moeforge.verbs":
        return Verb(entry).stage.summary
    if entry.group in registry.DESCRIPTIONS:
        entry.load()
        return ""
    made, verb = entry.make(), entry.group.removeprefix("moeforge.")
    if verb in registry.entries("moeforge.verbs"):
        stage = registry.find("moeforge.verbs", verb, "verb").load()
        check_names(entry, specs(made.Options), {*COMMON, *(s.name for s in specs(stage.Options))})
    return made.summary


@forge.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell: `source <(moeforge completion bash)`."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(forge, {}, "moeforge", "_MOEFORGE_COMPLETE").source())


def _find_our_packages() -> None:
    """In a bare checkout (`python -m moeforge` with nothing installed) make kernels/ and plugins/ importable."""
    root = Path(__file__).resolve().parent.parent
    if importlib.util.find_spec("moeforge_upcycle") is None and (root / "plugins" / "moeforge_upcycle").is_dir():
        sys.path += [str(root / "plugins"), str(root / "kernels")]


def main() -> None:
    """Entry point of the `moeforge` command: every failure becomes one line on stderr and an exit code."""
    _find_our_packages()
    # Threads that wait by spinning take the cores from the pipe's other stages: a proof took 4 times as long on a busy
    # machine. It must be set before torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "moeforge")
    if _occupy_descriptors():
        told = "stdout is closed, so nobody would read the result; send it to /dev/null"
        raise SystemExit(_tell(verb, told, ExitCode.READER_GONE))
    try:
        code = forge.main(prog_name="moeforge", standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:
        raise SystemExit(_ending(verb, error)) from error
    raise SystemExit(code if isinstance(code, int) else ExitCode.OK)


def _occupy_descriptors() -> bool:
    """Fill descriptors 0, 1 and 2 where the caller closed them, lest a checkpoint's file take their place and what a library
    prints end up in it. Tells whether stdout was among them."""
    closed = []
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            made = os.open(os.devnull, os.O_RDWR)  # the lowest free one: this one, as those below it are taken
            if name != "stdin":
                setattr(sys, name, open(made, "w", encoding="utf-8"))  # noqa: SIM115 - for as long as the process lives
            closed.append(name)
    return "stdout" in closed


def _ending(verb: str, error: BaseException) -> int:
    """The exit code that `error` asks for, after its one line, and with --debug its traceback before that."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        _drop_stdout()
        return ExitCode.READER_GONE
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    rank = here()
    if rank.silent and isinstance(error, MoeforgeError | click.ClickException):
        # the first process says the same; the launcher ends it as soon as this one has ended, so it is given time to
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE_S)
        return error.exit_code if isinstance(error, MoeforgeError) else ExitCode.USAGE
    if rank.index:
        verb = f"{verb} (rank {rank.index})"
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt | click.exceptions.Abort):
        told = str(error.__cause__ or error)  # click puts an Abort in the place of what the signal handler raised
        return _tell(verb, told or "interrupted", ExitCode.INTERRUPTED)
    if isinstance(error, click.ClickException):
        return _tell(verb, error.format_message(), ExitCode.USAGE)
    if isinstance(error, MoeforgeError):
        return _tell(verb, str(error), error.exit_code)
    if isinstance(error, MemoryError):
        return _tell(verb, "out of memory; see --dry-run for the planned peak", ExitCode.MACHINE)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _drop_stdout()
        where = error.filename or "stdout"
        return _tell(verb, f"{where}: {error.strerror}; free some room and run it again", ExitCode.MACHINE)
    told = f"unexpected {type(error).__name__}: {error} (a bug: run again with --debug and report it)"
    return _tell(verb, told, ExitCode.FAILED)


def _drop_stdout() -> None:
    """The interpreter would flush stdout again on exit and print a second error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _tell(verb: str, message: str, code: ExitCode) -> int:
    # a stderr that cannot be written must not hide the exit code
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{verb}: error: {one_line(message)}\n")
        sys.stderr.flush()
    return int(code)
