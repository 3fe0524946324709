"""What the quality benchmarks of LoRA experts share: domains of text, one training run, a log of runs, intervals over seeds."""

from __future__ import annotations

import json
import os
import platform
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.expert_adapter import ExpertAdapter
from moeforge.model.load import load
from moeforge.model.tokenizer import load_tokenizer
from moeforge.pipeline.manifest import peak_rss_bytes
from moeforge.pipeline.progress import Progress
from moeforge.testing import inprocess
from moeforge.testing.real import smollm2_gguf
from moeforge.texts import whole_file
from moeforge.train.data import Document, Pool, find_documents, hold_out
from moeforge.train.encoding import Encoder
from moeforge.train.loop import Loop, Settings, borders_hold, evaluate
from moeforge.train.packing import Cursor, Packer, Row
from moeforge.train.params import Choice
from moeforge.train.routing import find_sites

ROOT = Path(__file__).resolve().parents[3]
START = Cursor()
LENGTH, ROWS = 256, 2
"""Slots in a row of packed text, and rows an update: 512 tokens."""
PIECE = 1_000
"""Characters: a run of few tokens would otherwise meet a single source file of each domain."""


@dataclass(frozen=True)
class Domain:
    """Text of one kind, apart from its held-out documents: `choose` is for choosing a learning rate, `report` for results."""

    train: tuple[Document, ...]
    choose: tuple[Document, ...]
    report: tuple[Document, ...]
    questions: tuple[Any, ...] = ()
    """Of a task: the questions of `report`, with the answers to choose from."""


def domain(name: str) -> Domain:
    """prose, code and legal as `builtin:` has them; cpp: the headers of torch's c10, which every machine that runs moeforge has.

    Whole documents are held out, always the same ones, whatever the seed of a run.
    """
    if name == "cpp":
        root = Path(torch.__file__).parent / "include"
        found = [whole_file(path, f"cpp:{path.relative_to(root)}") for path in sorted((root / "c10").rglob("*.h"))]
        documents = [Document(text.key, text.size, text.read, text.changed) for text in found]
    else:
        documents = find_documents([f"builtin:{name}"])
    train, held = hold_out(documents, 0.15, seed=0)
    pieces = [piece for document in held for piece in _pieces(document)]
    random.Random("held-out pieces").shuffle(pieces)
    return Domain(tuple(p for document in train for p in _pieces(document)), tuple(pieces[::2]), tuple(pieces[1::2]))


def _pieces(document: Document) -> Iterator[Document]:
    """A document cut at line ends."""
    content = document.read()
    assert isinstance(content, str)
    lines: list[str] = []
    for number, line in enumerate(content.splitlines(keepends=True)):
        lines.append(line)
        if sum(map(len, lines)) >= PIECE:
            yield Document(f"{document.key}#{number}", PIECE, partial(str, "".join(lines)))
            lines = []
    if "".join(lines).strip():
        yield Document(f"{document.key}#end", PIECE, partial(str, "".join(lines)))


class FirstRows(Packer):
    """The first `count` rows of what a packer gives."""

    count = 0

    def rows(self, cursor: Cursor = START, *, repeat: bool = True) -> Iterator[Row]:
        return islice(super().rows(cursor, repeat=repeat), self.count)


