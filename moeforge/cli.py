"""The `moeforge` command. Verbs and methods are found by name and imported only when they are used; nothing here
imports torch.

Inside a verb the order is: parse flags, check them, read stdin, plan, and only then import what computes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

import click

from . import __version__, registry
from .errors import BadInput, ExitCode, MoeforgeError, UsageProblem, one_line
from .options import Spec, build, did_you_mean, read_toml, specs
from .pipeline.artifact import Artifact, locate, parse_line
from .pipeline.context import Context
from .pipeline.progress import Progress
from .pipeline.stage import Bound, is_stage

COMMON = ("output", "force", "dry_run", "json", "config", "debug", "quiet", "progress", "method")
"""Names that every verb has; no plugin's option may take them."""


class Forge(click.Group):
    """The verbs, listed without importing them until their summary is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*registry.entries("moeforge.verbs"), *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        try:
            entry = registry.find("moeforge.verbs", cmd_name, "verb")
            return Verb(entry)
        except UsageProblem as error:
            if ctx.resilient_parsing:
                return None
            raise click.UsageError(str(error), ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            try:
                command = self.get_command(ctx, name)
            except click.UsageError as error:
                rows.append((name, f"broken: {error.message}"))
                continue
            if command is not None:
                rows.append((name, command.get_short_help_str(limit=90)))
        with formatter.section("Verbs"):
            formatter.write_dl(rows)


class Verb(click.Command):
    """One verb: its options, and those of the one method that the command line names."""

    def __init__(self, entry: registry.Entry):
        self.entry = entry
        self.stage = entry.load()()
        self.method_entry: registry.Entry | None = None
        self.method: Any = None
        self.is_stage = is_stage(type(self.stage))
        self.sources = 1 if self.is_stage else self.stage.sources
        self.positional = [s for s in specs(self.stage.Options) if s.meta.get("kind") == "argument"]
        super().__init__(entry.name, params=self._params(specs(self.stage.Options)), callback=None,
                         help=self._help(), short_help=self.stage.summary, epilog=_examples(self.stage))  # fmt: skip

    def _help(self) -> str:
        text = self.stage.summary[:1].upper() + self.stage.summary[1:] + ".\n\n"
        source = "SRC is a directory, a GGUF file, a Hub id (org/name[@revision]), or `-` for the reference on stdin."
        if self.sources == 2:
            source = "A and B are directories, GGUF files or Hub ids."
        for spec in self.positional:
            source += f" {_metavar(spec)}: {spec.meta['help']}."
        return text + source

    def _params(self, fields: list[Spec]) -> list[click.Parameter]:
        names = ["SRC"] if self.sources == 1 else [chr(ord("A") + i) for i in range(self.sources)]
        places = " ".join(
            [f"[{n}]" if self.sources == 1 else n for n in names] + [_metavar(s) for s in self.positional]
        )
        params: list[click.Parameter] = [click.Argument(["places"], nargs=-1, metavar=places)]
        if self.is_stage and self.stage.default_method is not None:
            methods = ", ".join(registry.entries(f"moeforge.{self.stage.name}"))
            params.append(click.Option(["--method"], metavar="NAME", help=f"one of: {methods}; "
                                       f"`--method NAME --help` shows its own options [default: {self.stage.default_method}]"))  # fmt: skip
        params += [_option(spec) for spec in fields if spec.meta.get("kind") != "argument"]
        if self.is_stage:
            what = "FILE" if self.stage.output == "file" else "DIR"
            params += [
                click.Option(["-o", "--output"], type=click.Path(path_type=Path), metavar=what,
                             help=f"where the result goes [default: $MOEFORGE_HOME/artifacts/{self.stage.name}-KEY]"),
                click.Option(["--force"], is_flag=True, help="replace an existing output"),
                click.Option(["--dry-run"], is_flag=True, help="print the plan (tensors, sizes, memory, verdicts); write nothing"),
            ]  # fmt: skip
        params += [
            click.Option(["--json"], is_flag=True, help="print the result as one line of JSON, also on a terminal"),
            click.Option(["--config"], type=click.Path(path_type=Path), metavar="FILE.toml",
                         help="read options from a file; flags win over it"),
            click.Option(["-q", "--quiet"], is_flag=True, help="no progress and no messages, only warnings and errors"),
            click.Option(["--progress"], type=click.Choice(["auto", "bar", "lines", "json", "none"]), default="auto",
                         help="how progress is shown on stderr [default: auto]"),
            click.Option(["--debug"], is_flag=True, help="show the traceback of an error"),
        ]  # fmt: skip
        return params

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find the method first, add its options, then parse."""
        if self.is_stage and self.stage.default_method is not None:
            name = _peek(args, "--method") or _method_in_config(_peek(args, "--config")) or self.stage.default_method
            try:
                self.method_entry = registry.find(f"moeforge.{self.stage.name}", name, f"{self.stage.name} method")
                self.method = self.method_entry.load()()
            except UsageProblem as error:
                raise click.UsageError(str(error), ctx) from error
            extra = specs(self.method.Options)
            taken = {*COMMON, *(s.name for s in specs(self.stage.Options))}
            if clash := taken & {s.name for s in extra}:
                raise click.UsageError(
                    f"method {name!r} of {self.method_entry.distribution} redefines {sorted(clash)}", ctx
                )
            at = next(i for i, p in enumerate(self.params) if p.name == "output")
            self.params[at:at] = [_option(s) for s in extra]
            self.epilog = f"Method {name}: {self.method.summary}. Source: {self.method.reference}.\n\n{self.epilog}"
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        given = {name: value for name, value in ctx.params.items()
                 if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT}  # fmt: skip
        return _run(self, ctx, given)


