"""Two ways to get a model's logits: the whole model in memory, or one decoder layer at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..checkpoint.anatomy import plain_config
from ..checkpoint.base import COMPRESSION, Checkpoint
from ..checkpoint.quantized import wrap
from ..model.build import require_generation
from ..model.load import load
from ..model.memory import available_memory
from ..model.streaming import State, StreamedModel
from ..model.weights import torch_dtype
from ..pipeline.context import Context

Memory = Literal["auto", "whole", "layers"]
STATES = 1 << 30
"""Bytes of hidden states that wait between two layers: with more text, the checkpoint is read again."""
SPARE = 1 << 30
"""Bytes beside the weights: torch, activations, logits."""

Logits = Callable[[slice], Tensor]
"""Positions -> [B, t, V] logits of one batch."""


class Runner(Protocol):
    """A model that turns batches of token ids into logits."""

    ref: str
    how: str
    dtype: str
    vocabulary: int
    tokens_at_once: float
    """Slots that one `run` should be given."""
    seconds: float
    """Time spent computing."""

    def run(
        self, batches: Sequence[Tensor], tick: Callable[[float], None]
    ) -> contextlib.AbstractContextManager[list[Logits]]:
        """The logits of some batches [B, T], within the `with` block; `tick` is told how many tokens have been worked off,
        and may raise."""
        ...


class Whole:
    """The model as :func:`moeforge.model.load.load` gives it, compressed weights as they are stored."""

    how = "whole"
    tokens_at_once = 1.0

    def __init__(self, checkpoint: Checkpoint, dtype: str | None, device: str) -> None:
        require_generation(checkpoint.config, checkpoint.ref)
        self.ref, self.device, self.seconds = checkpoint.ref, torch.device(device), 0.0
        self.model = load(checkpoint, dtype=dtype, device=device)
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        self.vocabulary = self.model.config.get_text_config().vocab_size

    @contextlib.contextmanager
    def run(self, batches: Sequence[Tensor], tick: Callable[[float], None]) -> Iterator[list[Logits]]:
        found = []
        for ids in batches:
            with torch.no_grad(), _timed(self):
                found.append(self.model(input_ids=ids.to(self.device), use_cache=False).logits)
            tick(ids.numel())
        yield [lambda rows, logits=logits: logits[:, rows] for logits in found]


class Layers:
    """One decoder layer in memory at a time, whatever the model's size."""

    how = "layers"

    def __init__(self, checkpoint: Checkpoint, dtype: str | None, device: str) -> None:
        require_generation(checkpoint.config, checkpoint.ref)
        if COMPRESSION in checkpoint.config:
            checkpoint = wrap(checkpoint, dequantize=True)
        dtype = dtype or str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
        self.ref, self.device, self.seconds = checkpoint.ref, torch.device(device), 0.0
        self.model = StreamedModel(checkpoint, dtype=torch_dtype(dtype), device=device)
        self.dtype = dtype
        config = self.model.module.config.get_text_config()
        self.vocabulary = config.vocab_size
        self.tokens_at_once = STATES / (config.hidden_size * self.model.dtype.itemsize)

    @contextlib.contextmanager
    def run(self, batches: Sequence[Tensor], tick: Callable[[float], None]) -> Iterator[list[Logits]]:
        with _timed(self):
            states = self.model.start(batches)
        for index in range(self.model.depth):
            with _timed(self), self.model.layer(index) as layer:
                for state in states:
                    self.model.advance(state, layer)
                    # whole numbers that add up to all of the batch's tokens
                    before, after = (state.ids.numel() * done // self.model.depth for done in (index, index + 1))
                    tick(after - before)

        def logits(rows: slice, state: State) -> Tensor:
            with _timed(self):
                return self.model.logits(state, rows)

        with self.model.holding():
            yield [lambda rows, state=state: logits(rows, state) for state in states]


@contextlib.contextmanager
def _timed(runner: Whole | Layers) -> Iterator[None]:
    started = time.perf_counter()
    yield
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
    runner.seconds += time.perf_counter() - started


def make_runners(checkpoints: Sequence[Checkpoint], memory: Memory, dtype: str | None, device: str,
                 ctx: Context, tokens: int) -> list[Runner]:  # fmt: skip
    """Runners of all models, which are in memory at the same time; says which way was taken.

    Args:
        tokens: in one batch: a model that is held whole gives the logits of all of them at once.

    Raises:
        BadInput: one of them cannot be run.
    """
    if dtype is None and device == "cpu":
        dtype = "float32"
    if memory == "auto":
        needed = SPARE + sum(
            _weight_bytes(checkpoint, dtype) + 4 * tokens * (plain_config(checkpoint.config).get("vocab_size") or 0)
            for checkpoint in checkpoints
        )
        memory = "whole" if needed <= _free(device) else "layers"
    refs = " and ".join(checkpoint.ref for checkpoint in checkpoints)
    ctx.say(f"{refs}: {'whole in memory' if memory == 'whole' else 'one layer in memory at a time'}")
    kind = Whole if memory == "whole" else Layers
    return [kind(checkpoint, dtype, device) for checkpoint in checkpoints]


def _weight_bytes(checkpoint: Checkpoint, dtype: str | None) -> int:
    """What a model's weights take in memory."""
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    if dtype is None or COMPRESSION in checkpoint.config:
        return stored
    return sum(info.size for info in checkpoint.tensors.values()) * torch_dtype(dtype).itemsize


def _free(device: str) -> int:
    """Bytes that weights may take on a device."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    return available_memory() * 3 // 4