class Trained:
    """An adapter in memory beside its base, to be trained and measured.

    Args:
        ref: the directory of an adapter, or the base itself.
    """

    def __init__(self, ref: Path | str) -> None:
        with open_checkpoint(str(ref)) as source:
            self.tokenizer = load_tokenizer(source.base if isinstance(source, ExpertAdapter) else source)
            self.encode = Encoder(self.tokenizer)
            self.model: Any = load(source, dtype=torch.float32)
        if not borders_hold(self.model, find_sites(self.model), self.model.config.get_text_config().vocab_size):
            sys.exit(
                f"{type(self.model).__name__} lets packed documents see each other, so no loss here would mean anything"
            )

    def parameters(self, kind: str = "all") -> dict[str, torch.nn.Parameter]:
        """What learns by name: `all` of the adapter, or its `routers`."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad and (kind == "all" or ".router." in name)}  # fmt: skip

    def train(self, domains: Sequence[Domain], scratch: Path, *, steps: int, rate: float, seed: int, kind: str = "all",
              **settings: Any) -> dict[str, Any]:  # fmt: skip
        """`steps` updates on the domains in equal shares, each token labelled with its domain's number, through moeforge's own loop; its settings beyond those here by name.

        Returns:
            tokens and seconds, and the loss of each step.
        """
        learning = self.parameters(kind)
        routers = frozenset(self.parameters("routers"))
        frozen = [p for name, p in self.parameters().items() if name not in learning]
        for parameter in frozen:
            parameter.requires_grad_(False)
        chosen = Settings(rows=ROWS, amount=steps, learning_rate=rate, weight_decay=0.0, **settings)
        pools = [Pool(tuple(replace(piece, label=i) for piece in one.train)) for i, one in enumerate(domains)]
        train = Packer(pools, self.encode, LENGTH, seed)
        scratch.mkdir(parents=True, exist_ok=True)
        loop = Loop(
            self.model,
            find_sites(self.model),
            Choice(learning, routers & learning.keys()),
            chosen,
            train,
            None,
            scratch,
        )
        progress = Progress("benchmark", "none", quiet=True)
        result = loop.run(lambda title, total, unit: progress.bar(title, total, unit, lambda: None))
        for parameter in frozen:
            parameter.requires_grad_(True)
        return {"tokens": result.tokens, "seconds": round(result.seconds, 1), "losses": [r["loss"] for r in result.metrics.of("step")]}  # fmt: skip

    def held_out(self, documents: Sequence[Document], rows: int) -> FirstRows:
        packer = FirstRows([Pool(tuple(documents))], self.encode, LENGTH, None)
        packer.count = rows
        return packer

    def loss(self, documents: Sequence[Document], rows: int) -> dict[str, float]:
        """Nats a token over the first `rows` rows, and how many tokens these predict."""
        found = evaluate(self.model, find_sites(self.model), self.held_out(documents, rows), ROWS, torch.device("cpu"))
        return {"loss": found["loss"], "tokens": found["tokens"]}


def attach(output: Path, method: str, **options: Any) -> Path:
    """`moeforge attach` on SmolLM2, in this process, without its proof."""
    return inprocess.run("attach", smollm2_gguf(), output, method, verify=False, **options).path


def trainable(method: str, **options: Any) -> int:
    """Parameters that would learn, from the plan alone."""
    plan = inprocess.plan("attach", smollm2_gguf(), method, **options)
    plan.payload.base.close()
    return plan.facts["parameters_trainable"]


class Log:
    """Every run that has ended, one JSON object a line; what is there already is not run again.

    Args:
        fresh: forget what is there.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        path.touch()
        # a line that a killed run left half written has no end, and is run again
        whole = [line for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(whole), "utf-8")
        self.records: list[dict[str, Any]] = [json.loads(line) for line in whole]

    def get(self, job: dict[str, Any], work: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """The record of a job: from the log, or of a process of its own, which gives its memory back."""
        for record in self.records:
            if record["job"] == job:
                return record
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            record = {"job": job, **pool.submit(_measured, work, job).result()}
        self.records.append(record)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return record


def _measured(work: Callable[[dict[str, Any]], dict[str, Any]], job: dict[str, Any]) -> dict[str, Any]:
    return {**work(job), "peak_rss_mb": round(peak_rss_bytes() / 1e6)}


def settle_process() -> None:
    """No network and no plugins from elsewhere, here and in what is started from here."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "MOEFORGE_PLUGINS": "", "PYTHONHASHSEED": "0"}


def heading() -> str:
    """Command, machine and versions."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "moeforge"))
    return (f"`{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}`; {platform.machine()}, {os.cpu_count()} cores, "
            f"{torch.get_num_threads()} threads, Linux {platform.release()}, Python {platform.python_version()}, {packages}, "
            f"load {os.getloadavg()[0]:.2f}")  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
