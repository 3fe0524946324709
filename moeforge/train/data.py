"""Text to train on: which documents there are, in which order, and which are held out. No torch.

A document is a reference (a file, a byte range, a table row) until it is read, so that a corpus need not fit in memory.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import BadInput, UsageProblem
from ..options import did_you_mean

TEXT = frozenset({".txt", ".md", ".rst", ".py"})
KINDS = TEXT | {".jsonl", ".parquet"}
PREFIX = "builtin:"
PIECE = 2_000
"""Aim, in characters, when a lone document has to be cut so that some of it can be held out."""

Content = str | list[dict[str, Any]]
"""Plain text, or chat messages (`[{"role": ..., "content": ...}, ...]`) for the tokenizer's chat template."""


@dataclass(frozen=True)
class Document:
    """One document: attention never crosses its borders."""

    key: str
    """Where it comes from, for messages: `notes.jsonl:12`."""
    size: int
    """Bytes, or an estimate; only for plans."""
    read: Callable[[], Content]
    changed: int = 0
    """Time of the file's last change in nanoseconds, where there is a file."""

    @property
    def identity(self) -> list[str | int]:
        """What tells this document from an edited one, cheaply."""
        return [self.key, self.size, self.changed]


def find_documents(specs: Sequence[str]) -> list[Document]:
    """Every document of the given sources, in a fixed order (files by name, then position within the file).

    A source is a file (.txt, .md, .rst, .py: one document; .jsonl: one a line, with `text` or `messages`; .parquet: one a
    row, with the same columns), a directory of such files, or `builtin:pydoc`, `builtin:stdlib`, `builtin:licenses`.

    Raises:
        UsageProblem: a source that does not exist or whose kind is unknown.
        BadInput: a file that is there but cannot be read, or sources without any document.
    """
    found = [document for spec in specs for document in _source(spec)]
    if not found:
        raise BadInput(f"--data {' '.join(specs)}: no documents in it; give text files of {', '.join(sorted(KINDS))}")
    return found


def _source(spec: str) -> Iterator[Document]:
    if spec.startswith(PREFIX):
        name = spec.removeprefix(PREFIX)
        if name not in BUILTINS:
            raise UsageProblem(f"--data {spec}: no built-in text {name!r}; {did_you_mean(name, BUILTINS)}")
        yield from BUILTINS[name]()
        return
    path = Path(spec).expanduser()
    if path.is_dir():
        yield from _directory(path, KINDS)
    elif path.is_file():
        if path.suffix not in KINDS:
            raise UsageProblem(f"--data {spec}: {path.suffix or 'no suffix'} is not a kind of text this reads; "
                               f"use {', '.join(sorted(KINDS))}, a directory of them, or {PREFIX}NAME")  # fmt: skip
        yield from _file(path)
    else:
        raise UsageProblem(f"--data {spec}: no such file or directory; give text files, a directory, or "
                           + ", ".join(PREFIX + name for name in BUILTINS))  # fmt: skip


def _directory(root: Path, kinds: frozenset[str]) -> Iterator[Document]:
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.suffix in kinds and not hidden and path.is_file():
            yield from _file(path)


def _file(path: Path) -> Iterator[Document]:
    if path.suffix == ".jsonl":
        yield from _lines(path)
    elif path.suffix == ".parquet":
        yield from _rows(path)
    else:
        yield _whole_file(path, str(path))


def _whole_file(path: Path, key: str) -> Document:
    status = path.stat()
    return Document(key, status.st_size, partial(_text, path), status.st_mtime_ns)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[Document]:
    """One document a non-empty line, found by a scan for line ends only."""
    offset, changed = 0, path.stat().st_mtime_ns
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Document(
                    f"{path}:{number}", len(line), partial(_json_line, path, number, offset, len(line)), changed
                )
            offset += len(line)


def _json_line(path: Path, number: int, offset: int, length: int) -> Content:
    with open(path, "rb") as file:
        file.seek(offset)
        line = file.read(length)
    try:
        return content_of(json.loads(line), f"{path}:{number}")
    except ValueError as error:
        raise BadInput(f"{path}:{number}: not JSON: {error}") from error


