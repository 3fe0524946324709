"""One source of text to its documents: files, directories, tables, built-in texts, datasets of the Hub. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .. import texts
from ..errors import BadInput, UsageProblem
from . import hub_data
from .data import KINDS, Content, Document


def documents_of(spec: str) -> Iterator[Document]:
    """The documents of one source, see :func:`moeforge.train.data.find_documents`.

    Raises:
        UsageProblem: it does not exist or its kind is unknown.
        BadInput: it is there but cannot be read.
    """
    if spec.startswith(texts.PREFIX):
        for text in texts.builtin(spec, "--data"):
            yield Document(text.key, text.size, text.read, text.changed)
        return
    path = Path(spec).expanduser()
    if path.is_dir():
        yield from _directory(path)
    elif path.is_file():
        if path.suffix not in KINDS:
            raise UsageProblem(f"--data {spec}: {path.suffix or 'no suffix'} is not a kind of text this reads; "
                               f"use {', '.join(sorted(KINDS))}, a directory of them, or {texts.PREFIX}NAME")  # fmt: skip
        yield from _file(path)
    elif (dataset := hub_data.parse(spec)) is not None:
        for file, key in hub_data.files(dataset):
            # the commit in the key says all about the content, the cached file's time nothing
            for document in _file(file, key):
                yield Document(document.key, document.size, document.read)
    else:
        raise UsageProblem(f"--data {spec}: no such file or directory; give text files, a directory, a dataset of the Hub "
                           f"(org/name), or {', '.join(texts.NAMES)}")  # fmt: skip


def _directory(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.suffix in KINDS and not hidden and path.is_file():
            yield from _file(path)


def _file(path: Path, key: str | None = None) -> Iterator[Document]:
    """`key` names the file in messages and identities."""
    key = key or str(path)
    if path.suffix == ".jsonl":
        yield from _lines(path, key)
    elif path.suffix == ".parquet":
        yield from _rows(path, key)
    else:
        text = texts.whole_file(path, key)
        yield Document(text.key, text.size, text.read, text.changed)


def _lines(path: Path, key: str) -> Iterator[Document]:
    """One document a non-empty line, found by a scan for line ends only."""
    offset, changed = 0, path.stat().st_mtime_ns
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{key}:{number}"
                yield Document(where, len(line), partial(_json_line, path, where, offset, len(line)), changed)
            offset += len(line)


def _json_line(path: Path, key: str, offset: int, length: int) -> Content:
    with open(path, "rb") as file:
        file.seek(offset)
        line = file.read(length)
    try:
        return content_of(json.loads(line), key)
    except ValueError as error:
        raise BadInput(f"{key}: not JSON: {error}") from error


def _rows(path: Path, key: str) -> Iterator[Document]:
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports] - optional
    except ImportError:
        raise UsageProblem(
            f"--data {key}: reading .parquet needs pyarrow; pip install 'moeforge[parquet]', or give .jsonl"
        ) from None
    try:
        table = parquet.read_table(path, memory_map=True)
    except (OSError, ValueError) as error:
        raise BadInput(f"{key}: not a readable parquet file: {error}") from error
    columns = [name for name in ("text", "messages", "conversations") if name in table.column_names]
    if not columns:
        raise BadInput(f"{key}: its columns are {', '.join(table.column_names)}; one must be called text or messages")
    size, changed = table.nbytes // max(table.num_rows, 1), path.stat().st_mtime_ns
    for row in range(table.num_rows):
        where = f"{key}:{row}"
        yield Document(where, size, partial(_table_row, table.select(columns), row, where), changed)


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
