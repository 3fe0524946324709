"""Which refusals a test has reached: every `raise` of a MoeforgeError in moeforge/ and plugins/, by coverage.py's data.

    python -m coverage run --rcfile tests/coverage/coverage.ini -m pytest
    python -m coverage combine --rcfile tests/coverage/coverage.ini
    python tests/coverage/refusals.py            # executed / all, and the places that no test has reached

A refusal is a statement that raises an instance of a subclass of MoeforgeError, whichever module defines it, or what a
function of ours returns that is annotated as one (`raise refusal(...)`). `--least 0.95` ends with 1 below that share.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("moeforge", "plugins")


def sources(root: Path = ROOT) -> dict[str, ast.Module]:
    """Path below the root -> syntax tree."""
    files = (path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py")))
    return {path.relative_to(root).as_posix(): ast.parse(path.read_text("utf-8")) for path in files}


def _last(node: ast.AST | None) -> str:
    """The last part of a dotted name: `errors.BadInput` -> `BadInput`; '' of anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def error_names(trees: Iterable[ast.Module]) -> set[str]:
    """MoeforgeError, its subclasses, and functions that are annotated to return one."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names, before = {"MoeforgeError"}, 0
    while len(names) > before:
        before = len(names)
        for node in nodes:
            if (isinstance(node, ast.ClassDef) and any(_last(base) in names for base in node.bases)) or (
                isinstance(node, ast.FunctionDef) and _last(node.returns) in names
            ):
                names.add(node.name)
    return names


def refusals(tree: ast.Module, names: set[str]) -> list[tuple[int, int]]:
    """(first, last line) of each statement that raises one of `names`, in the order of the file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and _last(node.exc.func) in names:
            found.append((node.lineno, node.end_lineno or node.lineno))
    return sorted(found)


def unreached(trees: Mapping[str, ast.Module], executed: Mapping[str, set[int]]) -> tuple[int, list[str]]:
    """How many refusals there are, and `file:line` of those of which no line was executed."""
    names, count, missing = error_names(trees.values()), 0, []
    for file, tree in trees.items():
        for first, last in refusals(tree, names):
            count += 1
            if executed.get(file, set()).isdisjoint(range(first, last + 1)):
                missing.append(f"{file}:{first}")
    return count, missing


def executed_lines(data_file: Path, root: Path = ROOT) -> dict[str, set[int]]:
    """Path below the root -> lines that ran."""
    from coverage.sqldata import CoverageData

    data = CoverageData(str(data_file))
    data.read()
    ran: dict[str, set[int]] = {}
    for file in data.measured_files():
        path = Path(file)
        name = (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
        ran[name] = set(data.lines(file) or ())
    return ran


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / ".coverage")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree that was measured")
    parser.add_argument("--least", type=float, default=0.0)
    words = parser.parse_args()
    if not words.data.exists():
        parser.error(f"{words.data}: no such file; measure first, as `--help` tells")
    count, missing = unreached(sources(words.root), executed_lines(words.data, words.root))
    for place in missing:
        print(place)
    print(f"{count - len(missing)} of {count} refusals executed ({(count - len(missing)) / count:.1%})")
    return int(1 - len(missing) / count < words.least)


if __name__ == "__main__":
    sys.exit(main())