def _rows(path: Path) -> Iterator[Document]:
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports] - optional
    except ImportError:
        raise UsageProblem(
            f"--data {path}: reading .parquet needs pyarrow; pip install pyarrow, or give .jsonl"
        ) from None
    try:
        table = parquet.read_table(path, memory_map=True)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not a readable parquet file: {error}") from error
    columns = [name for name in ("text", "messages", "conversations") if name in table.column_names]
    if not columns:
        raise BadInput(f"{path}: its columns are {', '.join(table.column_names)}; one must be called text or messages")
    size, changed = table.nbytes // max(table.num_rows, 1), path.stat().st_mtime_ns
    for row in range(table.num_rows):
        read = partial(_table_row, table.select(columns), row, f"{path}:{row}")
        yield Document(f"{path}:{row}", size, read, changed)


def _table_row(table: Any, row: int, key: str) -> Content:
    return content_of(table.slice(row, 1).to_pylist()[0], key)


def content_of(record: Any, key: str) -> Content:
    """What a JSON or parquet record holds.

    Raises:
        BadInput: it has neither `text` (a string) nor `messages` (a list of role and content).
    """
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return record["text"]
        messages = record.get("messages") or record.get("conversations")
        if isinstance(messages, list) and all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
        ):
            return messages
    raise BadInput(f'{key}: a record needs "text": "..." or "messages": [{{"role": ..., "content": ...}}, ...]')


def _pydoc() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"pydoc:{name}", len(text), partial(str, text))


def _stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.glob("*.py")):
        yield _whole_file(path, f"stdlib:{path.name}")


def _licenses() -> Iterator[Document]:
    root = Path("/usr/share/common-licenses")
    if not root.is_dir():
        raise UsageProblem(f"--data {PREFIX}licenses: {root} is not on this machine (it comes with Debian and Ubuntu)")
    for path in sorted(p for p in root.iterdir() if p.is_file() and not p.is_symlink()):
        yield _whole_file(path, f"license:{path.name}")


BUILTINS: dict[str, Callable[[], Iterator[Document]]] = {"pydoc": _pydoc, "stdlib": _stdlib, "licenses": _licenses}
"""Real text that is on every machine: Python's reference prose, its library's source code, licence texts."""


def hold_out(documents: Sequence[Document], fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Split into (train, held out) by whole documents, chosen by `seed`; at least one on each side.

    A lone text is first cut at paragraph breaks. `fraction` 0 holds nothing out.

    Raises:
        UsageProblem: a single chat or a text too short to be cut.
    """
    if fraction == 0:
        return list(documents), []
    documents = list(documents)
    if len(documents) == 1:
        documents = _cut(documents[0])
    order = list(range(len(documents)))
    random.Random(f"{seed}/held-out").shuffle(order)
    count = min(max(round(fraction * len(documents)), 1), len(documents) - 1)
    chosen = set(order[:count])
    return (
        [d for i, d in enumerate(documents) if i not in chosen],
        [d for i, d in enumerate(documents) if i in chosen],
    )


def _cut(document: Document) -> list[Document]:
    """A lone text as pieces of about `PIECE` characters, cut at paragraph breaks where there are any."""
    content = document.read()
    pieces: list[str] = []
    if isinstance(content, str):
        breaker = "\n\n" if "\n\n" in content.strip() else "\n"
        for paragraph in content.split(breaker):
            if pieces and len(pieces[-1]) < PIECE:
                pieces[-1] += breaker + paragraph
            else:
                pieces.append(paragraph)
        pieces = [piece for piece in pieces if piece.strip()]
    if len(pieces) < 2:
        raise UsageProblem(f"--data {document.key}: one document only, too short to hold some of it out; give more text, or "
                           "pass --held-out 0 to train without a held-out loss")  # fmt: skip
    return [Document(f"{document.key}#{i}", len(piece), partial(str, piece)) for i, piece in enumerate(pieces)]
