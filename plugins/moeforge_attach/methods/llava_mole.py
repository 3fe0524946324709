"""LLaVA-MoLE: three experts inside the FFN, each token takes one, whose answer is not scaled; plain LoRA on attention.

As printed, the choice has no gradient but the balance loss's. `straight_through` computes the same and lets the router learn from the
task; `--gate-scale none` is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..design import ATTENTION, Design


@dataclass(frozen=True)
class Options:
    """None of its own."""


class LLaVAMoLE:
    name = "llava-mole"
    summary = "3 LoRA experts in every FFN, 1 active and not scaled; text tower of vision-language models, too"
    reference = "LLaVA-MoLE, arXiv:2401.16160"
    api_version = 1
    Options = Options

    def design(self, stage: Any, options: Options) -> Design:
        router = {"select": "topk", "top_k": 1, "renormalise": False, "gate_scale": "straight_through"}
        return Design(("ffn",), ATTENTION, experts="3", rank=32, alpha=16, router=router)