def _examples(stage: Any) -> str:
    """The stage's examples, for the end of its help, where a terminal stops scrolling."""
    shown = [f"  {command}\n      {why}" for command, why in getattr(stage, "examples", {}).items()]
    return "\n".join(["\b", "Examples:", *shown]) if shown else ""  # \b: click wraps nothing in this paragraph


def _metavar(spec: Spec) -> str:
    return spec.meta.get("metavar") or spec.name.upper().replace("_", "-")


def _option(spec: Spec) -> click.Option:
    """The click option of one dataclass field. Conversion and bounds are left to `options.build`, which TOML shares."""
    help_text = spec.meta.get("help", "")
    if spec.meta.get("unit"):
        help_text += f" ({spec.meta['unit']})"
    if spec.required:
        help_text += " [required]"
    elif spec.default not in (None, (), ""):
        shown = ("on" if spec.default else "off") if spec.type is bool else spec.default
        help_text += f" [default: {', '.join(map(str, shown)) if isinstance(shown, tuple) else shown}]"
    if spec.many:
        help_text += " (may be repeated)"
    names = [spec.flag]
    if spec.type is bool:
        names = [f"{spec.flag}/--no-{spec.flag[2:]}"]
    if spec.meta.get("short"):
        names.insert(0, spec.meta["short"])
    kinds: dict[type, Any] = {int: int, float: float, Path: click.Path(path_type=Path)}
    kind: Any = click.Choice(list(spec.choices)) if spec.choices else kinds.get(spec.type, str)
    metavar = spec.meta.get("metavar") or (None if spec.choices or spec.type is bool else {
        int: "N", float: "X", Path: "PATH"}.get(spec.type, "SIZE" if spec.type.__name__ == "Bytes" else "TEXT"))  # fmt: skip
    if spec.type is bool:
        return click.Option(names, default=None, help=help_text)
    return click.Option(names, type=kind, multiple=spec.many, metavar=metavar, help=help_text)


def _peek(args: list[str], flag: str) -> str | None:
    """The value of `flag` before the options are known; the last one wins, as in click."""
    found = None
    for i, word in enumerate(args):
        if word == "--":
            break
        if word == flag and i + 1 < len(args):
            found = args[i + 1]
        elif word.startswith(flag + "="):
            found = word.partition("=")[2]
    return found


def _method_in_config(path: str | None) -> str | None:
    return None if path is None else read_toml(Path(path)).get("method")


def _options(verb: Verb, given: dict[str, Any]) -> tuple[Any, Bound | None, dict[str, Any]]:
    """Stage options, bound method, and the common flags, from flags over config file over defaults."""
    common = {name: given.pop(name) for name in COMMON if name in given}
    values: dict[str, Any] = {}
    if common.get("config"):
        values = read_toml(common["config"])
        for name in ("output", "force", "dry_run", "json", "quiet", "progress"):
            if name in values:
                common.setdefault(name, Path(values.pop(name)) if name == "output" else values.pop(name))
        values.pop("method", None)
    values |= given
    mine = {s.name for s in specs(verb.stage.Options)}
    theirs = {s.name for s in specs(verb.method.Options)} if verb.method is not None else set()
    for name in values:
        if name not in mine | theirs:
            raise UsageProblem(
                f"--config {common['config']}: unknown option {name!r}: {did_you_mean(name, mine | theirs)}"
            )
    options = build(verb.stage.Options, {k: v for k, v in values.items() if k in mine})
    method = None
    if verb.method is not None and verb.method_entry is not None:
        bound = build(verb.method.Options, {k: v for k, v in values.items() if k in theirs})
        method = Bound(verb.method_entry.name, verb.method, bound)
    return options, method, common


def _places(verb: Verb, places: tuple[str, ...]) -> tuple[list[str | None], dict[str, str]]:
    """Split the positional words into sources and arguments; a source of None is read from stdin."""
    required = sum(s.required for s in verb.positional)
    most = verb.sources + len(verb.positional)
    if len(places) > most:
        raise UsageProblem(
            f"{verb.name}: {len(places)} arguments given, at most {most} are taken: unexpected {places[most]!r}"
        )
    words = list(places)
    from_stdin = verb.sources == 1 and len(words) <= required
    sources: list[str | None] = [None] if from_stdin else list(words[: verb.sources])
    rest = words if from_stdin else words[verb.sources :]
    if len(sources) < verb.sources or len(rest) < required:
        names = " ".join([*(["SRC"] if verb.sources == 1 else ["A", "B"]), *map(_metavar, verb.positional)])
        raise UsageProblem(f"{verb.name} takes {names}, got {len(places)} arguments; see `moeforge {verb.name} --help`")
    return sources, {spec.name: word for spec, word in zip(verb.positional, rest, strict=False)}


