"""What `tune` measured while it ran, and `eval` at another time, read back from their files: a stranger may have written those."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeforge.checkpoint.folder import Folder
from moeforge.errors import BadInput
from moeforge.pipeline.artifact import read_manifest

METRICS = "tune/metrics.jsonl"
Shares = list[list[float]]


def find_training(directory: Path | None, manifest: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The newest tune of the lineage whose metrics are on this machine: the artifact's own, or those of an ancestor that still lies where
    the manifest says and is still the one that it was.

    Returns:
        `from` (a path), `steps` [[step, loss]], `held_out` [[step, loss]], `loads` (:func:`_load` of every measurement), `labels`
        (names), or None where there is none.

    Raises:
        BadInput: the file is there and is not what tune writes.
    """
    step = manifest
    while step is not None:
        if directory is not None and os.path.lexists(directory / METRICS):
            text = Folder(directory).read(METRICS).decode("utf-8", "replace")
            return {"from": str(directory), **read_metrics(text, f"{directory}/{METRICS}"), "labels": label_names(step)}
        parents = step.get("parents") or ()
        parent = parents[0] if parents else {}
        step = parent.get("manifest")
        directory = _still_there(parent.get("ref"), step)
    return None


def _still_there(ref: object, step: Mapping[str, Any] | None) -> Path | None:
    """The directory of an ancestor, if it is the recorded one."""
    if not isinstance(ref, str) or step is None or not os.path.isdir(ref):
        return None
    try:
        found = read_manifest(Path(ref))
    except BadInput:  # something else lies there now
        return None
    return Path(ref) if found is not None and found["digest"] == step.get("digest") else None


def label_names(step: Mapping[str, Any]) -> list[str]:
    """What the labels of a tune are called: by the records, or else its --data sources, one a label."""
    counts, options = step.get("counts") or {}, step.get("options") or {}
    names = counts.get("labels") or (
        [] if options.get("label_field") else counts.get("data") or options.get("data") or []
    )
    return [str(name) for name in names] if isinstance(names, list) else []


def read_metrics(text: str, where: str) -> dict[str, Any]:
    """`steps`, `held_out`, `loads` and, where a teacher was asked, `distances` of a metrics.jsonl.

    Raises:
        BadInput: names the line.
    """
    steps: list[list[float]] = []
    held_out: list[list[float]] = []
    distances: list[list[float]] = []
    loads: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
            event, step, loss = record["event"], record["step"], record["loss"]
            if type(step) is not int or not isinstance(loss, int | float) or not math.isfinite(loss):
                raise TypeError(f"step {step!r} and loss {loss!r}")
            if event == "step":
                steps.append([step, loss])
                if "kd" in record:
                    distances.append([step, _number(record["kd"])])
                said, title = record.get("routing"), f"training text, step {step}"
            else:
                held_out.append([step, loss])
                said, title = record, f"held-out text, step {step}"
            if said and said.get("load"):
                loads.append(_load(said, title))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"{where}, line {number}: not a record of tune ({type(error).__name__}: {error}); "
                           "restore the file or remove it") from error  # fmt: skip
    return {"steps": steps, "held_out": held_out, "loads": loads} | ({"distances": distances} if distances else {})


def _load(record: Mapping[str, Any], title: str) -> dict[str, Any]:
    """One measurement of the routers: `title`, `load` [L][E] shares, `sites` [L] names, `entropy` [L], `by_label` [L][labels][E].

    Raises:
        TypeError, ValueError: not of that shape.
    """
    load = shares(record["load"])
    sites = record.get("sites", [f"mixture {row}" for row in range(len(load))])
    found: dict[str, Any] = {"title": title, "load": load, "sites": [str(name) for name in sites]}
    found["entropy"] = [None if nats is None else _number(nats) for nats in record.get("entropy", [None] * len(load))]
    if "by_label" in record:
        found["by_label"] = [shares(rows) for rows in record["by_label"]]
    for name in ("sites", "entropy", "by_label"):
        if len(found.get(name, load)) != len(load):
            raise ValueError(f"{name} has {len(found[name])} layers, load {len(load)}")
    if any(len(row) != len(own) for own, rows in zip(load, found.get("by_label", ()), strict=False) for row in rows):
        raise ValueError("by_label and load have other numbers of experts")
    return found


def shares(rows: Any) -> Shares:
    """A table of numbers.

    Raises:
        TypeError: it is none.
    """
    return [[_number(value) for value in row] for row in rows]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is not a finite number")
    return float(value)


def lifts(by_label: list[Shares]) -> list[list[list[float | None]]]:
    """[labels][L][E]: an expert's share of a label's assignments over its mean share across labels, each label that was met counting the
    same. 1: no preference; None: a label that was not met, or an expert that nobody visits."""
    labels = max(map(len, by_label), default=0)
    return [[_lift(rows, label) for rows in by_label] for label in range(labels)]


def _lift(rows: Shares, label: int) -> list[float | None]:
    met = any(rows[label])
    return [share / mean if met and mean > 0 else None for share, mean in zip(rows[label], _means(rows), strict=True)]


def _means(rows: Shares) -> list[float]:
    """[E] over the labels that were met."""
    met = [row for row in rows if any(row)]
    return [sum(column) / len(met) for column in zip(*met, strict=True)] if met else [0.0] * len(rows[0])


def separations(by_label: list[Shares]) -> list[list[float | None]]:
    """[L][labels]: the share of a label's assignments that would have to go elsewhere for it to be routed as the mean of all labels is
    (total variation): 0 where experts do not care, towards 1 where every label has experts of its own. None: not met."""
    found: list[list[float | None]] = []
    for rows in by_label:
        means = _means(rows)
        found.append(
            [
                sum(abs(share - mean) for share, mean in zip(row, means, strict=True)) / 2 if any(row) else None
                for row in rows
            ]
        )
    return found


def read_eval(path: Path) -> dict[str, Any]:
    """The numbers of `moeforge eval --json > FILE`: its last line; where it watched the routers, `load` is what they did, and `labels` the
    sources of the text, by number.

    Raises:
        BadInput: it is no such file.
    """
    how = "write it with `moeforge eval REF --data SOURCE --json > FILE`"
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
        found = json.loads(lines[-1])
    except (OSError, ValueError, IndexError, RecursionError) as error:
        raise BadInput(
            f"--eval {path}: cannot be read as the answer of `moeforge eval --json` ({error}); {how}"
        ) from error
    if not isinstance(found, dict) or not {"loss", "lm_eval"} & found.keys():
        raise BadInput(
            f"--eval {path}: its last line is not the answer of `moeforge eval --json`: it has no loss and no lm_eval; {how}"
        )
    routing = found.pop("routing", None)
    if routing is None:
        return found
    try:
        load = _load(routing, f"evaluated text, {found.get('tokens')} tokens")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"--eval {path}: its `routing` is not what eval writes ({error}); {how}") from error
    return found | {"load": load, "labels": label_names({"counts": {"data": found.get("data")}})}
