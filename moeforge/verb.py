"""One verb as a click command: its options, those of the method that the command line names, help and completion.

Conversion and bounds are left to `options.build`, which the `--config` file shares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from . import registry
from .errors import UsageProblem
from .launch import COMMON, Common, launch, left_out, method_named
from .options import Bytes, Spec, format_bytes, specs
from .pipeline.stage import is_stage, page_of

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


class Verb(click.Command):
    """One verb: its options, and those of the one method that the command line names.

    Raises:
        UsageProblem: whoever provides the verb has broken it.
    """

    def __init__(self, entry: registry.Entry):
        self.entry = entry
        self.stage = entry.make()
        self.method_entry: registry.Entry | None = None
        self.method: Any = None
        self.is_stage = is_stage(type(self.stage))
        self.sources = 1 if self.is_stage else self.stage.sources
        self.has_methods = self.is_stage and self.stage.default_method is not None
        fields = specs(self.stage.Options)
        check_names(entry, fields, set(COMMON))
        self.positional = [s for s in fields if s.meta.get("kind") == "argument"]
        super().__init__(entry.name, params=self._params(fields), callback=None, help=self._help(),
                         short_help=self.stage.summary, epilog=_examples(self.stage))  # fmt: skip

    def _help(self) -> str:
        text = self.stage.summary[:1].upper() + self.stage.summary[1:] + ".\n\n"
        source = "SRC is a directory, a GGUF file, a Hub id (org/name[@revision]), or `-` for the reference on stdin."
        if self.sources == 0:
            source = ""
        elif self.sources == 2:
            source = "A and B are directories, GGUF files or Hub ids."
        for spec in self.positional:
            source += f" {spec.metavar}: {spec.meta['help']}."
        return text + source

    def _params(self, fields: list[Spec]) -> list[click.Parameter]:
        names = ["SRC"] if self.sources == 1 else [chr(ord("A") + i) for i in range(self.sources)]
        places = " ".join([f"[{n}]" if self.sources == 1 else n for n in names] + [s.metavar for s in self.positional])
        common = {spec.name: _option(spec, pair=False) for spec in specs(Common)}
        page = page_of(self.stage)
        common["output"].metavar = "FILE" if page or (self.is_stage and self.stage.output == "file") else "DIR"
        place = page or f"$MOEFORGE_HOME/artifacts/{self.entry.name}-KEY"
        common["output"].help = f"{common['output'].help} [default: {place}]"
        first: list[click.Parameter] = [click.Argument(["places"], nargs=-1, metavar=places, shell_complete=_files)]
        method = common.pop("method")
        if self.has_methods:
            group = f"moeforge.{self.stage.name}"
            method.help = (f"one of: {', '.join(registry.entries(group))}; `--method NAME --help` shows its own options "
                           f"[default: {self.stage.default_method}]")  # fmt: skip
            method._custom_shell_complete = _names(group)
            first.append(method)
        own = [_option(spec) for spec in fields if spec.meta.get("kind") != "argument"]
        return [*first, *own, *(p for name, p in common.items() if name not in left_out(self.stage))]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find the method first, add its options, then parse."""
        if self.has_methods:
            try:
                named = _peek(args, "--method") or method_named(_peek(args, "--config"))
                self._add_method(named or self.stage.default_method)
            except UsageProblem as error:
                if not ctx.resilient_parsing:
                    raise click.UsageError(str(error), ctx) from error
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if having := self._methods_with(error.option_name):
                told = f"{' and '.join(f'--method {name}' for name in having)} {'have' if having[1:] else 'has'} it"
                raise click.UsageError(f"{error.format_message().rstrip('.')}; {told}", ctx) from error
            raise

    def _methods_with(self, flag: str) -> list[str]:
        """The methods of this verb that have an option which the chosen one lacks."""
        found = []
        for name, providers in registry.entries(f"moeforge.{self.stage.name}").items() if self.has_methods else ():
            for entry in providers:
                # a broken one is reported where it is used or listed, not where another option was mistyped
                with contextlib.suppress(UsageProblem):
                    if any(flag in (spec.flag, f"--no-{spec.flag[2:]}") for spec in specs(entry.load().Options)):
                        found.append(name)
        return found

    def _add_method(self, name: str) -> None:
        entry = registry.find(f"moeforge.{self.stage.name}", name, f"{self.stage.name} method")
        method = entry.make()
        extra = specs(method.Options)
        check_names(entry, extra, {*COMMON, *(s.name for s in specs(self.stage.Options))})
        self.method_entry, self.method = entry, method
        at = next(i for i, p in enumerate(self.params) if p.name == "output")
        self.params[at:at] = [_option(s) for s in extra]
        self.epilog = f"Method {name}: {method.summary}. Source: {method.reference}.\n\n{self.epilog}"

    def invoke(self, ctx: click.Context) -> int:
        given = {name: value for name, value in ctx.params.items()
                 if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT}  # fmt: skip
        return launch(self, given)


def check_names(entry: registry.Entry, fields: list[Spec], taken: set[str]) -> None:
    """Refuse options whose names somebody else has.

    Raises:
        UsageProblem: names who provides them.
    """
    if clash := taken & {s.name for s in fields}:
        raise UsageProblem(f"{entry.name!r} of {entry.distribution} redefines {sorted(clash)}")


def _examples(stage: Any) -> str:
    """The stage's examples, for the end of its help, where a terminal stops scrolling."""
    shown = [f"  {command}\n      {why}" for command, why in getattr(stage, "examples", {}).items()]
    return "\n".join(["\b", "Examples:", *shown]) if shown else ""  # \b: click wraps nothing in this paragraph


def _option(spec: Spec, pair: bool = True) -> click.Option:
    """The click option of one dataclass field; `pair`: a truth value can also be turned off (`--no-NAME`)."""
    help_text = spec.meta.get("help", "")
    if spec.meta.get("unit"):
        help_text += f" ({spec.meta['unit']})"
    if spec.required:
        help_text += " [required]"
    elif spec.default not in (None, (), "") and (pair or spec.type is not bool):
        shown = ("on" if spec.default else "off") if spec.type is bool else spec.default
        if isinstance(shown, Bytes):
            shown = format_bytes(shown)
        help_text += f" [default: {', '.join(map(str, shown)) if isinstance(shown, tuple) else shown}]"
    if spec.many:
        help_text += " (may be repeated)"
    names = [spec.flag]
    if spec.type is bool and pair:
        names = [f"{spec.flag}/--no-{spec.flag[2:]}"]
    if spec.meta.get("short"):
        names.insert(0, spec.meta["short"])
    if spec.type is bool:
        return click.Option(names, default=None, is_flag=True, help=help_text)
    kinds: dict[type, Any] = {int: int, float: float, Path: click.Path(path_type=Path)}
    kind: Any = click.Choice(list(spec.choices)) if spec.choices else kinds.get(spec.type, str)
    metavar = spec.meta.get("metavar") or (None if spec.choices else {
        int: "N", float: "X", Path: "PATH"}.get(spec.type, "SIZE" if spec.type.__name__ == "Bytes" else "TEXT"))  # fmt: skip
    return click.Option(names, type=kind, multiple=spec.many, metavar=metavar, help=help_text,
                        shell_complete=_files if spec.reads else None)  # fmt: skip


def _files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Whatever the shell itself makes of a path."""
    return [CompletionItem(incomplete, type="file")]


def _names(group: str) -> Complete:
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in registry.entries(group) if name.startswith(incomplete)]

    return complete


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
