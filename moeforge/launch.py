"""From a parsed command line to a run: options out of flags and file, sources out of words and stdin, then the verb."""

from __future__ import annotations

import select
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import click

from .errors import BadInput, UsageProblem, tame
from .options import Spec, build, did_you_mean, opt, read_toml, specs
from .pipeline.artifact import Artifact, as_line, locate, parse_line
from .pipeline.context import Context
from .pipeline.noise import tamed
from .pipeline.progress import Progress, mute
from .pipeline.ranks import here
from .pipeline.stage import Bound, is_stage, page_of
from .registry import Entry


class Command(Protocol):
    """What is known of a verb once its command line is parsed; see :class:`moeforge.verb.Verb`."""

    name: str | None
    entry: Entry
    stage: Any
    is_stage: bool
    method_entry: Entry | None
    method: Any
    sources: int
    """How many sources it takes."""
    positional: list[Spec]


@dataclass(frozen=True)
class Common:
    """The options that every verb has. No plugin's option may take their names."""

    method: str | None = opt("how it is done", default=None, metavar="NAME")
    output: Path | None = opt("where the result goes", default=None, short="-o")
    force: bool = opt(
        "replace an existing output, if moeforge wrote it or it is empty; of a symlink only the link", default=False
    )
    dry_run: bool = opt("print the plan (tensors, sizes, memory, verdicts); write nothing", default=False)
    json: bool = opt("print the result as one line of JSON, also on a terminal", default=False)
    config: Path | None = opt("read options from a file; flags win over it", default=None, metavar="FILE.toml")
    quiet: bool = opt("no progress and no messages, only warnings and errors", default=False, short="-q")
    progress: Literal["auto", "bar", "lines", "json", "none"] = opt("how progress is shown on stderr", default="auto")
    debug: bool = opt("show the traceback of an error", default=False)


COMMON = tuple(spec.name for spec in specs(Common))
OF_STAGES = frozenset({"method", "output", "force", "dry_run"})
"""Those of them that a query does not have."""
OF_PAGES = frozenset({"output", "force"})
"""Those of the latter that a query has all the same where it writes a page."""
ON_THE_LINE = frozenset({"config", "debug"})
"""Those of them that make no sense within a `--config` file."""


def left_out(stage: Any) -> frozenset[str]:
    """Names of the common options that a verb does not have."""
    if is_stage(type(stage)):
        return frozenset()
    return OF_STAGES - OF_PAGES if page_of(stage) is not None else OF_STAGES


@dataclass(frozen=True)
class Chosen:
    """Everything that flags, file and defaults say."""

    common: Common
    options: Any
    method: Bound | None


def choose(verb: Command, given: dict[str, Any]) -> Chosen:
    """Flags and arguments over the config file over defaults, each in its type.

    Raises:
        UsageProblem: an unknown name, or a value that does not fit.
    """
    path = given.get("config")
    written = read_toml(path) if path is not None else {}
    shared = {s.name: s for s in specs(Common) if s.name not in left_out(verb.stage)}
    mine = {s.name: s for s in specs(verb.stage.Options)}
    theirs = {s.name: s for s in specs(verb.method.Options)} if verb.method is not None else {}
    table = mine | theirs | shared
    known = sorted(set(table) - ON_THE_LINE)
    for name, value in written.items():
        if name not in known:
            raise UsageProblem(f"--config {path}: unknown option {name!r}: {did_you_mean(name, known)}")
        if name not in given:
            _check_written(path, table[name], value)
    values = {**written, **given}
    common = build(Common, {k: v for k, v in values.items() if k in shared})
    options = build(verb.stage.Options, {k: v for k, v in values.items() if k in mine})
    method = None
    if verb.method is not None and verb.method_entry is not None:
        bound = build(verb.method.Options, {k: v for k, v in values.items() if k in theirs})
        method = Bound(verb.method_entry.name, verb.method, bound)
    return Chosen(common, options, method)


def method_named(config: str | None) -> str | None:
    """The method that a `--config` file names."""
    found = {} if config is None else read_toml(Path(config))
    if "method" not in found:
        return None
    _check_written(config, next(spec for spec in specs(Common) if spec.name == "method"), found["method"])
    return found["method"]


def _check_written(path: object, spec: Spec, value: Any) -> None:
    """Refuse a value of a `--config` file that is not of its option's type.

    Raises:
        UsageProblem: names the file beside the option.
    """
    try:
        spec.convert(value)
    except UsageProblem as error:
        raise UsageProblem(f"--config {path}: {error}") from error


def split_words(verb: Command, words: tuple[str, ...]) -> tuple[list[str | None], dict[str, str]]:
    """The positional words as sources and arguments; a source of None is read from stdin."""
    required = sum(s.required for s in verb.positional)
    most = verb.sources + len(verb.positional)
    if len(words) > most:
        raise UsageProblem(
            f"{verb.name}: {len(words)} arguments given, at most {most} are taken: unexpected {words[most]!r}"
        )
    from_stdin = verb.sources == 1 and len(words) <= required
    sources: list[str | None] = [None] if from_stdin else list(words[: verb.sources])
    rest = words if from_stdin else words[verb.sources :]
    if len(sources) < verb.sources or len(rest) < required:
        names = " ".join([*(["SRC"] if verb.sources == 1 else ["A", "B"]), *(s.metavar for s in verb.positional)])
        raise UsageProblem(f"{verb.name} takes {names}, got {len(words)} arguments; see `moeforge {verb.name} --help`")
    return sources, {spec.name: word for spec, word in zip(verb.positional, rest, strict=False)}


