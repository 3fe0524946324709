"""What is to be trained and on what: the job, the hardware, and one candidate for it."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from .layouts import Layout

Training = Literal["full", "lora", "4bit"]
Optimizer = Literal["adamw", "adamw-8bit"]
Recompute = Literal["none", "selective", "ffn", "full"]
"""What the backward pass computes again: nothing, the activation between an expert's matrices, FFNs and experts, or whole layers."""


@dataclass(frozen=True)
class Job:
    """One training run.

    Args:
        seq: tokens of a sequence.
        global_batch: sequences of one update, over all GPUs.
        skew: rows of the busiest expert over the mean; 1 when routing is balanced.
    """

    seq: int
    global_batch: int
    training: Training = "full"
    optimizer: Optimizer = "adamw"
    adapter_rank: int = 16
    skew: float = 1.0

    @property
    def state_bytes(self) -> int:
        """Of one trained parameter's float32 master copy and two moments."""
        return 12 if self.optimizer == "adamw" else 6

    @property
    def frozen_bytes(self) -> float:
        """Of one frozen parameter: bfloat16, or 4 bits and a scale for every 64."""
        return 0.55 if self.training == "4bit" else 2.0

    @property
    def backward(self) -> float:
        """Backward over forward compute: gradients of inputs and of weights, or of inputs alone where weights are frozen."""
        return 2.0 if self.training == "full" else 1.0


@dataclass(frozen=True)
class Hardware:
    """What a GPU and its machine do; see hardware.toml for the units.

    Args:
        link_alpha, network_alpha: seconds that one message costs whatever its size.
        link_efficiency: share of a link's data sheet that collectives reach; 0.75 is a first guess that was left as it is.
        small_rows: rows at which a matrix product reaches half its speed.
        efficiency: share of `tflops` that large matrix products reach; None: the default of steptime.py.
    """

    name: str
    title: str
    tflops: float
    memory: float
    hbm: float
    node: int
    link: float
    network: float
    link_alpha: float = 10e-6
    network_alpha: float = 25e-6
    link_efficiency: float = 0.75
    efficiency: float | None = None
    small_rows: float = 100.0

    @property
    def flops(self) -> float:
        return self.tflops * 1e12


@dataclass(frozen=True)
class Candidate:
    """A layout with what is chosen beside it.

    Args:
        micro_batch: sequences of one forward pass of a rank.
        stages: pieces of the model that each pipeline rank holds (interleaving, Megatron's virtual stages); 1: none.
    """

    layout: Layout
    micro_batch: int = 1
    stages: int = 1
    recompute: Recompute = "none"

    def microbatches(self, job: Job) -> int:
        """Forward passes of a rank in one update."""
        return job.global_batch // (self.layout.dp * self.micro_batch)


@functools.cache
def hardware() -> Mapping[str, Hardware]:
    """Every GPU of hardware.toml, by its name."""
    raw: dict[str, Any] = tomllib.loads(resources.files("moeforge_plan").joinpath("hardware.toml").read_text("utf-8"))
    return {name: Hardware(name, **row) for name, row in raw.items()}