def _source(word: str | None, verb: str) -> Artifact:
    """The artifact that a SRC word names; None and `-` read the reference from stdin."""
    if word not in (None, "-"):
        return locate(str(word))
    if word is None and sys.stdin is not None and sys.stdin.isatty():
        raise UsageProblem(
            f"{verb} needs SRC (a directory, file or Hub id), or a reference piped in; see `moeforge {verb} --help`"
        )
    if sys.stdin is None:
        raise BadInput("no SRC was given and stdin is closed")
    return parse_line(sys.stdin.read())


def _reader_alive() -> bool:
    """False when stdout is a pipe whose reading end is gone (Linux reports an error on the writing end)."""
    poll = select.poll()
    poll.register(1, 0)
    return not any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))


def _run(verb: Verb, click_context: click.Context, given: dict[str, Any]) -> None:
    from .pipeline import run as pipeline

    sources, positional = _places(verb, given.pop("places", ()))
    options, method, common = _options(verb, {**given, **positional})
    progress = Progress(verb.entry.name, common.get("progress", "auto"), common.get("quiet", False))
    ctx = Context(verb.entry.name, progress, pipeline.home(), _reader_check=_reader_alive)
    signal.signal(signal.SIGINT, _stopper(ctx))
    signal.signal(signal.SIGTERM, _stopper(ctx))
    found = [_source(word, verb.entry.name) for word in sources]
    as_json = common.get("json", False) or not sys.stdout.isatty()

    if not verb.is_stage:
        for src in found:
            pipeline.check_kind(verb.stage, src)
        answer = verb.stage.answer(found, options, ctx)
        click.echo(json.dumps(answer.data) if common.get("json") else answer.text)
        click_context.exit(answer.exit_code)

    from .pipeline.describe import describe_outcome, describe_plan

    owners = tuple(e.distribution for e in (verb.entry, verb.method_entry) if e is not None)
    request = pipeline.Request(verb.stage, options, method, common.get("output"), common.get("force", False), owners)
    if common.get("dry_run") or found[0].kind == "plan":
        plan = pipeline.plan_stage(request, found[0])
        for warning in plan.warnings:
            progress.warn(warning)
        if as_json:
            click.echo(Artifact("plan", "-", verb=verb.name, plan=plan.as_json()).line())
        for line in describe_plan(plan):
            if as_json:
                progress.say(line)
            else:
                click.echo(line)
        return
    outcome = pipeline.run_stage(request, found[0], ctx)
    lines = describe_outcome(outcome)
    for line in lines if as_json else lines[1:]:
        progress.say(line)
    click.echo(outcome.artifact.line() if as_json else lines[0])
    sys.stdout.flush()


def _stopper(ctx: Context) -> Any:
    def stop(signum: int, frame: Any) -> None:
        if ctx.interrupted:
            raise KeyboardInterrupt
        ctx.interrupted = True
        sys.stderr.write(f"{ctx.verb}: stopping at the next safe point; press Ctrl-C again to stop at once\n")

    return stop


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
                    state = getattr(entry.load(), "summary", "")
                except UsageProblem as error:
                    state = f"broken: {error}"
                rows.append({"group": group, "name": name, "from": entry.distribution, "summary": state})
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        click.echo(f"{row['group'].removeprefix('moeforge.'):<14} {row['name']:<12} {row['from']:<16} {row['summary']}")


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
    debug = "--debug" in sys.argv
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "moeforge")
    try:
        code = forge.main(prog_name="moeforge", standalone_mode=False)
        raise SystemExit(code if isinstance(code, int) else ExitCode.OK)
    except BrokenPipeError:
        # The interpreter would flush stdout again on exit and print a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(ExitCode.READER_GONE) from None
    except (KeyboardInterrupt, click.exceptions.Abort):
        _fail(verb, "interrupted; run the same command again to resume", ExitCode.INTERRUPTED)
    except click.exceptions.Exit as stop:
        raise SystemExit(stop.exit_code) from None
    except click.ClickException as error:
        _fail(verb, error.format_message(), ExitCode.USAGE)
    except MoeforgeError as error:
        if debug:
            raise
        _fail(verb, str(error), error.exit_code)
    except MemoryError:
        if debug:
            raise
        _fail(verb, "out of memory; see --dry-run for the planned peak", ExitCode.MACHINE)
    except Exception as error:
        if debug:
            raise
        _fail(
            verb,
            f"unexpected {type(error).__name__}: {error} (a bug: run again with --debug and report it)",
            ExitCode.FAILED,
        )


def _fail(verb: str, message: str, code: ExitCode) -> None:
    sys.stderr.write(f"{verb}: error: {one_line(message)}\n")
    raise SystemExit(int(code))