def source(word: str | None, verb: str, taken: str = "") -> Artifact:
    """The artifact that a SRC word names; None and `-` read the reference from stdin.

    Args:
        taken: what became of the words that were given instead, for messages.

    Raises:
        BadInput: nothing came through stdin, or no reference did.
        UsageProblem: stdin is a terminal.
    """
    if word not in (None, "-"):
        return locate(str(word))
    if word is None and sys.stdin is not None and sys.stdin.isatty():
        raise UsageProblem(
            f"{verb} needs SRC (a directory, file or Hub id), or a reference piped in{taken}; see `moeforge {verb} --help`"
        )
    if sys.stdin is None:
        raise BadInput(f"no SRC was given{taken} and stdin is closed")
    text = sys.stdin.read()
    if word is None and not text.strip():
        raise BadInput(f"stdin was empty and no SRC was given{taken}: name a directory, a file or a Hub id; in a pipe, the stage "
                       "before printed no reference, see its message")  # fmt: skip
    return parse_line(text)


def _taken(words: list[str | None], positional: dict[str, str], verb: Command) -> str:
    """`moeforge generate moe` gives a PROMPT and no SRC, whatever was meant; say so."""
    named = {spec.name: spec.metavar for spec in verb.positional}
    told = ", ".join(f"{word!r} was taken as {named[name]}" for name, word in positional.items())
    return f" ({told})" if told and words == [None] else ""


def reader_alive() -> bool:
    """False when stdout is a pipe whose reading end is gone (Linux reports an error on the writing end)."""
    poll = select.poll()
    poll.register(1, 0)
    return not any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))


def launch(verb: Command, given: dict[str, Any]) -> int:
    """Run the verb; what it made goes to stdout, everything else to stderr.

    Args:
        given: what the command line says: parameter -> value, without defaults.

    Returns:
        The exit code.
    """
    from .pipeline import run as pipeline

    words, positional = split_words(verb, given.pop("places", ()))
    taken = _taken(words, positional, verb)
    try:
        chosen = choose(verb, {**given, **positional})
    except UsageProblem as error:
        if taken and any(repr(word) in str(error) for word in positional.values()):
            raise UsageProblem(f"{error}; no SRC was given before it{taken}") from error
        raise
    rank = here()
    if rank.world > 1:
        _check_team(verb, words, rank.world)
    # of several ranks the first one talks
    progress = Progress(verb.entry.name, chosen.common.progress, chosen.common.quiet, mute() if rank.index else None)
    ctx = Context(
        verb.entry.name,
        progress,
        pipeline.home(),
        resumes=verb.is_stage,
        _reader_check=None if rank.index else reader_alive,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stopper(ctx))
    sources = [source(word, verb.entry.name, taken) for word in words]
    with tamed(progress):
        return _stage(verb, chosen, sources[0], ctx) if verb.is_stage else _query(verb, chosen, sources, ctx)


def _check_team(verb: Command, words: list[str | None], world: int) -> None:
    """Refuse, under a launcher of several processes, what only one can do.

    Raises:
        UsageProblem: says which.
    """
    name = verb.entry.name
    if not hasattr(verb.stage, "follow"):
        raise UsageProblem(f"{name} runs in one process, and a launcher started {world}; start it without one")
    if any(word in (None, "-") for word in words):
        raise UsageProblem(f"{name}: {world} processes cannot all read SRC from stdin; name it on the command line")


def _query(verb: Command, chosen: Chosen, sources: list[Artifact], ctx: Context) -> int:
    from .pipeline.page import find_place, write_page
    from .pipeline.run import check_kind

    for src in sources:
        check_kind(verb.stage, src)
    name, place = page_of(verb.stage), None
    if name is not None:  # what cannot be written is told before the work
        place = find_place(chosen.common.output or Path(name), chosen.common.force, sources, chosen.options)
    answer = verb.stage.answer(sources, chosen.options, ctx)
    data = answer.data
    if place is not None:
        write_page(answer.page, place, chosen.common.force)
        data = data | {"page": str(place)}
    # what was found in a checkpoint may come from a stranger, and a terminal obeys it
    click.echo(as_line(data) if chosen.common.json else tame(answer.text + (f"\n{place}" if place is not None else "")))
    return answer.exit_code


def _stage(verb: Command, chosen: Chosen, src: Artifact, ctx: Context) -> int:
    from .pipeline.describe import describe_outcome, describe_plan
    from .pipeline.run import Request, follow_stage, plan_stage, run_stage

    common, progress = chosen.common, ctx.progress
    as_json = common.json or not sys.stdout.isatty()
    owners = tuple(e.distribution for e in (verb.entry, verb.method_entry) if e is not None)
    request = Request(verb.stage, chosen.options, chosen.method, common.output, common.force, owners)
    planned = common.dry_run or src.kind == "plan"
    if here().index:
        if not planned:
            follow_stage(request, src, ctx)
        return 0
    if planned:
        plan = plan_stage(request, src)
        for warning in plan.warnings:
            progress.warn(warning)
        if as_json:
            click.echo(Artifact("plan", "-", verb=verb.name, plan=plan.as_json()).line())
        for line in describe_plan(plan):
            if as_json:
                progress.say(line)
            else:
                click.echo(line)
        return 0
    outcome = run_stage(request, src, ctx)
    lines = describe_outcome(outcome)
    for line in lines if as_json else lines[1:]:
        progress.say(line)
    click.echo(outcome.artifact.line() if as_json else lines[0])
    return 0


def _stopper(ctx: Context) -> Any:
    def stop(signum: int, frame: Any) -> None:
        if ctx.interrupted:
            raise KeyboardInterrupt(f"interrupted; {ctx.way_on}")
        ctx.interrupted = True
        ctx.progress.stream.write(f"{ctx.verb}: stopping at the next safe point; press Ctrl-C again to stop at once\n")

    return stop
