"""Whom `tune --teacher` learns from: any checkpoint whose tokens are SRC's. No torch until it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.anatomy import plain_config
from moeforge.checkpoint.vocabulary import first_difference, vocabulary
from moeforge.errors import BadInput
from moeforge.pipeline.artifact import Artifact, locate
from moeforge.pipeline.run import pin

from .job import Parent

if TYPE_CHECKING:
    import torch

    from moeforge.checkpoint.base import Checkpoint
    from moeforge.train.distill import Teacher


@dataclass(frozen=True)
class Opened:
    """How a teacher is opened. It computes in the precision of the training, so quantised weights are decoded."""

    dequantize: bool = True


def pinned(ref: str) -> tuple[Artifact, str]:
    """Where a teacher is to be opened, and a digest of what is there. The Hub is asked once a process, so that key, plan and run mean one
    commit.

    Raises:
        BadInput: it cannot be opened.
    """
    found = locate(ref)
    return pin(found, Opened()) if found.path is not None else _pinned_on_hub(ref)


@cache
def _pinned_on_hub(ref: str) -> tuple[Artifact, str]:
    return pin(locate(ref), Opened())


def open_teacher(ref: str) -> Checkpoint:
    """Its weights as plain numbers, whatever they are stored as."""
    return open_checkpoint(ref, dequantize=Opened().dequantize)


def parent(teacher: Checkpoint) -> Parent:
    """What the manifest says of it."""
    return Parent(teacher.ref, {**teacher.provenance(), "role": "teacher"})


def check_tokens(teacher: Checkpoint, source: Checkpoint) -> None:
    """Refuse a teacher whose distributions are over other tokens.

    Raises:
        BadInput: names the numbers, or the first token, of both.
    """
    sizes = [plain_config(found.config).get("vocab_size") for found in (teacher, source)]
    if None not in sizes and sizes[0] != sizes[1]:  # where a config leaves it out, the loaded model says
        raise _stranger(teacher, source, f"has vocab_size = {sizes[0]}, {source.ref} has {sizes[1]}")
    theirs, ours = vocabulary(teacher), vocabulary(source)
    index = first_difference(
        theirs, ours, min((size for size in sizes if size is not None), default=1 + max(ours, default=-1))
    )
    if index is not None:
        raise _stranger(teacher, source, f"token {index} is {theirs[index]!r}, in {source.ref} it is {ours[index]!r}")


def _stranger(teacher: Checkpoint, source: Checkpoint, found: str) -> BadInput:
    return BadInput(f"--teacher {teacher.ref}: {found}; only a model with the same tokens can be learnt from, such as the one that "
                    f"{source.ref} was made from")  # fmt: skip


def parameters(teacher: Checkpoint) -> int:
    """How many numbers are in memory while it teaches."""
    return sum(info.size for info in teacher.tensors.values())


def load_teacher(
    ref: str, source: Checkpoint, vocabulary_size: int, dtype: torch.dtype, device: torch.device
) -> Teacher:
    """The teacher in memory, frozen, on every rank whole.

    Args:
        source: what learns, for the message.
        vocabulary_size: V of its logits.

    Raises:
        BadInput: it cannot be loaded, or its logits are not as many; configs of some families do not say beforehand.
    """
    from moeforge.model.build import require_generation
    from moeforge.model.kernels import use_kernels_where_faster
    from moeforge.model.load import load
    from moeforge.train.distill import Teacher

    with open_teacher(ref) as opened:
        require_generation(opened.config, opened.ref)
        model = load(opened, dtype=dtype, device=device)
        use_kernels_where_faster(model)
        size = model.config.get_text_config().vocab_size
        if size != vocabulary_size:
            raise _stranger(opened, source, f"gives {size} logits, {source.ref} {vocabulary_size}")
    return Teacher.of(model)
