"""`moeforge report REF`: one page about an artifact, to look at offline, and its numbers."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeforge import __version__
from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.anatomy import anatomy
from moeforge.checkpoint.base import Checkpoint
from moeforge.errors import BadInput, MachineLacks, UsageProblem
from moeforge.options import opt
from moeforge.pipeline.artifact import Artifact
from moeforge.pipeline.context import Context
from moeforge.pipeline.describe import describe_value
from moeforge.pipeline.manifest import whole
from moeforge.pipeline.reading import Decoding
from moeforge.pipeline.stage import Answer
from moeforge.report.html.page import page

from .drift import between_experts, from_parent
from .lineage import chosen, lineage, open_parent
from .measured import find_training, lifts, read_eval, separations

PAIRS = 32
"""Experts of a layer up to which the distance of every two of them is told."""


@dataclass(frozen=True)
class Options(Decoding):
    text: str | None = opt("show where every token of this text goes (runs the model)", default=None)
    text_file: Path | None = opt("the same of a file's beginning", default=None, metavar="FILE")
    max_tokens: int = opt("of the text, at most", default=256, min=1, unit="tokens")
    drift: bool = opt(
        "read the weights: how far each layer and expert is from the parent's, and experts from each other",
        default=True,
    )
    parent: str | None = opt("what to measure that from; unset: the recorded parent, if it is still on this machine", default=None,
                             metavar="REF", reads=True)  # fmt: skip
    eval: Path | None = opt("numbers to show: what `moeforge eval --json` answered", default=None, metavar="FILE")
    dtype: str | None = opt("float type to compute in; unset: the checkpoint's", default=None)
    device: str = opt("where to run: cpu, cuda, cuda:1, mps", default="cpu")

    def __post_init__(self) -> None:
        if self.text is not None and self.text_file is not None:
            raise UsageProblem("--text and --text-file are two texts; give one")
        if self.parent is not None and not self.drift:
            raise UsageProblem(f"--parent {self.parent} is what --no-drift leaves out; leave one of them out")


class Report:
    """What is known without reading weights, then what the weights say, then (with a text) what the routers say."""

    name = "report"
    summary = "write one self-contained page: lineage, sizes, loss, expert load, routing of a text, drift"
    examples = {
        "moeforge report tuned -o tuned.html": "everything that is on this machine; opens in any browser, offline",
        'moeforge report moe --text "def f(x): return x + 1"': "where each of these tokens goes, layer by layer",
    }
    api_version = 1
    consumes = frozenset({"checkpoint", "adapter", "gguf"})
    sources = 1
    page = "report.html"
    Options = Options

    def answer(self, sources: list[Artifact], options: Options, ctx: Context) -> Answer:
        (src,) = sources
        text = _text(options)
        numbers: dict[str, Any] = {
            "ref": src.ref,
            "kind": src.kind,
            "digest": src.digest,
            "moeforge": __version__,
            "missing": {},
        }
        numbers |= _origin(src) | {"sizes": _sizes(src, options, numbers["missing"])}
        numbers["training"] = find_training(src.path, src.manifest)
        numbers["eval"] = None if options.eval is None else read_eval(options.eval)
        numbers["tokens"] = None if text is None else _route(src, text, options, ctx)
        numbers["specialisation"] = _specialisation(numbers["eval"], numbers["training"], numbers["missing"])
        numbers |= _drift(src, options, ctx, numbers["missing"])
        numbers["missing"] = _absent(src, numbers) | numbers["missing"]
        return Answer(numbers, "\n".join(_told(numbers)), page=page(numbers))


def _text(options: Options) -> str | None:
    if options.text_file is None:
        return options.text
    try:
        # more than any tokenizer makes a token of; the rest of a large file is not read
        with open(options.text_file, encoding="utf-8", errors="replace") as file:
            return file.read(64 * options.max_tokens)
    except OSError as error:
        raise UsageProblem(f"--text-file {options.text_file}: cannot be read: {error.strerror}") from error


def _origin(src: Artifact) -> dict[str, Any]:
    """Lineage, newest first, each step with the options that were `chosen` (not the default)."""
    manifest = src.manifest or {}
    step = lineage(src.manifest)
    if step is not None:
        _mark(step)
    found = {name: manifest.get(name) for name in ("created", "versions", "timings", "warnings")}
    files = {name: info["bytes"] for name, info in manifest.get("files", {}).items()}
    present = None if src.path is None or not files else whole(src.path, manifest)
    return {"lineage": step, **found, "files": files, "files_present": present}


def _mark(step: dict[str, Any]) -> None:
    if "verb" in step:
        step["chosen"] = chosen(step)
    for parent in step.get("parents", ()):
        _mark(parent)


def _sizes(src: Artifact, options: Options, absent: dict[str, Any]) -> dict[str, Any] | None:
    try:
        with open_checkpoint(src.ref, allow_pickle=options.allow_pickle, dequantize=None) as checkpoint:
            return anatomy(checkpoint.config, checkpoint.tensors).as_json()
    except BadInput as error:
        if src.kind != "adapter":
            raise
        # an adapter is worth a page on a machine that lacks its base model
        absent["sizes"] = {"why": f"The base cannot be read here: {error}"}
        return None


def _route(src: Artifact, text: str, options: Options, ctx: Context) -> dict[str, Any]:
    import transformers

    from moeforge.model.compute import check_compute

    from .routes import route

    transformers.logging.set_verbosity_error()
    check_compute(options.device, options.dtype)
    with open_checkpoint(
        src.ref, allow_pickle=options.allow_pickle, dequantize=options.dequantize, compressed=True
    ) as checkpoint:
        return route(checkpoint, text, options.max_tokens, options.dtype, options.device, ctx)


def _specialisation(
    evaluated: Mapping[str, Any] | None, training: Mapping[str, Any] | None, absent: dict[str, Any]
) -> dict[str, Any] | None:
    """Of the evaluation, else of the newest measurement of the training, by label: `lift` [labels][L][E], `separation` [L][labels], names."""
    found = [(load, training["labels"]) for load in training["loads"]] if training is not None else []
    if evaluated is not None and "load" in evaluated:
        found.append((evaluated["load"], evaluated["labels"]))
    measured = [(load, labels) for load, labels in found if load.get("by_label")]
    if not measured:
        return None
    newest, labels = measured[-1]
    count = max(map(len, newest["by_label"]))
    # labels are numbered as they are named; the last ones may not have been met
    names = labels[:count] if len(labels) >= count else [f"label {label}" for label in range(count)]
    met = [name for at, name in enumerate(names) if any(sum(rows[at]) for rows in newest["by_label"])]
    if len(met) < 2:
        absent["specialisation"] = {"why": f"The text that was measured holds only {' and '.join(met) or 'nothing'}, so there is nothing to compare.",
                                    "command": "moeforge tune ... --held-out 0.1"}  # fmt: skip
        return None
    return {
        "title": newest["title"], "labels": names, "sites": newest["sites"], "lift": lifts(newest["by_label"]),
        "separation": separations(newest["by_label"]),
    }  # fmt: skip


def _drift(src: Artifact, options: Options, ctx: Context, absent: dict[str, Any]) -> dict[str, Any]:
    """`drift` from the parent and `apart`, the experts from each other; what cannot be had goes to `absent` with the reason."""
    found: dict[str, Any] = {"drift": None, "apart": None}
    command = f"moeforge report {shlex.quote(src.ref)} --parent REF"
    if not options.drift:
        absent["drift"] = absent["apart"] = {
            "why": "The weights were not read (--no-drift).",
            "command": f"moeforge report {shlex.quote(src.ref)}",
        }
        return found
    if src.path is None:
        absent["drift"] = absent["apart"] = {"why": f"The weights of {src.ref} are not on this machine.",
                                             "command": f"hf download {shlex.quote(src.ref.partition('@')[0])}"}  # fmt: skip
        return found
    try:
        with open_checkpoint(src.ref, allow_pickle=options.allow_pickle, dequantize=True) as checkpoint:
            found["apart"] = _trimmed(between_experts(checkpoint, ctx))
            if found["apart"] is None:
                absent["apart"] = {"why": "No layer has two experts that are stored as plain weights."}
            opened = _parent(src, options, absent, command)
            if opened is not None:
                with opened as parent:
                    recorded = ((src.manifest or {}).get("parents") or [{}])[0]
                    same = (
                        None if options.parent is not None else parent.provenance()["digest"] == recorded.get("digest")
                    )
                    found["drift"] = {"parent": parent.ref, "same": same, **from_parent(checkpoint, parent, ctx)}
    except (BadInput, MachineLacks) as error:
        if options.parent is not None:
            raise
        told = {"why": f"The weights cannot be read as plain numbers: {error}"}
        absent |= {name: told for name in ("drift", "apart") if found[name] is None}
    if found["drift"] is not None and not found["drift"]["compared"]:
        absent["drift"] = {
            "why": f"No tensor has a counterpart of its shape in {found['drift']['parent']}.",
            "command": command,
        }
        found["drift"] = None
    return found


def _parent(src: Artifact, options: Options, absent: dict[str, Any], command: str) -> Checkpoint | None:
    if options.parent is not None:
        return open_checkpoint(options.parent, allow_pickle=options.allow_pickle, dequantize=True)
    manifest = src.manifest or {}
    parents = manifest.get("parents") or ()
    if not parents:
        absent["drift"] = {"why": "No parent is recorded.", "command": command}
        return None
    ref = parents[0]["ref"]
    if not os.path.exists(ref):
        absent["drift"] = {"why": f"The parent, {ref}, is not on this machine.", "command": command}
        return None
    try:
        return open_parent(parents[0], {"dequantize": True}, options.allow_pickle)
    except (BadInput, MachineLacks) as error:
        absent["drift"] = {"why": f"The parent cannot be opened: {error}", "command": command}
        return None


def _trimmed(apart: dict[str, Any] | None) -> dict[str, Any] | None:
    """With each layer's nearest two; the distances of all of them only where they are few."""
    if apart is None:
        return None
    nearest = [min((value, i, j) for i, row in enumerate(matrix) for j, value in enumerate(row[:i]) if value is not None)
               if any(value is not None for row in matrix[1:] for value in row[:1]) else None for matrix in apart["pairs"]]  # fmt: skip
    few = max(map(len, apart["pairs"])) <= PAIRS
    return apart | {"nearest": nearest, "pairs": apart["pairs"] if few else None}


