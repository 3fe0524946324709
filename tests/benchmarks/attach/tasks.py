"""Small public tasks of questions with given answers, as text to train on and as choices to be scored.

Reads the folder `dataset` of https://github.com/AGI-Edgerunners/LLM-Adapters (Apache 2.0), a directory a task with
train.json and test.json; nothing of it is copied here.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Domain

from moeforge.train.data import Document

TASKS = {"arc-easy": "ARC-Easy", "openbookqa": "openbookqa", "boolq": "boolq"}
OPTION = re.compile(r"\bAnswer(\d): ")
BATCH = 32
"""Options in one forward pass."""


@dataclass(frozen=True)
class Question:
    """What is asked, the answers to choose from, and which is right."""

    text: str
    options: tuple[str, ...]
    right: int

    @property
    def prompt(self) -> str:
        return f"Question: {self.text}\nAnswer:"

    @property
    def solved(self) -> str:
        return f"{self.prompt} {self.options[self.right]}\n"


def task(root: Path, name: str) -> Domain:
    """A task's training questions with their answers as text; of its test questions half choose, half are reported."""
    train, test = (tuple(_questions(root / TASKS[name] / f"{part}.json")) for part in ("train", "test"))
    mixed = random.Random("test questions").sample(test, len(test))

    def documents(part: str, questions: Sequence[Question]) -> tuple[Document, ...]:
        return tuple(
            Document(f"{name}:{part}#{at}", len(one.solved), partial(str, one.solved))
            for at, one in enumerate(questions)
        )

    return Domain(
        documents("train", train),
        documents("choose", mixed[::2]),
        documents("report", mixed[1::2]),
        questions=tuple(mixed[1::2]),
    )


def _questions(path: Path) -> Iterator[Question]:
    try:
        records = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        sys.exit(f"{path} is not there: git clone https://github.com/AGI-Edgerunners/LLM-Adapters, then --tasks LLM-Adapters/dataset")  # fmt: skip
    for record in records:
        asked = record["instruction"].split("question: ", 1)[1].split("\n\nAnswer format:")[0]
        if record["answer"] in ("true", "false"):
            yield Question(asked, ("yes", "no"), 0 if record["answer"] == "true" else 1)
            continue
        asked, listed = asked.split("\n\nAnswer1: ", 1)
        options = tuple(OPTION.split(listed)[::2])
        yield Question(asked, tuple(option.strip() for option in options), int(record["answer"].removeprefix("answer")) - 1)  # fmt: skip


@torch.no_grad()
def score(model: Any, tokenizer: Any, questions: Sequence[Question]) -> dict[str, float]:
    """How a model chooses: the option of the highest log-likelihood per character (lm-evaluation-harness' acc_norm).

    Returns:
        accuracy, and nats: -log of what the right option has of the probability of all options of its question together,
        which tells models apart before their choices do.
    """
    pairs = [(question.prompt, f" {option}") for question in questions for option in question.options]
    likelihoods = torch.empty(len(pairs), dtype=torch.float64)
    encoded = [(tokenizer(prompt)["input_ids"], tokenizer(option, add_special_tokens=False)["input_ids"]) for prompt, option in pairs]  # fmt: skip
    model.eval()
    order = sorted(range(len(pairs)), key=lambda at: sum(map(len, encoded[at])))  # rows of one length pad little
    for first in range(0, len(order), BATCH):
        rows = order[first : first + BATCH]
        width = max(sum(map(len, encoded[at])) for at in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, at in enumerate(rows):
            both = [*encoded[at][0], *encoded[at][1]]
            ids[row, : len(both)], mask[row, : len(both)] = torch.tensor(both), 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, at in enumerate(rows):
            start, end = len(encoded[at][0]), sum(map(len, encoded[at]))
            logs = logits[row, start - 1 : end - 1].double().log_softmax(-1)
            likelihoods[at] = logs.gather(1, ids[row, start:end, None]).sum()
    at, hits, nats = 0, 0, 0.0
    for question in questions:
        own = likelihoods[at : at + len(question.options)]
        at += len(question.options)
        lengths = torch.tensor([len(option) for option in question.options])
        hits += int((own / lengths).argmax()) == question.right
        nats -= float(own.log_softmax(-1)[question.right])
    return {"accuracy": hits / len(questions), "nats": nats / len(questions)}
