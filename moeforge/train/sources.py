"""One source of text to its documents: files, directories, tables, built-in texts, datasets of the Hub. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .. import texts
from ..errors import BadInput, UsageProblem
from . import hub_data
from .data import KINDS, Content, Document, Label


def documents_of(spec: str, field: str | None = None) -> Iterator[Document]:
    """The documents of one source, see :func:`moeforge.train.data.find_documents`.

    Args:
        field: what a record calls its label; then every line is read to find it.

    Raises:
        UsageProblem: it does not exist or its kind is unknown, or has no fields to look for a label in.
        BadInput: it is there but cannot be read, or a record has no such label.
    """
    if spec.startswith(texts.PREFIX):
        _refuse_field(spec, field)
        for text in texts.builtin(spec, "--data"):
            yield Document(text.key, text.size, text.read, text.changed)
        return
    path = Path(spec).expanduser()
    if path.is_dir():
        yield from _directory(path, field)
    elif path.is_file():
        if path.suffix not in KINDS:
            raise UsageProblem(f"--data {spec}: {path.suffix or 'no suffix'} is not a kind of text this reads; "
                               f"use {', '.join(sorted(KINDS))}, a directory of them, or {texts.PREFIX}NAME")  # fmt: skip
        yield from _file(path, None, field)
    elif (dataset := hub_data.parse(spec)) is not None:
        for file, key in hub_data.files(dataset):
            # the commit in the key says all about the content, the cached file's time nothing
            for document in _file(file, key, field):
                yield replace(document, changed=0)
    else:
        raise UsageProblem(f"--data {spec}: no such file or directory; give text files, a directory, a dataset of the Hub "
                           f"(org/name), or {', '.join(texts.NAMES)}")  # fmt: skip


def _refuse_field(source: str, field: str | None) -> None:
    if field is not None:
        raise UsageProblem(f"--label-field {field}: {source} is plain text, which has no fields; give .jsonl or .parquet, "
                           "or one --data source a label")  # fmt: skip


def _directory(root: Path, field: str | None) -> Iterator[Document]:
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.suffix in KINDS and not hidden and path.is_file():
            yield from _file(path, None, field)


def _file(path: Path, key: str | None, field: str | None) -> Iterator[Document]:
    """`key` names the file in messages and identities."""
    key = key or str(path)
    if path.suffix == ".jsonl":
        yield from _lines(path, key, field)
    elif path.suffix == ".parquet":
        yield from _rows(path, key, field)
    else:
        _refuse_field(key, field)
        text = texts.whole_file(path, key)
        yield Document(text.key, text.size, text.read, text.changed)


def _lines(path: Path, key: str, field: str | None) -> Iterator[Document]:
    """One document a non-empty line, found by a scan for line ends only, unless there are labels to be read."""
    offset, changed = 0, path.stat().st_mtime_ns
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{key}:{number}"
                label = 0 if field is None else label_of(_parsed(line, where), field, where)
                yield Document(where, len(line), partial(_json_line, path, where, offset, len(line)), changed, label)
            offset += len(line)


def _json_line(path: Path, key: str, offset: int, length: int) -> Content:
    with open(path, "rb") as file:
        file.seek(offset)
        line = file.read(length)
    return content_of(_parsed(line, key), key)


def _parsed(line: bytes, key: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise BadInput(f"{key}: not JSON: {error}") from error


def _rows(path: Path, key: str, field: str | None) -> Iterator[Document]:
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
    labels = table.column(field).to_pylist() if field in table.column_names else None
    for row in range(table.num_rows):
        where = f"{key}:{row}"
        found = {} if labels is None else {field: labels[row]}
        label = 0 if field is None else label_of(found, field, where)
        yield Document(where, size, partial(_table_row, table.select(columns), row, where), changed, label)


def _table_row(table: Any, row: int, key: str) -> Content:
    return content_of(table.slice(row, 1).to_pylist()[0], key)


def label_of(record: Any, field: str, key: str) -> Label:
    """What a record says that it is about.

    Raises:
        BadInput: it does not say.
    """
    label = record.get(field) if isinstance(record, dict) else None
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise BadInput(
            f"{key}: --label-field {field}: found {label!r} there; every record needs a whole number or a word"
        )
    return label


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
