"""Everything that decides what a run makes of model and data. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .labels import Route
from .schedule import Schedule

Optimizer = Literal["adamw", "adamw-8bit"]


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, apart from model and data."""

    rows: int
    """B, rows in one forward pass."""
    accumulate: int = 1
    """Forward passes before each update; the gradient is that of the mean over all their tokens."""
    budget: Literal["steps", "tokens", "minutes"] = "steps"
    amount: float = 100
    optimizer: Optimizer = "adamw"
    learning_rate: float = 1e-4
    router_scale: float = 1.0
    weight_decay: float = 0.1
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    clip: float = 1.0
    """Largest gradient norm; 0 is no clipping."""
    balance: float = 0.01
    z: float = 0.0
    entropy: float = 0.0
    entropy_sign: Literal["plus", "minus"] = "plus"
    """See :class:`moeforge.mixture.losses.Weights`."""
    importance: float = 0.0
    preserve: float = 0.0
    """Of the experts' squared distance from where they started (LoRA-Mixer, arXiv:2507.00029)."""
    kd: float = 0.0
    """Of the distance from a teacher, beside the text's own loss, which counts 1 - kd: see :mod:`moeforge.train.distill`."""
    kd_temperature: float = 1.0
    lora_plus: float = 1.0
    route: Route = "config"
    """How tokens choose while training; measured is always what the config says."""
    bias_rate: float = 0.001
    """How far a selection bias moves in each step, for routers that have one (arXiv:2408.15664)."""
    evaluate_every: int = 0
    routing_every: int = 0
    """Steps between two records of what the routers did in training; 0: none."""
    save_every: int = 0
