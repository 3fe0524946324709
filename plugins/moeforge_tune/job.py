"""What a plan hands to its run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeforge.pipeline.artifact import Artifact
from moeforge.train.data import Document, Pool
from moeforge.train.layout import Layout

from .options import Options

FOLDER = "tune"
"""Where in the output metrics and plots go."""


@dataclass(frozen=True)
class Parent:
    """A checkpoint that is read beside SRC."""

    ref: str
    """As it is to be opened: a moving Hub branch is pinned to its commit."""
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What `run` needs from `plan`."""

    src: Artifact
    options: Options
    train: tuple[Pool, ...]
    held: tuple[Document, ...]
    layout: Layout = Layout()
    labels: tuple[str, ...] = ()
    """Names of the labels, by number; empty where they are numbers."""
    teacher: Parent | None = None
    """Whom to learn from beside the text."""
