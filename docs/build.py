"""Write the reference pages, docs/verbs/*.md and docs/README.md, from the classes that `--help` reads too.

    python docs/build.py            # write them
    python docs/build.py --check    # write nothing; name the pages that are out of date, and end with 1 if there are any

Summaries, examples and methods come from the registry, options from the dataclass fields, exit codes from the enum. Only
what this distribution provides is documented, whatever else is installed.
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from typing import Any

from moeforge import registry
from moeforge.errors import ExitCode
from moeforge.launch import Common, left_out
from moeforge.options import Bytes, Spec, format_bytes, specs
from moeforge.pipeline.stage import page_of
from moeforge.verb import Verb

ROOT = Path(__file__).resolve().parent.parent
DOCS = Path("docs")
MARK = "<!-- Written by docs/build.py from the classes in plugins/; change those, then run it. -->\n\n"
KINDS = {int: "whole number", float: "number", str: "text", Path: "path", Bytes: "size, such as `500MB` or `4GiB`"}
OPTION_HEAD = ("option", "value", "default", "what it does")


def pages() -> dict[Path, str]:
    """Every page that this script owns, by its path in the repository."""
    verbs = [Verb(entry) for entry in ours("moeforge.verbs")]
    found = {DOCS / "verbs" / f"{verb.name}.md": verb_page(verb) for verb in verbs}
    return {**found, DOCS / "README.md": index(verbs)}


def ours(group: str) -> list[registry.Entry]:
    return [
        entry for found in registry.entries(group).values() for entry in found if entry.distribution == registry.OURS
    ]


def methods(verb: Verb) -> list[registry.Entry]:
    return ours(f"moeforge.{verb.name}")


def verb_page(verb: Verb) -> str:
    stage = verb.stage
    package = verb.entry.target.partition(".")[0]
    parts = [
        f"# moeforge {verb.name}",
        f"{sentence(stage.summary)} Takes: {', '.join(sorted(stage.consumes))}. {makes(verb)}",
        f"When to use it, when not, and measured results: [plugins/{package}](../../plugins/{package}/README.md).",
        "## Examples",
        "```sh\n" + "\n".join(f"# {why}\n{command}" for command, why in stage.examples.items()) + "\n```",
        "## Arguments",
        arguments(verb),
        "## Options",
        options_table([spec for spec in specs(stage.Options) if spec not in verb.positional]),
    ]
    if entries := methods(verb):
        parts += ["## Methods", f"Chosen by `--method`; without it, `{stage.default_method}`."]
        for entry in entries:
            parts += method(entry)
    parts += ["## Options of every verb", common_table(verb), "## Exit codes", exit_codes()]
    return MARK + "\n\n".join(parts) + "\n"


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def makes(verb: Verb) -> str:
    if (page := page_of(verb.stage)) is not None:
        return f"Answers on stdout and writes one page, `{page}`."
    if not verb.is_stage:
        return "Answers on stdout and writes nothing."
    return f"Makes: {verb.stage.produces} (a {verb.stage.output})."


def arguments(verb: Verb) -> str:
    if verb.sources == 1:
        rows = [
            (
                "SRC",
                "a directory, a GGUF file, a Hub id (`org/name[@revision]`), or `-`; left out: the reference on stdin",
            )
        ]
    elif verb.sources == 0:
        rows = []
    else:
        rows = [(name, "a directory, a GGUF file or a Hub id") for name in ("A", "B")]
    rows += [(spec.metavar, spec.meta["help"]) for spec in verb.positional]
    return rows_table(("argument", "what it is"), [(f"`{name}`", text) for name, text in rows])


def method(entry: registry.Entry) -> list[str]:
    found = entry.load()
    fields = specs(found.Options)
    return [
        f"### `{entry.name}`",
        f"{sentence(found.summary)} Source: {found.reference}.",
        options_table(fields) if fields else "It has no options of its own.",
    ]


def options_table(fields: list[Spec]) -> str:
    if not fields:
        return "It has none of its own."
    rows = [(names(spec), value(spec), default(spec), what(spec)) for spec in fields]
    return rows_table(OPTION_HEAD, rows)


def names(spec: Spec, pair: bool = True) -> str:
    short = f"`{spec.meta['short']}`, " if spec.meta.get("short") else ""
    off = f" `--no-{spec.flag[2:]}`" if spec.type is bool and pair else ""
    return f"{short}`{spec.flag}`{off}"


def value(spec: Spec) -> str:
    """Type, unit and bounds in words."""
    if spec.choices is not None:
        text = " ".join(f"`{choice}`" for choice in spec.choices)
    elif spec.type is bool:
        text = "on or off"
    else:
        text = KINDS[spec.type]
    if spec.meta.get("unit") and spec.type is not Bytes:
        text += f", in {spec.meta['unit']}"
    low, high = spec.meta.get("min"), spec.meta.get("max")
    if low is not None and high is not None:
        text += f", {low:g} to {high:g}"
    elif low is not None:
        text += f", at least {low:g}"
    elif high is not None:
        text += f", at most {high:g}"
    return text + (", may be repeated" if spec.many else "")


def default(spec: Spec) -> str:
    if spec.required:
        return "required"
    given: Any = spec.default
    if given is None or given == ():
        return "unset"
    if spec.type is bool:
        return "on" if given else "off"
    if isinstance(given, Bytes):
        return format_bytes(given)
    return f"`{', '.join(map(str, given)) if spec.many else given}`"


def what(spec: Spec) -> str:
    note = "" if spec.meta.get("affects_output", True) else " (the result is the same)"
    return spec.meta["help"] + note


def common_table(verb: Verb) -> str:
    """What the command line itself adds to every verb."""
    unused = {"method"} | left_out(verb.stage)
    place = {"output": f"`{page_of(verb.stage) or f'$MOEFORGE_HOME/artifacts/{verb.name}-KEY'}`"}
    shown = [spec for spec in specs(Common) if spec.name not in unused]
    rows = [(names(s, pair=False), value(s), place.get(s.name) or default(s), what(s)) for s in shown]
    return rows_table(OPTION_HEAD, rows)


def exit_codes() -> str:
    """The members of the enum, each with the docstring that stands under it."""
    body = ast.parse(inspect.getsource(ExitCode)).body[0].body
    rows = []
    for member, doc in zip(body, body[1:], strict=False):
        if isinstance(member, ast.Assign) and isinstance(doc, ast.Expr):
            rows.append((str(ast.literal_eval(member.value)), ast.literal_eval(doc.value)))
    assert len(rows) == len(ExitCode), "every exit code needs a docstring"
    return rows_table(("code", "meaning"), rows)


def rows_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def index(verbs: list[Verb]) -> str:
    """docs/README.md: the verbs, then every other page under its own title."""
    rows = []
    for verb in verbs:
        names = " ".join(f"`{entry.name}`" for entry in methods(verb))
        rows.append((f"[`{verb.name}`](verbs/{verb.name}.md)", verb.stage.summary, names))
    others = sorted(path for path in (ROOT / DOCS).glob("*.md") if path.name != "README.md")
    parts = [
        "# Documentation",
        "New here? The [README](../README.md) shows the pipe, [a notebook](../examples/tutorial.ipynb) walks through it on a real model.",
        "## Verbs",
        rows_table(("verb", "does", "methods"), rows),
        "## Pages",
        "\n".join(f"- [{title(path)}]({path.name})" for path in others),
        "## To copy from",
        "\n".join(f"- [{title(path)}](../{path.relative_to(ROOT)})" for path in sorted((ROOT / "examples").glob("*/README.md"))),
    ]  # fmt: skip
    return MARK + "\n\n".join(parts) + "\n"


def title(path: Path) -> str:
    """The first heading of a page."""
    return next(line[2:] for line in path.read_text("utf-8").splitlines() if line.startswith("# "))


def outdated(written: dict[Path, str]) -> list[Path]:
    """Pages that are missing, differ, or document a verb that is gone."""
    held = {path: (ROOT / path).read_text("utf-8") if (ROOT / path).exists() else None for path in written}
    stale = [
        path.relative_to(ROOT) for path in (ROOT / DOCS / "verbs").glob("*.md") if path.relative_to(ROOT) not in written
    ]
    return [path for path, text in held.items() if text != written[path]] + stale


def main() -> None:
    written = pages()
    wrong = outdated(written)
    for path in wrong:
        print(path)
    if "--check" in sys.argv[1:]:
        sys.exit(bool(wrong))
    (ROOT / DOCS / "verbs").mkdir(exist_ok=True)
    for path in wrong:
        if path in written:
            (ROOT / path).write_text(written[path], "utf-8")
        else:
            (ROOT / path).unlink()


if __name__ == "__main__":
    main()