def _absent(src: Artifact, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Why a section has nothing to show, and what would fill it."""
    ref = shlex.quote(src.ref)
    found = {}
    tune = f"moeforge tune {ref} --data SOURCE -o tuned"
    training = numbers["training"]
    if numbers["lineage"] is None:
        found["lineage"] = {"why": "moeforge did not write it, so nothing is known of where it comes from."}
    if training is None or not (training["steps"] or training["held_out"]):
        found["training"] = {"why": "No metrics of a training run are on this machine.", "command": tune}
    watched = (training or {}).get("loads") or (numbers["eval"] or {}).get("load") or numbers["tokens"]
    evaluate = (
        f"moeforge eval {ref} --data A --data B --routing --json > eval.json; moeforge report {ref} --eval eval.json"
    )
    if not watched:
        found["load"] = {
            "why": "Nobody has watched its routers. Tuning does, so does a text (--text), and so does",
            "command": evaluate,
        }
    if numbers["specialisation"] is None:
        found["specialisation"] = {
            "why": "Load was not measured by kind of text. Tuning on several does it, and so does",
            "command": evaluate,
        }
    if numbers["tokens"] is None:
        found["tokens"] = {"why": "No text was given.", "command": f'moeforge report {ref} --text "some text"'}
    if numbers["eval"] is None:
        found["eval"] = {"why": "No evaluation was given.",
                         "command": f"moeforge eval {ref} --data SOURCE --json > eval.json; moeforge report {ref} --eval eval.json"}  # fmt: skip
    return found


def _told(numbers: Mapping[str, Any]) -> list[str]:
    """The page in a few lines, for a terminal."""
    sizes, training = numbers["sizes"], numbers["training"]
    lines = [numbers["ref"]]
    if sizes is not None:
        active = (
            ""
            if sizes["parameters_active"] is None
            else f", {describe_value('parameters', sizes['parameters_active'])} active a token"
        )
        lines.append(f"  parameters:   {describe_value('parameters', sizes['parameters_total'])}{active}")
    if training is not None and training["held_out"]:
        first, last = training["held_out"][0], training["held_out"][-1]
        lines.append(f"  held-out loss: {first[1]:.4f} -> {last[1]:.4f} nats a token, after {last[0]} steps")
    lines += [f"  not shown:    {name}: {about['why']}" for name, about in numbers["missing"].items()]
    return lines
